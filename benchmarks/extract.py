"""How fast are images embedded? `extract`, as evaluation calls it, beside a plain forward pass over the same batches.

python benchmarks/extract.py
python benchmarks/extract.py --official ~/dino --depth 12 --width 384 --size 98
"""

import argparse

import kit
import numpy as np
import torch
from torch import Tensor

from dino import cli
from dino.evaluation.features import extract
from dino.models import Preprocess, VisionTransformer, ViTSpec


class Pictures:
    """Decoded images as a pool."""

    kind, labels, weights = "pictures", None, None

    def __init__(self, count: int, size: int):
        self.pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        self.channels, self.names = 3, [str(index) for index in range(count)]

    def read(self, index: int, enough: float | None = None) -> Tensor:
        return self.pixels[index]


def main() -> None:
    arguments = parse()
    device = kit.begin(arguments)
    torch.manual_seed(0)
    heads = max(1, arguments.width // 64)
    spec = ViTSpec(arguments.width, arguments.depth, heads, arguments.patch, arguments.size)
    backbone = VisionTransformer(spec).eval().to(device)
    images, preprocess = Pictures(arguments.images, arguments.size), Preprocess(arguments.size, (0.5,) * 3, (0.2,) * 3)
    tensors = torch.stack([preprocess(pixels) for pixels in images.pixels]).to(device)
    indices = np.arange(arguments.images)
    ways = {"plain forward, fp32": lambda: plain(backbone, tensors, arguments.batch)}
    if arguments.official:
        ways = official(backbone, tensors, arguments) | ways

    def embed(precision: str) -> None:
        extract(backbone, images, indices, preprocess, arguments.batch, title=None, precision=precision)

    ways["extract, fp32"] = lambda: embed("fp32")
    ways["extract, bf16"] = lambda: embed("bf16")
    title = f"ViT {arguments.width}×{arguments.depth}/{arguments.patch}, {arguments.size} px, images"
    kit.show(title, kit.alternate(ways, arguments.rounds, device), arguments.images)


@torch.inference_mode()
def plain(model: torch.nn.Module, tensors: Tensor, batch: int) -> Tensor:
    """Class tokens (N, D)."""
    return torch.cat([model(images) for images in tensors.split(batch)])


def official(backbone: VisionTransformer, tensors: Tensor, arguments: argparse.Namespace) -> kit.Ways:
    """The official network, with the same weights."""
    module = kit.official(arguments.official, "vision_transformer")
    spec = backbone.spec
    network = module.VisionTransformer(
        img_size=[spec.image_size],
        patch_size=spec.patch_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        qkv_bias=True,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
    )
    network.load_state_dict(backbone.state_dict())
    network.eval().to(tensors.device)
    few = tensors[: arguments.batch]
    kit.same(plain(backbone, few, len(few)), plain(network, few, len(few)), 1e-4, "class tokens")
    return {"official": lambda: plain(network, tensors, arguments.batch)}


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=98, help="pixels")
    parser.add_argument("--patch", type=int, default=14)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
