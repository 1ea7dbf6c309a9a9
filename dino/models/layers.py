"""The parts of a Vision Transformer, on packed tokens: all sequences of all crop sizes in one (T, D) matrix."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Interpolation = Literal["offset", "size"]


class Group(NamedTuple):
    """A run of equally long sequences in a packed (T, D) matrix: `batch` sequences of `length` tokens."""

    batch: int
    length: int


class PatchEmbed(nn.Module):
    """Patches to tokens: the published convolution's weights, applied as one matrix product."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D).

        Raises:
            ValueError: height or width is not a multiple of the patch size, or the channels differ.
        """
        _, channels, height, width = images.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height}×{width} cannot be cut into patches of {self.patch_size}")
        if channels != self.proj.in_channels:
            raise ValueError(f"images have {channels} channels, the model takes {self.proj.in_channels}")
        p = self.patch_size
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth, on packed tokens (T, D)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        ffn: str,
        layer_scale: float,
        drop_path: float,
        drop_subset: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (SwiGLU if ffn == "swiglu" else MLP)(width, mlp_ratio)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path, drop_subset)
        self.recompute = False  # keep only the input for the backward pass (activation checkpointing)

    def forward(self, tokens: Tensor, groups: list[Group], shortened: list[Group] | None = None) -> Tensor:
        """(T, D) to (T, D).

        Args:
            shortened: the groups to give; those that are one token long here are given by their class tokens alone,
                and nothing is computed for the others. None: all tokens.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._both, tokens, groups, shortened or groups, use_reentrant=False)
        return self._both(tokens, groups, shortened or groups)

    def _both(self, tokens: Tensor, groups: list[Group], wanted: list[Group]) -> Tensor:
        def attend(tokens: Tensor, groups: list[Group]) -> Tensor:
            return self.ls1(self.attn(self.norm1(tokens), groups, [group.length for group in wanted]))

        def feed_forward(tokens: Tensor, groups: list[Group]) -> Tensor:
            return self.ls2(self.mlp(self.norm2(tokens)))

        tokens = self.drop_path(tokens, groups, attend, wanted)
        return self.drop_path(tokens, wanted, feed_forward, wanted)


class Attention(nn.Module):
    """Multi-head self-attention inside each sequence of a packed matrix, by `scaled_dot_product_attention`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, groups: list[Group], asking: list[int]) -> Tensor:
        """(T, D) to (T', D): of each group's sequences, only the first `asking` tokens ask, and are given."""
        packed = self.qkv(tokens).split([group.batch * group.length for group in groups])
        outputs = []
        for qkv, group, count in zip(packed, groups, asking, strict=True):
            query, key, value = self.heads(qkv, group)
            attended = attend(query[:, :, :count], key, value)
            outputs.append(rearrange(attended, "b m n d -> (b n) (m d)"))
        return self.proj(torch.cat(outputs))

    def heads(self, qkv: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """(batch·length, 3D) to query, key and value, each (batch, heads, length, D / heads)."""
        query, key, value = rearrange(qkv, "(b n) (s m d) -> s b m n d", b=group.batch, s=3, m=self.num_heads)
        return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v of (B, heads, length, d); on CPU in fp32, where bf16's backward pass is 8 times slower."""
    if query.device.type != "cpu" or query.dtype in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020) of DINOv2's giant: two thirds of the MLP's width, rounded up to a multiple of 8."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


Branch = Callable[[Tensor, list[Group]], Tensor]


class DropPath(nn.Module):
    """A residual branch with stochastic depth (Huang et al. 2016): in training, whole sequences go without it.

    Args:
        rate: share of the sequences that do.
        subset: how they are drawn. Each by itself, as DINO does; or, as DINOv2 does (Oquab et al. 2023, §5), a fixed
            number of each group, so that the branch need not be computed for them.
    """

    def __init__(self, rate: float, subset: bool = False):
        super().__init__()
        self.rate, self.subset = rate, subset

    def forward(self, tokens: Tensor, groups: list[Group], branch: Branch, wanted: list[Group]) -> Tensor:
        """tokens + branch(tokens), (T, D) to (T', D); what the branch makes of others is scaled up for those without.

        Args:
            wanted: groups of the result, of as many sequences as `groups`, each as long or cut to its first tokens.
        """
        base = cut(tokens, groups, wanted)
        if not self.training or self.rate == 0:
            return base + branch(tokens, groups)
        if not self.subset:
            keep = 1 - self.rate
            kept = [tokens.new_empty(group.batch).bernoulli_(keep).repeat_interleave(group.length) for group in wanted]
            return base + branch(tokens, groups) * (torch.cat(kept) / keep)[:, None]
        counts = [max(1, int(group.batch * (1 - self.rate))) for group in groups]
        chosen = [
            torch.randperm(group.batch, device=tokens.device)[:count]
            for group, count in zip(groups, counts, strict=True)
        ]
        parts = [Group(count, group.length) for group, count in zip(groups, counts, strict=True)]
        output = branch(tokens[rows_of(groups, chosen)], parts)
        factors = [
            output.new_full((count * group.length, 1), group.batch / count)
            for group, count in zip(wanted, counts, strict=True)
        ]
        return base.index_add(0, rows_of(wanted, chosen), (output * torch.cat(factors)).to(base.dtype))


def rows_of(groups: list[Group], chosen: list[Tensor]) -> Tensor:
    """Where the tokens of chosen sequences are in a packed matrix; `chosen` has their numbers, group by group."""
    rows, start = [], 0
    for group, numbers in zip(groups, chosen, strict=True):
        within = torch.arange(group.length, device=numbers.device)
        rows.append((start + numbers[:, None] * group.length + within).flatten())
        start += group.batch * group.length
    return torch.cat(rows)


def cut(tokens: Tensor, groups: list[Group], wanted: list[Group]) -> Tensor:
    """(T, D) to (T', D): every sequence's first tokens, as many as `wanted` has."""
    if wanted == groups:
        return tokens
    return torch.cat(
        [
            sequences[:, : group.length].flatten(0, 1)
            for sequences, group in zip(unpack(tokens, groups), wanted, strict=True)
        ]
    )


def unpack(tokens: Tensor, groups: list[Group]) -> list[Tensor]:
    """(T, D) to one (batch, length, D) per group."""
    parts = tokens.split([group.batch * group.length for group in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


def interpolate_positions(table: Tensor, grid: tuple[int, int], convention: Interpolation) -> Tensor:
    """Resample a square position table to another grid of patches, in fp32.

    Args:
        table: (1, 1+M², D), the class token's position first.
        grid: rows and columns of patches.
        convention: `offset` multiplies by (grid + 0.1) / M without antialiasing, which is what DINO's and DINOv2's
            plain releases were used with; `size` asks for the exact grid with antialiasing, as the register releases.

    Returns:
        (1, 1+rows·columns, D), `table` itself if the grid is its own.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    positions = rearrange(table[:, 1:].float(), "b (h w) d -> b d h w", h=side)
    if convention == "offset":
        factors = [(cells + 0.1) / side for cells in grid]
        positions = F.interpolate(positions, scale_factor=factors, mode="bicubic")
    else:
        positions = F.interpolate(positions, size=grid, mode="bicubic", antialias=True)
    if positions.shape[-2:] != grid:
        raise ValueError(f"positions came out as {tuple(positions.shape[-2:])}, not {grid}")
    positions = rearrange(positions, "b d h w -> b (h w) d").to(table.dtype)
    return torch.cat([table[:, :1], positions], dim=1)
