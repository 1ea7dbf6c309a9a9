"""In what precision images are embedded."""

import pytest
import torch

from dino import precision
from dino.precision import inference, inference_precision, prefers_bf16  # the real one: conftest replaces the module's

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({}, False),
    ],
)
def test_a_cpu_takes_bf16_only_where_it_has_units_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert prefers_bf16(CPU) is expected
    assert not prefers_bf16(torch.device("mps"))


@pytest.mark.parametrize("prefers", [False, True])
def test_what_is_asked_for_holds_and_auto_follows_the_device(monkeypatch, prefers):
    monkeypatch.setattr(precision, "prefers_bf16", lambda device: prefers)
    assert inference_precision(CPU) == ("bf16" if prefers else "fp32")
    assert [inference_precision(CPU, asked) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_in_that_precision_and_everything_is_as_before_afterwards(asked, dtype):
    weight = torch.ones(3, 3, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    with inference(CPU, asked):
        product = weight @ weight
        assert product.dtype == dtype
        assert not product.requires_grad
    assert (weight @ weight).dtype == torch.float32
    assert torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == before
