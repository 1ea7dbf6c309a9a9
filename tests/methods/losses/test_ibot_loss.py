"""The masked-patch loss against Zhou et al. 2022, eq. 2, written out patch by patch and prototype by prototype."""

import math

import pytest
import torch
from torch import Tensor

from dino.methods.losses import ibot_loss


def published_loss(student: list[Tensor], teacher: list[Tensor], temperature: float) -> Tensor:
    """In each crop, the mean cross-entropy of its masked patches; 0 for a crop without any; the mean over all crops.

    Args:
        student, teacher: per crop c, (|M_c|, K) logits and probabilities.
    """
    per_crop = []
    for logits, probabilities in zip(student, teacher, strict=True):
        patches = []
        for z, q in zip(logits, probabilities, strict=True):
            normaliser = sum(torch.exp(score / temperature) for score in z)
            terms = [-q[k] * torch.log(torch.exp(z[k] / temperature) / normaliser) for k in range(len(z))]
            patches.append(sum(terms))
        per_crop.append(sum(patches) / len(patches) if patches else logits.sum() * 0)
    return sum(per_crop) / len(per_crop)


def random_case(counts: list[int], prototypes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits (M, K), teacher probabilities (M, K) and weights (M,), in double precision."""
    generator = torch.Generator().manual_seed(sum(counts) + prototypes)
    student, teacher = torch.randn(2, sum(counts), prototypes, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1 / count for count in counts for _ in range(count)], dtype=torch.float64)
    return student, (3 * teacher).softmax(dim=1), weights


GRID = [  # masked patches of each crop, prototypes, temperature
    ([3, 5, 1, 2], 7, 0.1),  # every crop masked
    ([0, 4, 0, 2, 0, 1], 5, 0.1),  # as published: not every crop
    ([1], 6, 0.1),  # one masked patch in all
    ([0, 0, 1], 4, 0.2),
    ([9, 1], 1, 0.1),  # one prototype: nothing to tell apart
    ([2, 0], 33, 1.0),
    ([16, 16], 3, 0.04),  # everything masked
]


@pytest.mark.parametrize(("counts", "prototypes", "temperature"), GRID)
def test_value_and_gradient_equal_the_definition(counts, prototypes, temperature):
    student, teacher, weights = random_case(counts, prototypes)
    slow, fast = (student.clone().requires_grad_() for _ in range(2))
    expected = published_loss(list(slow.split(counts)), list(teacher.split(counts)), temperature)
    loss = ibot_loss(fast, teacher, weights, len(counts), temperature)
    expected.backward()
    loss.backward()
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=1e-6)


def test_number_worked_by_hand():
    """Softmax of (ln 3, 0) is (3/4, 1/4). Crop 1: ln 4 and ln 4/3; crop 2: ln 4/3 alone; crop 3 is not masked."""
    student = 0.1 * torch.tensor([[math.log(3), 0.0]]).expand(3, 2)
    teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    loss = ibot_loss(student, teacher, torch.tensor([0.5, 0.5, 1.0]), crops=3)
    expected = ((math.log(4) + math.log(4 / 3)) / 2 + math.log(4 / 3)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_masked_is_nought_without_a_gradient(dtype):
    """Also where the empty logits come from a head, whose weights then must get zeros and no NaN."""
    features, head = torch.zeros(0, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype, requires_grad=True)
    loss = ibot_loss(features @ head.T, torch.zeros(0, 5), torch.zeros(0), crops=4)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(head.grad, torch.zeros_like(head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_worked_in_fp32_whatever_comes_in(dtype):
    counts = [4, 0, 3]
    student, teacher, weights = random_case(counts, 50)
    half, teacher = (8 * student).to(dtype), teacher.float()
    same = half.float()
    loss = ibot_loss(half.requires_grad_(), teacher, weights.float(), 3)
    expected = ibot_loss(same.requires_grad_(), teacher, weights.float(), 3)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(half.grad, same.grad.to(dtype))
    slow = published_loss(list(same.detach().double().split(counts)), list(teacher.double().split(counts)), 0.1)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_logits_do_not_overflow(dtype):
    """Student sure of prototype 0 by 10⁴ / 0.1; the teacher wants it half the time, so half of 10⁵ is paid."""
    student = torch.tensor([[1e4, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = ibot_loss(student, torch.tensor([[0.5, 0.25, 0.25]]), torch.ones(1), crops=1)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * student[0, 0].item() / 0.1, rel=1e-5)
    assert student.grad.isfinite().all()
