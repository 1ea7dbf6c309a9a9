"""The Vision Transformer of DINO, DINOv2 and DINOv2 with registers: one class, DINOv2's parameter names and interface.

Crops of several sizes go through in one pass: their tokens are concatenated for every norm, linear layer and MLP, and
only attention runs once per size. Shapes: B images, C channels, N patches, R registers, D width, T tokens of all crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dino.models.layers import Block, Group, Interpolation, PatchEmbed, interpolate_positions, unpack
from dino.models.preprocess import Preprocess

Initialisation = Literal["published", "fan_in"]


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


@dataclass(frozen=True)
class ViTSpec:
    """Everything that determines a ViT's parameters and function; saved beside its weights.

    `position_interpolation` is how the position table is resampled to another grid: `offset` (DINO, DINOv2: bicubic by
    scale factor, grid + 0.1) or `size` (register releases: antialiased bicubic to the exact grid). Weights trained with
    one give other features with the other.
    """

    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 16
    image_size: int = 224
    in_chans: int = 3
    mlp_ratio: float = 4.0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layer_scale: float = 0.0
    registers: int = 0
    mask_token: bool = False
    position_interpolation: Interpolation = "size"


class VisionTransformer(nn.Module):
    """A ViT as in Dosovitskiy et al. 2021, with DINOv2's options (Oquab et al. 2023; Darcet et al. 2024).

    Args:
        spec: sizes and conventions.
        drop_path: rate of stochastic depth: of each sequence by itself, at the last block, growing linearly from 0 at
            the first; or, with `drop_subset`, of a fixed number of sequences, at every block (see `DropPath`).
        initialisation: of random weights. `published`: truncated normal of std 0.02 throughout, as DINO; narrow
            networks then begin with nearly nothing in their residual branches and positions, and short runs do not get
            over it. `fan_in`: std 1/√inputs in linear layers and 0.2 for positions.

    Raises:
        ValueError: sizes that do not divide (image by patch, width by heads).
    """

    preprocess: Preprocess  # these two are set by load_backbone
    description: dict[str, Any]

    def __init__(
        self,
        spec: ViTSpec,
        drop_path: float = 0.0,
        initialisation: Initialisation = "published",
        drop_subset: bool = False,
    ):
        super().__init__()
        if spec.image_size % spec.patch_size:
            raise ValueError(f"image_size {spec.image_size} is not divisible by patch_size {spec.patch_size}")
        if spec.embed_dim % spec.num_heads:
            raise ValueError(f"embed_dim {spec.embed_dim} is not divisible by num_heads {spec.num_heads}")
        self.spec = spec
        self.embed_dim = self.num_features = spec.embed_dim
        self.patch_size = spec.patch_size
        side, width = spec.image_size // spec.patch_size, spec.embed_dim

        self.patch_embed = PatchEmbed(spec.patch_size, spec.in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, width)) if spec.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if spec.mask_token else None
        rates = torch.linspace(0, drop_path, spec.depth, device="cpu").tolist()
        if drop_subset:
            rates = [drop_path] * spec.depth
        self.blocks = nn.ModuleList(
            Block(width, spec.num_heads, spec.mlp_ratio, spec.ffn, spec.layer_scale, rate, drop_subset)
            for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._initialise(initialisation)

    def _initialise(self, initialisation: Initialisation) -> None:
        by_fan_in = initialisation == "fan_in"
        nn.init.trunc_normal_(self.pos_embed, std=0.2 if by_fan_in else 0.02)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 if by_fan_in else 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Class tokens after the last norm.

        Args:
            images: (B, C, H, W), or a list of such batches, of any sizes, which then share one pass.

        Returns:
            (B, D), or a list of them in the order given.
        """
        tokens, groups = self._embed([images] if isinstance(images, Tensor) else images)
        class_only = [Group(group.batch, 1) for group in groups]
        outputs = [sequences[:, 0] for sequences in unpack(self._encode(tokens, groups, class_only), class_only)]
        return outputs[0] if isinstance(images, Tensor) else outputs

    def with_patches(self, crops: Sequence[Tensor], hidden: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Class tokens of all crops, and patch tokens of those of the first size, after the last norm.

        Args:
            crops: (B_i, C, H_i, W_i), one batch for each size.
            hidden: (B', N) bool, true where a patch of the first B' crops is replaced by the mask token.

        Returns:
            Class tokens (B_i, D) of each size; patches (B_0, N, D).
        """
        if hidden is not None:
            hidden = F.pad(hidden, (0, 0, 0, len(crops[0]) - len(hidden)))
        tokens, groups = self._embed(crops, [hidden, *[None] * (len(crops) - 1)])
        wanted = [groups[0], *(Group(group.batch, 1) for group in groups[1:])]
        outputs = unpack(self._encode(tokens, groups, wanted), wanted)
        return [sequences[:, 0] for sequences in outputs], outputs[0][:, 1 + self.spec.registers :]

    def _encode(self, tokens: Tensor, groups: list[Group], wanted: list[Group]) -> Tensor:
        """All blocks and the norm, (T, D) to (T', D).

        Where only class tokens are wanted, the last block does not compute the rest: exact, not an approximation.
        """
        for block in self.blocks[:-1]:
            tokens = block(tokens, groups)
        return self.norm(self.blocks[-1](tokens, groups, wanted))

    def forward_features(self, images: Tensor | Sequence[Tensor], masks: Any = None) -> Any:
        """Every token after the last norm, under the names of DINOv2's hub models.

        Args:
            images: (B, C, H, W) or a list of such batches.
            masks: (B, N) bool, true where a patch is replaced by the mask token; a list of them (or None) for a list.

        Returns:
            `x_norm_clstoken` (B, D), `x_norm_regtokens` (B, R, D), `x_norm_patchtokens` (B, N, D), `x_prenorm`
            (B, 1+R+N, D) and `masks`; a list of such dictionaries for a list.
        """
        if isinstance(images, Tensor):
            return self.forward_features([images], [masks])[0]
        masks = [None] * len(images) if masks is None else masks
        tokens, groups = self._embed(images, masks)
        for block in self.blocks:
            tokens = block(tokens, groups)
        after = unpack(self.norm(tokens), groups)
        return [self._named(*three) for three in zip(unpack(tokens, groups), after, masks, strict=True)]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after chosen blocks, as DINOv2's hub models give them.

        Args:
            images: (B, C, H, W).
            n: the last n blocks, or the indices of blocks.
            reshape: give patches as (B, D, h, w) instead of (B, N, D).
            return_class_token: give pairs (patches, class token (B, D)).
            norm: apply the last norm.
        """
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        tokens, groups = self._embed([images])
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, groups)
            if index in wanted:
                outputs.append(unpack(self.norm(tokens) if norm else tokens, groups)[0])
        if len(outputs) != len(wanted):
            raise ValueError(f"asked for blocks {list(wanted)} of {len(self.blocks)}")
        class_tokens = [output[:, 0] for output in outputs]
        patches = [output[:, 1 + self.spec.registers :] for output in outputs]
        if reshape:
            height = images.shape[2] // self.patch_size
            patches = [rearrange(tokens, "b (h w) d -> b d h w", h=height) for tokens in patches]
        return tuple(zip(patches, class_tokens, strict=True)) if return_class_token else tuple(patches)

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """How much the class token attends to each patch in the last block.

        Args:
            images: (B, C, H, W).

        Returns:
            (B, heads, h, w); with the class token's and registers' share, each head sums to 1.
        """
        tokens, groups = self._embed([images])
        for block in self.blocks[:-1]:
            tokens = block(tokens, groups)
        last = cast(Block, self.blocks[-1])
        query, key, _ = last.attn.heads(last.attn.qkv(last.norm1(tokens)), groups[0])
        scores = query[:, :, :1] @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, heads, 1, 1+R+N)
        attention = scores.softmax(dim=-1)[:, :, 0, 1 + self.spec.registers :]
        return rearrange(attention, "b m (h w) -> b m h w", h=images.shape[2] // self.patch_size)

    def _embed(
        self, batches: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, list[Group]]:
        """Batches of images as one matrix of tokens (T, D), and how it divides into sequences."""
        masks = masks or [None] * len(batches)
        sequences = [self.prepare_tokens(images, mask) for images, mask in zip(batches, masks, strict=True)]
        groups = [Group(*sequence.shape[:2]) for sequence in sequences]
        return torch.cat([sequence.flatten(0, 1) for sequence in sequences]), groups

    def prepare_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, 1+R+N, D): class token, registers (which have no position), patches."""
        batch, grid = images.shape[0], (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        patches = self.patch_embed(images)  # (B, N, D)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("masks need a model with a mask token (ViTSpec.mask_token)")
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        positions = interpolate_positions(self.pos_embed, grid, self.spec.position_interpolation)
        class_token = (self.cls_token + positions[:, :1]).expand(batch, -1, -1)
        registers = [] if self.register_tokens is None else [self.register_tokens.expand(batch, -1, -1)]
        return torch.cat([class_token, *registers, patches + positions[:, 1:]], dim=1)

    def _named(self, before: Tensor, after: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
        patches_start = 1 + self.spec.registers
        return {
            "x_norm_clstoken": after[:, 0],
            "x_norm_regtokens": after[:, 1:patches_start],
            "x_norm_patchtokens": after[:, patches_start:],
            "x_prenorm": before,
            "masks": mask,
        }
