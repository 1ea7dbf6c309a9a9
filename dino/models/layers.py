"""The parts of a Vision Transformer, on packed tokens: all sequences of all crop sizes in one (T, D) matrix."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino.models.positions import Grid, Positions


class Group(NamedTuple):
    """A run of equally long sequences in a packed (T, D) matrix.

    Attributes:
        batch: number of sequences.
        length: tokens of each.
        grid: rows and columns of the patches, which are a sequence's last tokens.
    """

    batch: int
    length: int
    grid: Grid


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
        p = self.patch_size
        check_images(images, p, self.proj.in_channels)
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


def check_images(images: Tensor, patch_size: int, in_chans: int) -> None:
    """Raise a ValueError if images cannot be cut into patches, or have other channels."""
    _, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}×{width} cannot be cut into patches of {patch_size}")
    if channels != in_chans:
        raise ValueError(f"images have {channels} channels, the model takes {in_chans}")


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth, on packed tokens (T, D).

    Attributes:
        activation_checkpointing: keep only the input for the backward pass, and compute the rest again.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        ffn: str,
        layer_scale: float,
        drop_path: float,
        positions: Positions,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, positions)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (SwiGLU if ffn == "swiglu" else MLP)(width, mlp_ratio)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.activation_checkpointing = False

    def forward(self, tokens: Tensor, groups: list[Group], lengths: list[int] | None = None) -> Tensor:
        """(T, D) to (T, D), or where `lengths` are given to (T', D): see `first_tokens`."""
        # Both ways lead through here, because sharding and compilation act on a module's call.
        arguments = (tokens, groups) if lengths is None else (tokens, groups, lengths)
        compute = self.all_tokens if lengths is None else self.first_tokens
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(compute, *arguments, use_reentrant=False)
        return compute(*arguments)

    def all_tokens(self, tokens: Tensor, groups: list[Group]) -> Tensor:
        """(T, D) to (T, D)."""
        tokens = tokens + self.drop_path(self.ls1(self.attn(self.norm1(tokens), groups)), groups)
        return tokens + self.drop_path(self.ls2(self.mlp(self.norm2(tokens))), groups)

    def first_tokens(self, tokens: Tensor, groups: list[Group], lengths: list[int]) -> Tensor:
        """(T, D) to (T', D): the first `lengths[i]` tokens of each sequence of group i, exactly as in `all_tokens`.

        For the last block: where only class tokens are asked for, patches need no more than their keys and values.
        """
        attended = self.ls1(self.attn(self.norm1(tokens), groups, lengths))
        tokens, groups = shorten(tokens, groups, lengths)
        tokens = tokens + self.drop_path(attended, groups)
        return tokens + self.drop_path(self.ls2(self.mlp(self.norm2(tokens))), groups)


class SubsetBlock(Block):
    """A block with DINOv2's stochastic depth (Oquab et al. 2023, §5).

    In training each branch is computed for a fixed number of random sequences of each group only, and scaled up for
    them: what is dropped costs nothing.
    """

    def all_tokens(self, tokens: Tensor, groups: list[Group]) -> Tensor:
        """(T, D) to (T, D)."""
        return self.first_tokens(tokens, groups, [group.length for group in groups])

    def first_tokens(self, tokens: Tensor, groups: list[Group], lengths: list[int]) -> Tensor:
        """(T, D) to (T', D): the first `lengths[i]` tokens of each sequence of group i."""
        if not self.training or self.drop_path.rate == 0:
            return super().first_tokens(tokens, groups, lengths)
        subset = draw_subset(groups, self.drop_path.rate, tokens.device)
        inputs = tokens[rows_of(groups, subset)]
        attended = self.ls1(self.attn(self.norm1(inputs), groups_of(groups, subset), lengths))
        tokens, groups = shorten(tokens, groups, lengths)
        tokens = add_to_subset(tokens, attended, groups, subset)
        return self._feed_forward(tokens, groups)

    def _feed_forward(self, tokens: Tensor, groups: list[Group]) -> Tensor:
        subset = draw_subset(groups, self.drop_path.rate, tokens.device)
        inputs = tokens[rows_of(groups, subset)]
        return add_to_subset(tokens, self.ls2(self.mlp(self.norm2(inputs))), groups, subset)


class Attention(nn.Module):
    """Multi-head self-attention inside each sequence of a packed matrix, by `scaled_dot_product_attention`."""

    def __init__(self, width: int, num_heads: int, positions: Positions):
        super().__init__()
        self.num_heads, self.positions = num_heads, positions
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, groups: list[Group], lengths: list[int] | None = None) -> Tensor:
        """(T, D) to (T, D); with `lengths` to (T', D): of each group's sequences, only the first tokens ask."""
        lengths = lengths or [group.length for group in groups]
        outputs = []
        for (query, key, value), length in zip(self.project(tokens, groups), lengths, strict=True):
            attended = attend(query[:, :, :length], key, value)
            outputs.append(rearrange(attended, "b m n d -> (b n) (m d)"))
        return self.proj(torch.cat(outputs))

    def project(self, tokens: Tensor, groups: list[Group]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(T, D) to query, key and value of each group, each (batch, heads, length, D / heads)."""
        projected = []
        packed = self.qkv(tokens).split([group.batch * group.length for group in groups])
        for qkv, group in zip(packed, groups, strict=True):
            query, key, value = rearrange(qkv, "(b n) (s m d) -> s b m n d", b=group.batch, s=3, m=self.num_heads)
            query, key = self.positions.rotate(query, key, group.grid)
            projected.append((query, key, value))
        return projected


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


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, random sequences lose a residual branch; others are scaled up.

    Args:
        rate: probability of losing it, of each sequence by itself.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, groups: list[Group]) -> Tensor:
        """(T, D) to (T, D)."""
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        factors = []
        for group in groups:
            survives = torch.empty(group.batch, device=branch.device).bernoulli_(keep)
            factors.append(survives.repeat_interleave(group.length))
        # In fp32, as the residual stream is under autocast, unless the model itself was converted to another type.
        scaled = branch * (torch.cat(factors) / keep)[:, None]
        return scaled if torch.is_autocast_enabled(branch.device.type) else scaled.to(branch.dtype)


def draw_subset(groups: list[Group], rate: float, device: torch.device) -> list[Tensor]:
    """The numbers of random sequences of each group: its batch but for `rate` of it, and at least one."""
    subset = []
    for group in groups:
        count = max(1, int(group.batch * (1 - rate)))
        subset.append(torch.randperm(group.batch, device=device)[:count])
    return subset


def groups_of(groups: list[Group], subset: list[Tensor]) -> list[Group]:
    """The groups that the sequences of a subset make."""
    return [group._replace(batch=len(numbers)) for group, numbers in zip(groups, subset, strict=True)]


def rows_of(groups: list[Group], subset: list[Tensor]) -> Tensor:
    """Where the tokens of a subset's sequences are in the packed matrix of `groups`."""
    rows, start = [], 0
    for group, numbers in zip(groups, subset, strict=True):
        within = torch.arange(group.length, device=numbers.device)
        rows.append((start + numbers[:, None] * group.length + within).flatten())
        start += group.batch * group.length
    return torch.cat(rows)


def add_to_subset(tokens: Tensor, branch: Tensor, groups: list[Group], subset: list[Tensor]) -> Tensor:
    """tokens (T, D) plus, for the sequences of a subset, their `branch`, scaled up by how few of the group they are."""
    factors = []
    for group, numbers in zip(groups, subset, strict=True):
        factors.append(branch.new_full((len(numbers) * group.length, 1), group.batch / len(numbers)))
    scaled = branch * torch.cat(factors)
    return tokens.index_add(0, rows_of(groups, subset), scaled.to(tokens.dtype))


def shorten(tokens: Tensor, groups: list[Group], lengths: list[int]) -> tuple[Tensor, list[Group]]:
    """(T, D) to (T', D), the first `lengths[i]` tokens of each sequence of group i; and the groups that they make."""
    shorter, first = [group._replace(length=length) for group, length in zip(groups, lengths, strict=True)], []
    if shorter == groups:
        return tokens, groups
    for sequences, length in zip(unpack(tokens, groups), lengths, strict=True):
        first.append(sequences[:, :length].flatten(0, 1))
    return torch.cat(first), shorter


def unpack(tokens: Tensor, groups: list[Group]) -> list[Tensor]:
    """(T, D) to one (batch, length, D) per group."""
    parts = tokens.split([group.batch * group.length for group in groups])
    return [part.unflatten(0, (group.batch, group.length)) for part, group in zip(parts, groups, strict=True)]
