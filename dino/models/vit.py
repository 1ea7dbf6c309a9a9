"""The Vision Transformer of DINO, DINOv2 and DINOv2 with registers: one class, DINOv2's parameter names and interface.

Crops of several sizes go through in one pass: their tokens are concatenated for every norm, linear layer and MLP, and
only attention runs once per size. Shapes: B images, C channels, N patches, R registers, D width, T tokens of all crops.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dino.models.drop_path import Subset, draw_factors, draw_subsets
from dino.models.hub import HubModel
from dino.models.layers import Block, PatchEmbed
from dino.models.positions import Grid, Interpolation, LearnedPositions, Positions, RotaryPositions
from dino.models.stem import ConvStem
from dino.models.tokens import Group, shortened, unpack

Initialisation = Literal["published", "dinov2", "fan_in"]


@dataclass(frozen=True)
class ViTSpec:
    """Everything that determines a ViT's parameters and function; saved beside its weights.

    `position_interpolation` is how a learned position table is resampled to another grid: `offset` (DINO, DINOv2:
    bicubic by scale factor, grid + 0.1) or `size` (register releases: antialiased bicubic to the exact grid). Weights
    trained with one give other features with the other.
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
    # Not in the text of a spec, of which digests in earlier checkpoints and caches were made.
    positions: Literal["learned", "rotary"] = field(default="learned", repr=False)
    stem: Literal["patch", "conv"] = field(default="patch", repr=False)


