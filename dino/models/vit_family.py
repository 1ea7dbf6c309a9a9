"""ViTs by name, by settings, and by the tensors of other projects' files."""

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dino.config.schema import Config, ModelConfig
from dino.errors import UserError
from dino.models.backbone import Family
from dino.models.vit import VisionTransformer, ViTSpec


class Size(NamedTuple):
    """Width, depth and heads of a named ViT."""

    embed_dim: int
    depth: int
    num_heads: int


SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_giant2": Size(1536, 40, 24),
}


ODD_WIDTHS = (1280, 1408, 1664)  # ViT-H, g and G, whose heads are 80, 88 and 104 wide
logger = logging.getLogger(__name__)


def size_of(model: ModelConfig) -> Size:
    """Width, depth and heads that settings come to: each as it is set, or else the arch's own."""
    named = SIZES[model.arch]
    return Size(model.embed_dim or named.embed_dim, model.depth or named.depth, model.num_heads or named.num_heads)


def usual_heads(width: int, source: str) -> int:
    """Heads of a ViT of which nothing tells how many: each 64 wide, as in nearly all that are published.

    Raises:
        UserError: widths of which that is not so.
    """
    ways = (
        f"the tensors of {source} do not tell how many attention heads there are: say so with --heads N "
        '(model.num_heads for model.init), or in a file arguments.json beside it: {"num_heads": N}'
    )
    if not width or width % 64 or width in ODD_WIDTHS:
        raise UserError(ways)
    logger.warning("%s; taken for %d, each 64 wide, as usual", ways, width // 64)
    return width // 64


class ViTFamily(Family):
    """DINO's and DINOv2's Vision Transformers."""

    name, title = "vit", "ViT"
    archs = tuple(SIZES)
    spec_type = ViTSpec
    has_patches = has_blocks = True

    def spec(self, config: Config, mask_token: bool) -> ViTSpec:
        model = config.model
        return ViTSpec(
            **size_of(model)._asdict(),
            patch_size=model.patch_size,
            image_size=model.position_size or config.views.global_size,
            in_chans=config.data.channels,
            ffn=model.ffn,  # type: ignore[arg-type]  # these names were checked when settings were read
            layer_scale=model.layer_scale,
            registers=model.registers,
            mask_token=mask_token,
            position_interpolation=model.position_interpolation,  # type: ignore[arg-type]
            positions=model.positions,  # type: ignore[arg-type]
            stem=model.stem,  # type: ignore[arg-type]
        )

    def build(self, spec: ViTSpec, model: ModelConfig | None = None, drop_path: float = 0.0) -> VisionTransformer:
        model = model or ModelConfig()
        return VisionTransformer(
            spec,
            drop_path=drop_path,
            initialisation=model.weight_init,  # type: ignore[arg-type]
            drop_subset=model.drop_path_kind == "subset",
        )

    def settings(self, spec: ViTSpec, model: ModelConfig) -> dict[str, object]:
        size = Size(spec.embed_dim, spec.depth, spec.num_heads)
        names = [name for name, named in SIZES.items() if named == size]
        arch = names[0] if names else ModelConfig.arch
        if model.arch in SIZES and size_of(model) == size:
            arch = model.arch
        return {
            "model.arch": arch,
            **{f"model.{key}": value for key, value in size._asdict().items()},
            "model.patch_size": spec.patch_size,
            "model.ffn": spec.ffn,
            "model.layer_scale": spec.layer_scale,
            "model.registers": spec.registers,
            "model.positions": spec.positions,
            "model.stem": spec.stem,
            "model.position_interpolation": spec.position_interpolation,
            "model.position_size": spec.image_size,
        }

    def problems(self, config: Config) -> Iterator[str]:
        """Heads that do not divide the width, and sizes that do not divide into patches."""
        model, views = config.model, config.views
        width, _, heads = size_of(model)
        if heads < 1 or model.patch_size < 1:
            return  # which is told by the bounds of these settings
        if width % heads:
            yield f"model.embed_dim={width} is not divisible by model.num_heads={heads}"
        elif model.positions == "rotary" and width // heads % 4:
            yield f"model.positions=rotary needs heads whose width is a multiple of 4, not {width // heads}"
        if model.stem == "conv" and model.patch_size % 2:
            yield f"model.stem=conv needs an even model.patch_size, not {model.patch_size}: its convolutions halve"
        crops = [("views", views.global_size, views.local_size)]
        crops += [
            (f"train.phases[{i}]", phase.global_size, phase.local_size) for i, phase in enumerate(config.train.phases)
        ]
        sizes = {f"{key}.global_size": size for key, size, _ in crops}
        if model.position_size is not None:
            sizes["model.position_size"] = model.position_size
        if views.local_crops:
            sizes |= {f"{key}.local_size": size for key, _, size in crops}
        for key, size in sizes.items():
            below = size - size % model.patch_size
            if 1 <= size < model.patch_size:
                yield f"{key}={size} is smaller than one patch (model.patch_size={model.patch_size})"
            elif size > below >= 1:
                yield (
                    f"{key}={size} is not divisible by model.patch_size={model.patch_size}: "
                    f"use {below} or {below + model.patch_size}"
                )

    def describe(self, spec: ViTSpec) -> dict[str, Any]:
        """What every file had before there were others, learned positions and plain patches, is not mentioned."""
        description = dataclasses.asdict(spec)
        for key in ("positions", "stem"):
            if description[key] == getattr(ViTSpec, key):
                del description[key]
        return description

    def infer(self, tensors: Mapping[str, Tensor], num_heads: int | None, source: str) -> ViTSpec | None:
        """Where nothing tells the number of heads, each is taken for 64 wide if that can be, and that is said."""
        if "patch_embed.proj.weight" not in tensors or "cls_token" not in tensors:
            return None
        if "pos_embed" not in tensors:
            raise UserError(f"{source} has no positions (pos_embed); models with rotary ones, as DINOv3, are not read")
        for name, rank in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("register_tokens", 3)):
            if name in tensors and tensors[name].ndim != rank:
                raise UserError(f"{source}: {name} has {tensors[name].ndim} dimensions, not {rank}")
        width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        blocks = {int(number[1]) for number in map(re.compile(r"blocks\.([0-9]{1,9})\.").match, tensors) if number}
        if not blocks:
            raise UserError(f"{source} has no blocks (blocks.0. …)")
        if absent := 1 + max(blocks) - len(blocks):
            raise UserError(f"{source} has a block {max(blocks)}, but {absent:,} before it are missing")
        num_heads = num_heads or usual_heads(width, source)
        if width % num_heads:
            raise UserError(f"{source}: a width of {width} does not divide into {num_heads} heads")
        entries = tensors["pos_embed"].shape[1]
        side = math.isqrt(max(0, entries - 1))
        if side < 1 or side**2 + 1 != entries:
            raise UserError(f"{source}: its position table of {entries} entries is no square grid")
        registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
        return ViTSpec(
            embed_dim=width,
            depth=1 + max(blocks),
            num_heads=num_heads,
            patch_size=patch,
            image_size=side * patch,
            in_chans=channels,
            ffn="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
            layer_scale=1.0 if "blocks.0.ls1.gamma" in tensors else 0.0,
            registers=registers,
            mask_token="mask_token" in tensors,
            position_interpolation="size" if registers else "offset",
        )
