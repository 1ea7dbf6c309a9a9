"""How fast are views made? PIL as DINO published it, workers that crop, what the device does after them, and all of it.

    python benchmarks/views.py --data images_background.zip --kind omniglot
    python benchmarks/views.py --data photographs/ --global-size 96 --local-size 48

One thread of the CPU (or the GPU, if there is one, for what is done there), the ways taken in turn; the fastest of
several rounds counts. Prints images per second and the ratio to the first way.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from dino import cli
from dino.config.schema import ViewsConfig
from dino.data import ResidentImages, open_images
from dino.views import DeviceViews, MultiCrop, View, canvas_of, view_spec
from dino.views.draws import sample_key

BATCH = 64


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = open_images(arguments.data, arguments.kind)
    preset = "line_art" if arguments.kind == "omniglot" else "dino"
    settings = {"global_size": arguments.global_size, "local_size": arguments.local_size}
    spec = view_spec(ViewsConfig(preset=preset, local_crops=arguments.local_crops, **settings))
    chosen = range(0, len(images.names), -(-len(images.names) // BATCH))
    decoded = [images.read(index) for index in chosen]
    keys = np.array([sample_key(0, 0, index) for index in chosen], dtype=np.uint64)
    resident = ResidentImages(_Some(decoded), device, show_progress=False)
    everything, on_device, in_worker = range(len(decoded)), DeviceViews(spec), DeviceViews(spec, singly=True)
    crops = on_device.crop(resident.gather(everything), keys)

    ways: dict[str, Callable[[], object]] = {
        "workers, crops": lambda: [
            in_worker.crop(canvas_of(image), keys[n : n + 1]) for n, image in enumerate(decoded)
        ],
        "device, after workers": lambda: on_device.photometric(crops, keys),
        "device, all": lambda: on_device.photometric(on_device.crop(resident.gather(everything), keys), keys),
    }
    if preset == "dino":
        published = [Published(view) for view in spec.views]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in decoded]
        ways = {"PIL, as published": lambda: [[view(picture) for view in published] for picture in pictures], **ways}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            best[name] = min(best[name], seconds(way, device))
    first = next(iter(best))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    print(f"{len(decoded)} images, {describe(spec)}; {where}")
    for name, spent in best.items():
        print(f"  {name:<26}{len(decoded) / spent:>9.0f} images/s   {best[first] / spent:>6.2f} × {first}")


def seconds(way: Callable[[], object], device: torch.device) -> float:
    """One pass over the batch; CPU time of this thread, or wall time where the GPU works."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


class Published:
    """A view by torchvision's transforms on PIL images, as the paper's code composes them."""

    def __init__(self, view: View):
        self.view = view
        jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
        self.steps = v2.Compose([
            v2.RandomResizedCrop(view.size, scale=view.scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(view.amounts.get("flip", 0.0)),
            v2.RandomApply([jitter], p=view.amounts.get("jitter", 0.0)),
            v2.RandomGrayscale(view.amounts.get("grey", 0.0)),
        ])  # fmt: skip
        self.finish = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def __call__(self, picture: Image.Image) -> Tensor:
        changed = self.steps(picture)
        if torch.rand(()) < self.view.amounts.get("blur", 0.0):
            changed = changed.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))
        if torch.rand(()) < self.view.amounts.get("solarize", 0.0):
            changed = v2.functional.solarize(changed, 128)
        return self.finish(changed)


class _Some:
    """Decoded images as a pool."""

    kind, labels = "some", None

    def __init__(self, images: list[Tensor]):
        self.images, self.channels = images, images[0].shape[0]
        self.names = [str(index) for index in range(len(images))]

    def read(self, index: int) -> Tensor:
        return self.images[index]


def describe(spec: MultiCrop) -> str:
    sizes = [view.size for view in spec.views]
    return " + ".join(f"{sizes.count(size)}×{size}²" for size in dict.fromkeys(sizes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or zip archive of images")
    parser.add_argument("--kind", default="auto", help="as data.kind; omniglot takes the views of drawings")
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