class VisionTransformer(HubModel):
    """A ViT as in Dosovitskiy et al. 2021, with DINOv2's options (Oquab et al. 2023; Darcet et al. 2024).

    Args:
        spec: sizes and conventions.
        drop_path: rate of stochastic depth: of each sequence by itself, at the last block, growing linearly from 0 at
            the first; or, with `drop_subset`, of a fixed number of sequences, at every block (see `draw_subsets`).
        initialisation: of random weights. `published`: truncated normal of std 0.02 throughout, as DINO; narrow
            networks then begin with nearly nothing in their residual branches and positions, and short runs do not get
            over it. `dinov2`: the same, with class and register tokens of std 1e-6. `fan_in`: std 1/√inputs in linear
            layers and 0.2 for positions.

    Raises:
        ValueError: sizes that do not divide (image by patch, width by heads, heads' width by 4 if they are to rotate,
            patch by 2 with a convolutional stem).
    """

    has_patches = True

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
        if spec.positions == "rotary" and spec.embed_dim // spec.num_heads % 4:
            raise ValueError(f"heads {spec.embed_dim // spec.num_heads} wide cannot rotate: 4 does not divide that")
        self.spec = spec
        self.embed_dim = self.num_features = width = spec.embed_dim
        self.patch_size, self.depth = spec.patch_size, spec.depth
        self.positions: Positions = RotaryPositions()
        if spec.positions == "learned":
            self.positions = LearnedPositions(spec.image_size // spec.patch_size, spec.position_interpolation)

        stem = ConvStem if spec.stem == "conv" else PatchEmbed
        self.patch_embed = stem(spec.patch_size, spec.in_chans, width)
        self.patch_embed.num_patches = (spec.image_size // spec.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = self.positions.table(width)
        self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, width)) if spec.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if spec.mask_token else None
        self.drop_path, self.drop_subset = drop_path, drop_subset
        self.blocks = nn.ModuleList(
            Block(
                width,
                spec.num_heads,
                mlp_ratio=spec.mlp_ratio,
                ffn=spec.ffn,
                layer_scale=spec.layer_scale,
                positions=self.positions,
            )
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Identity()  # as the hub's models have it, for code that puts a classifier there
        self._initialise(initialisation)

    def _initialise(self, initialisation: Initialisation) -> None:
        by_fan_in = initialisation == "fan_in"
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.2 if by_fan_in else 0.02)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=1e-6 if initialisation == "dinov2" else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 if by_fan_in else 0.02)
                nn.init.zeros_(module.bias)

    @property
    def transformer_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @property
    def title(self) -> str:
        return f"ViT {self.spec.embed_dim}×{self.spec.depth}/{self.spec.patch_size}"

    def encode_crops(
        self, crops: Sequence[Tensor], masks: Tensor | None = None, patches_of: int = 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `Backbone.encode_crops`. Tokens are those after the last norm."""
        if masks is not None:
            masks = F.pad(masks, (0, 0, 0, len(crops[0]) - len(masks)))
        tokens, groups = self._embed(crops, [masks, *[None] * (len(crops) - 1)])
        lengths = [group.length if index < patches_of else 1 for index, group in enumerate(groups)]
        for after_block in self._after_blocks(tokens, groups, lengths):
            tokens = after_block
        outputs = unpack(self.norm(tokens), shortened(groups, lengths))
        patches = [sequences[:, 1 + self.spec.registers :] for sequences in outputs[:patches_of]]
        return [sequences[:, 0] for sequences in outputs], patches

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
        for after_block in self._after_blocks(tokens, groups):
            tokens = after_block
        patches_start, outputs = 1 + self.spec.registers, []
        before, after = unpack(tokens, groups), unpack(self.norm(tokens), groups)
        for raw, normed, mask in zip(before, after, masks, strict=True):
            features = {
                "x_norm_clstoken": normed[:, 0],
                "x_norm_regtokens": normed[:, 1:patches_start],
                "x_norm_patchtokens": normed[:, patches_start:],
                "x_prenorm": raw,
                "masks": mask,
            }
            outputs.append(features)
        return outputs

    def get_intermediate_layers(  # type: ignore[override]
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
            n: the last n blocks, or the indices of blocks, in any order; negative ones count from the end.
            reshape: give patches as (B, D, h, w) instead of (B, N, D).
            return_class_token: give pairs (patches, class token (B, D)).
            norm: apply the last norm.
        """
        if isinstance(n, int):
            asked = list(range(self.depth - n, self.depth)) if 1 <= n <= self.depth else []
        else:
            asked = [int(index) for index in n]  # also those of an array or a tensor
        if not asked or min(asked) < -self.depth or max(asked) >= self.depth:
            raise ValueError(f"asked for blocks {n} of {self.depth}: a number from 1 on, or indices")
        indices = [index % self.depth for index in asked]
        tokens, groups = self._embed([images])
        by_index = {}
        for index, after_block in enumerate(self._after_blocks(tokens, groups)):
            if index in indices:
                by_index[index] = unpack(self.norm(after_block) if norm else after_block, groups)[0]
        outputs = [by_index[index] for index in indices]
        class_tokens = [output[:, 0] for output in outputs]
        patches = [output[:, 1 + self.spec.registers :] for output in outputs]
        if reshape:
            height, _ = groups[0].grid
            patches = [rearrange(tokens, "b (h w) d -> b d h w", h=height) for tokens in patches]
        return tuple(zip(patches, class_tokens, strict=True)) if return_class_token else tuple(patches)

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """How much the class token attends to each patch in the last block.

        Args:
            images: (B, C, H, W).

        Returns:
            (B, heads, h, w); with what the class token and registers get, each head sums to 1.
        """
        attention = self.last_attention(images, queries=1)[:, :, 0, 1 + self.spec.registers :]
        return rearrange(attention, "b m (h w) -> b m h w", h=self._grid(images)[0])

    def last_attention(self, images: Tensor, queries: int | None = None) -> Tensor:
        """(B, heads, queries, 1+R+N): the last block's attention of the first tokens, or of all, over all tokens."""
        tokens, groups = self._embed([images])
        for block in self.blocks[:-1]:
            tokens = block(tokens, groups)
        last = self.transformer_blocks[-1]
        query, key, _ = last.attn.project(last.norm1(tokens), groups)[0]
        return (query[:, :, :queries] @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)

    def _after_blocks(self, tokens: Tensor, groups: list[Group], lengths: list[int] | None = None) -> Iterator[Tensor]:
        """The tokens after each block, (T, D); with `lengths` after the last (T', D): see `Block`."""
        drops: Sequence[Tensor | Subset | None] = [None] * self.depth
        if self.training and self.drop_path:
            draw = draw_subsets if self.drop_subset else draw_factors
            of_last = [group.length for group in groups] if lengths is None else lengths
            drops = draw(groups, of_last, self.drop_path, self.depth, tokens)
        for block, drop in zip(self.blocks[:-1], drops[:-1], strict=True):
            tokens = block(tokens, groups, None, drop)
            yield tokens
        yield self.blocks[-1](tokens, groups, lengths, drops[-1])

    def _embed(
        self, batches: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, list[Group]]:
        """Batches of images as one matrix of tokens (T, D), and how it divides into sequences."""
        masks = masks or [None] * len(batches)
        sequences, groups = [], []
        for images, mask in zip(batches, masks, strict=True):
            tokens = self.prepare_tokens(images, mask)
            sequences.append(tokens.flatten(0, 1))
            groups.append(Group(tokens.shape[0], tokens.shape[1], self._grid(images)))
        return torch.cat(sequences), groups

    def _grid(self, images: Tensor) -> Grid:
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def prepare_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, 1+R+N, D): class token, registers (which have no position), patches."""
        patches = self.patch_embed(images.to(self.cls_token.dtype))  # (B, N, D)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("masks need a model with a mask token (ViTSpec.mask_token)")
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        class_token, patches = self.positions.add(self.pos_embed, self.cls_token, patches, self._grid(images))
        prefix = [class_token] if self.register_tokens is None else [class_token, self.register_tokens]
        batch = images.shape[0]  # not len(images), which ONNX's export would take for a constant
        return torch.cat([*(tokens.expand(batch, -1, -1) for tokens in prefix), patches], dim=1)
