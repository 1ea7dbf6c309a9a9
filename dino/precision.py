"""The precision in which images are embedded: bf16 where the device computes with it, else fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def prefers_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16; without them, CPUs are many times slower in it than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def inference_precision(device: torch.device, asked: str = "auto") -> str:
    """fp32 or bf16; `asked` is one of PRECISIONS."""
    if asked != "auto":
        return asked
    return "bf16" if prefers_bf16(device) else "fp32"


@contextmanager
def inference(device: torch.device, asked: str = "auto") -> Iterator[None]:
    """No gradients, and products in bf16 where that is chosen; a GPU's other products are then in TF32."""
    narrow = inference_precision(device, asked) == "bf16"
    before = torch.get_float32_matmul_precision()
    if narrow and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
