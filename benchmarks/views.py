"""How fast are views made? From the file to the augmented crops, beside DINO's own `DataAugmentationDINO`.

    python benchmarks/views.py --official ~/dino
    python benchmarks/views.py --official ~/dino --data images_background.zip --kind omniglot --global-size 64 \
        --local-size 32 --local-crops 6
    python benchmarks/views.py --data images_background.zip --kind omniglot --preset line_art --global-size 40 \
        --local-crops 0

Images per second of `BATCH` images, by each part of the way: all of it, the workers' half (decode and crop), the
device's half (what is done to crops), and all of it for images that are resident on the device. Without --data, of
photographs of 500×375 that are made here. The official code decodes as its `ImageFolder` does and has the same sizes
and crops.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from kit import alternate, begin, official, parser, show
from PIL import Image

from dino import cli
from dino.config.schema import ViewsConfig
from dino.data import Pool, ResidentImages, open_images
from dino.views import DeviceViews, MultiCrop, ViewsDataset, collate, view_spec

BATCH = 64


def main() -> None:
    arguments = parse()
    device = begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        images = open_images(arguments.data or photographs(Path(folder)), arguments.kind)
        images = images.subset(np.linspace(0, len(images.names) - 1, BATCH).astype(int), images.kind)
        ways = {} if arguments.official is None else {"official": official_views(arguments, images)}
        ways |= our_views(spec_of(arguments), images, device)
        seconds = alternate(ways, arguments.rounds, device)
    show(f"{arguments.preset}, {describe(spec_of(arguments))}", seconds, BATCH)


def our_views(spec: MultiCrop, images: Pool, device: torch.device) -> dict[str, Callable[[], object]]:
    """What a process does for a batch, and the parts of it."""
    dataset, views = ViewsDataset(images, spec, seed=0), DeviceViews(spec)
    resident = ResidentImages(images, device, show_progress=False)
    batch = collate([dataset[0, index] for index in range(BATCH)])
    crops_on_device = [crops.to(device) for crops in batch.crops]

    def workers() -> list[torch.Tensor]:
        return collate([dataset[0, index] for index in range(BATCH)]).crops

    return {
        "all of it": lambda: views.photometric([crops.to(device) for crops in workers()], batch.keys),
        "workers' half": workers,
        "device's half": lambda: views.photometric(crops_on_device, batch.keys),
        "resident": lambda: views.photometric(views.crop(resident.gather(range(BATCH)), batch.keys), batch.keys),
    }


def official_views(arguments: argparse.Namespace, images: Pool) -> Callable[[], object]:
    """DINO's, from the file on; at other sizes than its own by changing those of its random crops."""
    augment = official(arguments.official, "main_dino").DataAugmentationDINO(
        spec_of(arguments).views[0].scale, spec_of(arguments).views[-1].scale, arguments.local_crops
    )
    augment.global_transfo1.transforms[0].size = (arguments.global_size,) * 2
    augment.global_transfo2.transforms[0].size = (arguments.global_size,) * 2
    augment.local_transfo.transforms[0].size = (arguments.local_size,) * 2
    indices = range(len(images.names)) if images.indices is None else images.indices
    return lambda: [augment(Image.open(io.BytesIO(images.source.read(int(index)))).convert("RGB")) for index in indices]


def photographs(folder: Path) -> Path:
    """JPEGs with structure at every scale, as large as those of ImageNet (500×375, quality 90), always the same."""
    generator = np.random.default_rng(0)
    for number in range(BATCH):
        pixels = np.full((375, 500, 3), 128.0)
        for cells in (4, 8, 16, 32, 64, 128):
            noise = generator.normal(0, 40 / cells**0.5, (cells, cells, 3)).astype(np.float32)
            planes = [
                Image.fromarray(plane).resize((500, 375), Image.Resampling.BICUBIC)
                for plane in np.moveaxis(noise, 2, 0)
            ]
            pixels += np.stack(planes, axis=-1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.jpg", quality=90)
    return folder


def spec_of(arguments: argparse.Namespace) -> MultiCrop:
    """The views that the arguments ask for."""
    names = ("preset", "global_size", "local_size", "local_crops")
    return view_spec(ViewsConfig(**{name: getattr(arguments, name) for name in names}))


def describe(spec: MultiCrop) -> str:
    sizes = [view.size for view in spec.views]
    return " + ".join(f"{sizes.count(size)}×{size}²" for size in dict.fromkeys(sizes))


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--data", help="folder or zip archive of images")
    made.add_argument("--kind", default="auto", help="as data.kind")
    made.add_argument("--preset", default="dino", help="as views.preset")
    made.add_argument("--global-size", type=int, default=224)
    made.add_argument("--local-size", type=int, default=96)
    made.add_argument("--local-crops", type=int, default=8)
    return made.parse_args()


if __name__ == "__main__":
    cli.run(main)
