"""Linear layers that keep little for the backward pass, and read their weights in half precision from one copy.

What a norm or an activation gives to a linear layer is as large as what it was given. In training only the latter is
kept; the backward pass computes the former again, which takes next to no time. torch.compile does so by itself: what it
traces is the plain statement, as is everything outside training.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear` on packed tokens; parameters are its own."""

    # Of weight and bias in another precision, and of which version of them. Not a buffer: no part of the state.
    copies: tuple[Tensor, Tensor, tuple[int, ...]] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """(T, D) to (T, D')."""
        if not self.training or inputs.ndim != 2 or torch.compiler.is_compiling():
            return F.linear(inputs, self.weight, self.bias)
        return _Chain.apply(None, inputs, None, None, self, self.weight, self.bias)

    def version(self) -> tuple[int, ...]:
        """Another one whenever the parameters have been changed or replaced."""
        weight, bias = self.weight, self.bias
        return weight._version, bias._version, weight.data_ptr(), bias.data_ptr()

    def in_precision(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in a precision: the parameters themselves, copies made by `copy_weights`, or new ones."""
        if self.copies is not None and self.copies[0].dtype == dtype and self.copies[2] == self.version():
            return self.copies[:2]
        return self.weight.to(dtype), self.bias.to(dtype)


class Gate(nn.Module):
    """silu(gate) · value of (T, 2 D): the activation of SwiGLU (Shazeer 2020)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(T, 2 D) to (T, D)."""
        gate, value = inputs.chunk(2, dim=-1)
        return F.silu(gate) * value


def chain(before: nn.Module, linear: nn.Module, inputs: Tensor) -> Tensor:
    """linear(before(inputs)) of (T, D), keeping only `inputs` for the backward pass.

    Args:
        before: LayerNorm, exact GELU or `Gate`. Another module, another kind of linear layer (an adapter), and what has
            hooks, is called as it is.
    """
    known = type(before) in (nn.LayerNorm, nn.GELU, Gate) and type(linear) is Linear
    if not known or not linear.training or inputs.ndim != 2 or torch.compiler.is_compiling():
        return linear(before(inputs))
    if any(getattr(module, hooks) for module in (before, linear) for hooks in HOOKS):
        return linear(before(inputs))
    gain, shift = (before.weight, before.bias) if isinstance(before, nn.LayerNorm) else (None, None)
    return _Chain.apply(before, inputs, gain, shift, linear, linear.weight, linear.bias)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Chain(torch.autograd.Function):
    """linear(before(inputs)); gradients are those of the plain statement, bias gradients summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        before: nn.Module | None,
        inputs: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        linear: Linear,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        device = inputs.device.type
        ctx.before, ctx.inputs_dtype, dtype = before, inputs.dtype, weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            if gain is not None:  # as autocast has it on GPUs
                inputs, gain, shift = inputs.float(), gain.float(), shift.float()  # type: ignore[union-attr]
        result, *statistics = _result(before, inputs, gain, shift)
        result = result.to(dtype)
        narrow, narrow_bias = linear.in_precision(dtype)
        # A copy is not made ready for the backward pass, where it holds what it held: of `weight` torch knows.
        ctx.copy = narrow if linear.copies is not None and narrow is linear.copies[0] else None
        ctx.save_for_backward(result if before is None else inputs, gain, shift, weight, *statistics)
        return F.linear(result, narrow, narrow_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gain, shift, weight, *statistics = ctx.saved_tensors
        _, of_inputs, of_gain, of_shift, _, of_weight, of_bias = ctx.needs_input_grad
        weight_gradient = bias_gradient = None
        if of_weight:
            result = _result(ctx.before, inputs, gain, shift)[0].to(gradient.dtype)
            weight_gradient = gradient.t().mm(result).to(weight.dtype)
        if of_bias:
            bias_gradient = gradient.sum(0, dtype=weight.dtype)
        before: tuple[Tensor | None, ...] = (None, None, None)
        if of_inputs or of_gain or of_shift:
            narrow = weight.to(gradient.dtype) if ctx.copy is None else ctx.copy
            wanted = [of_inputs, of_gain, of_shift]
            before = _gradients(ctx.before, gradient.mm(narrow), inputs, gain, shift, statistics, wanted)
        return None, *before, None, weight_gradient, bias_gradient


def _result(before: Any, inputs: Tensor, gain: Tensor | None, shift: Tensor | None) -> tuple[Tensor, ...]:
    """before(inputs), and with a norm mean and inverse deviation of each row."""
    if isinstance(before, nn.LayerNorm):
        return torch.native_layer_norm(inputs, before.normalized_shape, gain, shift, before.eps)
    return (inputs if before is None else before(inputs),)


def _gradients(
    before: Any,
    gradient: Tensor,
    inputs: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    statistics: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """Those of inputs, gain and shift from that of before(inputs)."""
    if isinstance(before, nn.LayerNorm):
        wide, shape = gradient.to(inputs.dtype), before.normalized_shape
        return torch.ops.aten.native_layer_norm_backward(wide, inputs, shape, *statistics, gain, shift, wanted)
    if isinstance(before, nn.GELU):
        return torch.ops.aten.gelu_backward(gradient, inputs), None, None
    if isinstance(before, Gate):
        gate, value = inputs.chunk(2, dim=-1)
        of_gate = torch.ops.aten.silu_backward(gradient * value, gate)
        return torch.cat([of_gate, gradient * F.silu(gate)], dim=-1), None, None
    return gradient, None, None


@torch.no_grad()
def copy_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Copy what linear layers multiply by into the precision that they compute in: one call instead of two a layer.

    A copy is used as long as its parameters stay as they are. Layers that are sharded, or compiled, make their own.
    """
    layers = [module for module in _eager(network) if isinstance(module, Linear) and not _is_sharded(module)]
    layers = [layer for layer in layers if layer.weight.dtype == torch.float32]
    for layer in layers:
        if layer.copies is None or layer.copies[0].dtype != dtype or layer.copies[0].device != layer.weight.device:
            layer.copies = torch.empty_like(layer.weight, dtype=dtype), torch.empty_like(layer.bias, dtype=dtype), ()
        layer.copies = (*layer.copies[:2], layer.version())
    if not layers:
        return
    targets = [copy for layer in layers for copy in layer.copies[:2]]  # type: ignore[index]
    torch._foreach_copy_(targets, [source for layer in layers for source in (layer.weight, layer.bias)])


def _is_sharded(layer: Linear) -> bool:
    return hasattr(layer.weight, "to_local")


def _eager(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what is in it, without what is compiled."""
    if module._compiled_call_impl is None:
        yield module
        for child in module.children():
            yield from _eager(child)
