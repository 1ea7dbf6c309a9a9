"""Multi-head self-attention inside each sequence of a packed matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino.models.linear import Linear, chain
from dino.models.positions import Positions
from dino.models.tokens import Group, shortened, unpack
from dino.precision import prefers_bf16


class Attention(nn.Module):
    """Queries, keys and values of packed tokens, `scaled_dot_product_attention` per group, and a projection."""

    def __init__(self, width: int, num_heads: int, positions: Positions):
        super().__init__()
        self.num_heads, self.positions = num_heads, positions
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self, tokens: Tensor, groups: list[Group], lengths: list[int] | None = None, norm: nn.Module | None = None
    ) -> Tensor:
        """(T, D) to (T, D); with `lengths` to (T', D): of each group's sequences, only the first tokens ask.

        Args:
            norm: of the tokens, before all else.
        """
        lengths = lengths or [group.length for group in groups]
        qkv = self.qkv(tokens) if norm is None else chain(norm, self.qkv, tokens)
        on_cpu = qkv.device.type == "cpu" and self.training and not torch.compiler.is_compiling()
        if on_cpu and not self.positions.rotates:
            return self.proj(_PackedAttention.apply(qkv, groups, lengths, self.num_heads))
        outputs = []
        for (query, key, value), length in zip(self._divide(qkv, groups), lengths, strict=True):
            attended = attend(query[:, :, :length], key, value)
            outputs.append(rearrange(attended, "b m n d -> (b n) (m d)"))
        return self.proj(torch.cat(outputs))

    def project(self, tokens: Tensor, groups: list[Group]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(T, D) to query, key and value of each group, each (batch, heads, length, D / heads)."""
        return self._divide(self.qkv(tokens), groups)

    def _divide(self, qkv: Tensor, groups: list[Group]) -> list[tuple[Tensor, Tensor, Tensor]]:
        projected = []
        for (query, key, value), group in zip(divide(qkv, groups, self.num_heads), groups, strict=True):
            query, key = self.positions.rotate(query, key, group.grid)
            projected.append((query, key, value))
        return projected


def divide(qkv: Tensor, groups: list[Group], heads: int) -> list[Tensor]:
    """(T, 3 D) to one (3, batch, heads, length, D / heads) per group, in the same memory."""
    return [part.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4) for part in unpack(qkv, groups)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v of (B, heads, length, d); on CPU in fp32, where bf16's backward pass is 8 times slower."""
    if query.device.type != "cpu" or query.dtype in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)


class _PackedAttention(torch.autograd.Function):
    """`attend` on a CPU, for all groups at once: keeps queries, keys, values and outputs in their own precision.

    torch's own way would keep fp32 copies of them all under bf16, and the outputs twice. A CPU with units for bf16
    multiplies in it, and takes the softmax in fp32; others compute all of it in fp32.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: list[Group], lengths: list[int], heads: int) -> Tensor:
        """(T, 3 D) to (T', D)."""
        outputs, sums = [], []
        ctx.narrow = qkv.dtype == torch.bfloat16 and prefers_bf16(qkv.device)
        ctx.groups, ctx.lengths, ctx.heads = groups, lengths, heads
        working = qkv if ctx.narrow else _widened(qkv)
        for (query, key, value), length in zip(divide(working, groups, heads), lengths, strict=True):
            query = query[:, :, :length]
            if ctx.narrow:
                attended = _softmax_of_products(query, key).to(qkv.dtype) @ value
            else:
                attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
                sums.append(log_sums)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        packed = torch.cat(outputs).to(qkv.dtype)
        ctx.save_for_backward(qkv, packed, *sums)
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, packed, *sums = ctx.saved_tensors
        working = [tensor if ctx.narrow else _widened(tensor) for tensor in (qkv, packed, gradient)]
        asking = shortened(ctx.groups, ctx.lengths)
        outputs, gradients = (
            [part.unflatten(2, (ctx.heads, -1)).transpose(1, 2) for part in unpack(tensor, asking)]
            for tensor in working[1:]
        )
        of_groups = []
        for index, (query, key, value) in enumerate(divide(working[0], ctx.groups, ctx.heads)):
            tensors = gradients[index], query[:, :, : ctx.lengths[index]], key, value, outputs[index]
            if ctx.narrow:
                of_query, of_key, of_value = _narrow_gradients(*tensors)
            else:
                of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *tensors, sums[index], 0.0, False
                )
            unasked = ctx.groups[index].length - ctx.lengths[index]
            of_query = F.pad(of_query, (0, 0, 0, unasked)) if unasked else of_query
            by_token = [part.transpose(1, 2).flatten(2) for part in (of_query, of_key, of_value)]
            of_groups.append(torch.cat(by_token, dim=-1).flatten(0, 1))
        return torch.cat(of_groups).to(qkv.dtype), None, None, None


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _softmax_of_products(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d) in fp32."""
    return ((query @ key.mT).float() * query.shape[-1] ** -0.5).softmax(dim=-1)


def _narrow_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query, key and value (Dao et al. 2022, appendix B.2), by products in their own precision."""
    weights = _softmax_of_products(query, key)
    of_value = weights.to(value.dtype).mT @ gradient
    own = (gradient.float() * output.float()).sum(dim=-1, keepdim=True)
    of_products = (weights * ((gradient @ value.mT).float() - own) * query.shape[-1] ** -0.5).to(query.dtype)
    return of_products @ key, of_products.mT @ query, of_value
