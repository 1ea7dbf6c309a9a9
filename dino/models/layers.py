"""The parts of a Vision Transformer, on packed tokens: all sequences of all crop sizes in one (T, D) matrix."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino.models.attention import Attention
from dino.models.drop_path import Subset
from dino.models.linear import Gate, Linear, chain
from dino.models.positions import Positions
from dino.models.tokens import Group, shorten


class PatchEmbed(nn.Module):
    """Patches to tokens: the published convolution's weights, applied as one matrix product."""

    num_patches: int  # of an image of the size that the model is for

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
        self, width: int, num_heads: int, *, mlp_ratio: float, ffn: str, layer_scale: float, positions: Positions
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, positions)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (SwiGLU if ffn == "swiglu" else MLP)(width, mlp_ratio)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.activation_checkpointing = False

    def forward(
        self,
        tokens: Tensor,
        groups: list[Group],
        lengths: list[int] | None = None,
        drop: Tensor | Subset | None = None,
    ) -> Tensor:
        """(T, D) to (T, D), or where `lengths` are given to (T', D).

        Args:
            lengths: only the first `lengths[i]` tokens of each sequence of group i, exactly as they would be without.
                For the last block: where class tokens are asked for, patches need no more than their keys and values.
            drop: which sequences lose which branch: of `dino.models.drop_path`.
        """
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Nothing in it is random: what is dropped has been drawn.
            return checkpoint(
                self._compute, tokens, groups, lengths, drop, use_reentrant=False, preserve_rng_state=False
            )
        return self._compute(tokens, groups, lengths, drop)

    def _compute(
        self, tokens: Tensor, groups: list[Group], lengths: list[int] | None, drop: Tensor | Subset | None
    ) -> Tensor:
        if isinstance(drop, Subset):
            return self._with_subset(tokens, groups, lengths, drop)
        return self._with_factors(tokens, groups, lengths, drop)

    def _with_factors(
        self, tokens: Tensor, groups: list[Group], lengths: list[int] | None, factors: Tensor | None
    ) -> Tensor:
        """Each token's branches multiplied by its own factors, (2, T', 1)."""
        attended = self.ls1(self.attn(tokens, groups, lengths, self.norm1))
        if lengths is not None:
            tokens, groups = shorten(tokens, groups, lengths)
        tokens = tokens + (attended if factors is None else attended * factors[0])
        fed = self.ls2(self.mlp(tokens, self.norm2))
        return tokens + (fed if factors is None else fed * factors[1])

    def _with_subset(self, tokens: Tensor, groups: list[Group], lengths: list[int] | None, subset: Subset) -> Tensor:
        """Branches computed for chosen sequences only, and scaled up for them."""
        inputs = tokens.index_select(0, subset.inputs[0])
        attended = self.ls1(self.attn(inputs, subset.groups, lengths, self.norm1))
        if lengths is not None:
            tokens, groups = shorten(tokens, groups, lengths)
        tokens = tokens.index_add(0, subset.outputs[0], (attended * subset.scales).to(tokens.dtype))
        fed = self.ls2(self.mlp(tokens.index_select(0, subset.outputs[1]), self.norm2))
        return tokens.index_add(0, subset.outputs[1], (fed * subset.scales).to(tokens.dtype))


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = Linear(width, int(width * ratio))
        self.act = nn.GELU()
        self.fc2 = Linear(int(width * ratio), width)

    def forward(self, tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(T, D) to (T, D), of the normed tokens."""
        return chain(self.act, self.fc2, self.fc1(tokens) if norm is None else chain(norm, self.fc1, tokens))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020) of DINOv2's giant: two thirds of the MLP's width, rounded up to a multiple of 8."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
        self.w12 = Linear(width, 2 * hidden)
        self.gate = Gate()
        self.w3 = Linear(hidden, width)

    def forward(self, tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(T, D) to (T, D), of the normed tokens."""
        return chain(self.gate, self.w3, self.w12(tokens) if norm is None else chain(norm, self.w12, tokens))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma
