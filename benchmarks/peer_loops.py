"""One training run of a peer, in its own documented loop, for a number of minutes; run by peers.py.

    python benchmarks/peer_loops.py lightly-dino --images FOLDER --minutes 5 --out FILE --size 32 --patch 4 …

To be run by a Python that has the peer (`pip install lightly`) and this project. The peer brings its loss, head, views
and the settings that its documentation trains with; the network is a ViT of the same width, depth and patches as ours,
and schedules are as long as the minutes allow, which a few steps tell. One thread: its CPU time counts.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dino.data import open_images
from dino.models import VisionTransformer, ViTSpec
from dino.models.weights import save_backbone

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # the peers normalise by ImageNet's
PILOT = 8  # steps that tell how many fit into the minutes
LOOPS = {  # module, and the method in it; a peer is imported only where it is asked for
    "lightly-dino": ("peer_lightly", "dino"),
    "lightly-dinov2": ("peer_lightly", "dinov2"),
    "official-dino": ("peer_official", "dino"),
}

Facts = dict[str, Any]


class Pictures(torch.utils.data.Dataset):
    """The images of a folder as three-channel pictures, through a peer's transform."""

    def __init__(self, folder: str, transform: Callable[..., list[Tensor]]):
        from torchvision.transforms.functional import to_pil_image

        pool = open_images(folder)
        pictures = (pool.read(index) for index in range(len(pool.names)))
        self.pictures = [to_pil_image(picture).convert("RGB") for picture in pictures]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.pictures[index])


def batches(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    module, method = LOOPS[arguments.peer]
    peer = import_module(module)
    new_loop = getattr(peer, f"{method}_loop")
    pictures = Pictures(arguments.images, getattr(peer, f"{method}_transform")(arguments))
    arguments.count = len(pictures)
    views = batches(DataLoader(pictures, arguments.batch, shuffle=True, drop_last=True))
    pilot, _ = new_loop(arguments, PILOT + 2)
    for number in range(PILOT + 2):
        if number == 2:
            began = time.process_time()
        pilot(next(views))
    seconds = (time.process_time() - began) / PILOT
    steps = max(10, int(60 * arguments.minutes / seconds))
    step, backbone = new_loop(arguments, steps)
    began = time.process_time()
    for _ in range(steps):
        step(next(views))
    minutes = (time.process_time() - began) / 60
    facts = {"steps": steps, "minutes": minutes, "peer": arguments.peer}
    keep(arguments.out, backbone.state_dict(), vars(arguments), facts, 1e-5 if method == "dinov2" else 0.0)
    print(f"{steps} steps of {arguments.batch} in {minutes:.2f} minutes")


def keep(out: Path, weights: dict[str, Tensor], sizes: dict[str, Any], facts: Facts, layer_scale: float = 0.0) -> None:
    """A peer's ViT in this project's format; official and timm's names of parameters are ours."""
    spec = ViTSpec(
        sizes["width"],
        sizes["depth"],
        sizes["heads"],
        sizes["patch"],
        sizes["size"],
        position_interpolation="offset",
        layer_scale=layer_scale,
    )
    result = VisionTransformer(spec)
    result.load_state_dict(weights)
    preprocessing = {"image_size": sizes["size"], "mean": MEAN, "std": STD}
    save_backbone(out, result, preprocessing, facts | {"initialisation": "published"})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=LOOPS)
    parser.add_argument("--images", required=True, help="folder or zip archive")
    parser.add_argument("--minutes", type=float, required=True, help="of CPU time of one thread")
    parser.add_argument("--out", type=Path, required=True, help="file of the backbone, in this project's format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    for name, default in (("size", 32), ("local", 16), ("patch", 4), ("width", 192), ("depth", 4), ("heads", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--official", metavar="DIR", help="your clone of facebookresearch/dino")
    return parser.parse_args()


if __name__ == "__main__":
    main()
