"""The DINO loss, the center and Sinkhorn-Knopp against their published definitions, written out slowly."""

import math

import pytest
import torch
from torch import Tensor

from dino.methods.losses import Center, SinkhornKnopp, dino_loss, sinkhorn_knopp


def published_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Caron et al. 2021, eq. 3 and algorithm 1, one pair and one image at a time, with an explicit softmax."""
    terms = []
    for g in range(teacher.shape[0]):
        for v in range(student.shape[0]):
            if v == g:
                continue
            for b in range(student.shape[1]):
                exponentials = torch.exp(student[v, b] / temperature)
                probabilities = exponentials / exponentials.sum()
                terms.append(-(teacher[g, b] * torch.log(probabilities)).sum())
    return torch.stack(terms).mean()


def published_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Caron et al. 2020 (SwAV), listing 1, in double precision: exponential, then rows and columns in turn."""
    q = torch.exp(logits.double() / temperature).T  # (K, N)
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / samples
    return (q * samples).T


def random_case(views: int, globals_: int, batch: int, prototypes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(views, batch, prototypes, generator=generator, dtype=torch.float64)
    teacher = (3 * torch.randn(globals_, batch, prototypes, generator=generator, dtype=torch.float64)).softmax(-1)
    return student, teacher


GRID = [  # views, global views, images, prototypes, temperature
    (10, 2, 3, 7, 0.1),  # as published: 2 global and 8 local crops
    (2, 2, 4, 5, 0.1),  # no local crops
    (4, 1, 2, 6, 0.3),  # one global crop
    (5, 3, 1, 2, 1.0),
    (3, 2, 5, 1, 0.1),  # one prototype: nothing to tell apart
    (4, 4, 2, 33, 0.2),
]


class TestLoss:
    @pytest.mark.parametrize(("views", "globals_", "batch", "prototypes", "temperature"), GRID)
    def test_value_and_gradient_equal_the_definition(self, views, globals_, batch, prototypes, temperature):
        student, teacher = random_case(views, globals_, batch, prototypes)
        slow, fast = (student.clone().requires_grad_() for _ in range(2))
        expected = published_loss(slow, teacher, temperature)
        loss = dino_loss(fast, teacher, temperature)
        expected.backward()
        loss.backward()
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("cached", [1, 12, 30])
    def test_portions_of_any_size_give_the_same(self, cached, monkeypatch):
        """Of the local views a CPU takes as many as its cache holds."""
        student, teacher = random_case(7, 2, 3, 4)
        whole, parts = (student.clone().requires_grad_() for _ in range(2))
        expected = dino_loss(whole, teacher)
        expected.backward()
        monkeypatch.setattr("dino.methods.losses.dino.CACHED", cached)
        loss = dino_loss(parts, teacher)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=0)

    def test_a_scaler_finds_gradients_in_fp16_that_are_too_small_for_it_before(self):
        student, teacher = random_case(4, 2, 16, 4096)
        half, whole = student.half().requires_grad_(), student.half().float().requires_grad_()
        for logits in (half, whole):
            (dino_loss(logits, teacher) * 2**14).backward()
        torch.testing.assert_close(half.grad.float(), whole.grad.float(), rtol=2e-3, atol=1e-7)
        assert whole.grad.abs().median() / 2**14 < torch.finfo(torch.float16).smallest_normal

    def test_number_worked_by_hand(self):
        """Softmax of (ln 3, 0) is (3/4, 1/4); the teacher is sure of the first, then of the second prototype."""
        temperature = 0.1
        scores = temperature * torch.tensor([[math.log(3), 0.0]])
        student = torch.stack([scores, scores])
        teacher = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        expected = (math.log(4 / 3) + math.log(4)) / 2
        assert dino_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_worked_in_fp32_whatever_comes_in(self, dtype):
        student, teacher = random_case(4, 2, 3, 50)
        student = student.to(dtype)
        loss = dino_loss(student, teacher, 0.1)
        assert loss.dtype == torch.float32
        expected = published_loss(student.double(), teacher, 0.1)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_large_logits_do_not_overflow(self, dtype):
        """Student sure of prototype 0 by 10⁴ / 0.1; the teacher wants it half the time, so half of 10⁵ is paid."""
        student = torch.zeros(2, 1, 3, dtype=dtype)
        student[..., 0] = 1e4
        student.requires_grad_()
        loss = dino_loss(student, torch.tensor([0.5, 0.25, 0.25]).expand(2, 1, 3), 0.1)
        loss.backward()
        assert loss.item() == pytest.approx(0.5 * student[0, 0, 0].item() / 0.1, rel=1e-5)
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize(("views", "globals_"), [(1, 1), (3, 0)])
    def test_no_pair_is_refused(self, views, globals_):
        with pytest.raises(ValueError, match="no pair"):
            dino_loss(torch.zeros(views, 2, 3), torch.zeros(globals_, 2, 3))


class TestCenter:
    def test_moves_by_equation_4(self):
        center = Center(2, momentum=0.9)
        center.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # mean (2, 3): 0.1 of it
        torch.testing.assert_close(center.center, torch.tensor([[0.2, 0.3]]))
        center.update(torch.tensor([[10.0, 0.0]]))  # 0.9 · (0.2, 0.3) + 0.1 · (10, 0)
        torch.testing.assert_close(center.center, torch.tensor([[1.18, 0.27]]))

    def test_targets_are_centered_by_earlier_steps_then_sharpened(self):
        """Reading never moves the center; an update counts from the next reading on."""
        torch.manual_seed(0)
        center, logits = Center(5), torch.randn(2, 3, 5)
        before = center.probabilities(logits, 0.1)
        torch.testing.assert_close(before, (logits / 0.1).softmax(-1))  # the first step: no center yet
        assert torch.equal(center.probabilities(logits, 0.1), before)
        center.update(logits.flatten(0, 1))
        moved = 0.1 * logits.mean(dim=(0, 1))
        torch.testing.assert_close(center.probabilities(logits, 0.1), ((logits - moved) / 0.1).softmax(-1))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_mean_that_is_not_finite_is_ignored(self, bad):
        center = Center(3)
        center.update(torch.ones(4, 3))
        before = center.center.clone()
        logits = torch.ones(4, 3)
        logits[1, 2] = bad
        center.update(logits)
        assert torch.equal(center.center, before)
        center.update(torch.zeros(4, 3))
        torch.testing.assert_close(center.center, 0.9 * before)

    def test_half_precision_logits_are_averaged_in_fp32(self):
        """The sum of 1,000 logits of 100 is beyond fp16, and beyond bf16's 8 bits."""
        for dtype in (torch.float16, torch.bfloat16):
            center = Center(2, momentum=0.0)
            center.update(torch.full((1000, 2), 100.0, dtype=dtype))
            assert center.center.dtype == torch.float32
            torch.testing.assert_close(center.center, torch.full((1, 2), 100.0))

    def test_targets_carry_no_gradient(self):
        logits = torch.randn(3, 4, requires_grad=True)
        for targets in (Center(4), SinkhornKnopp()):
            assert not targets.probabilities(logits, 0.1).requires_grad


class TestSinkhorn:
    @pytest.mark.parametrize(("samples", "prototypes"), [(1, 8), (2, 2), (7, 16), (64, 100)])
    @pytest.mark.parametrize(("temperature", "iterations"), [(0.04, 3), (0.07, 10), (1.0, 1)])
    def test_equals_the_published_algorithm(self, samples, prototypes, temperature, iterations):
        generator = torch.Generator().manual_seed(samples * prototypes)
        logits = 2 * torch.rand(samples, prototypes, generator=generator) - 1  # cosines
        result = sinkhorn_knopp(logits, temperature, iterations)
        expected = published_sinkhorn(logits, temperature, iterations)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("behind", [-512.0, 512.0])
    def test_a_prototype_far_from_the_others_is_balanced_like_any_other(self, behind):
        """An offset of one prototype cancels in the first normalisation; fp32 resolves 0.001 at 512 / τ = 8192."""
        logits = torch.randint(-256, 256, (9, 5), generator=torch.Generator().manual_seed(0)) / 256
        shifted = logits.clone()
        shifted[:, 2] += behind
        torch.testing.assert_close(
            sinkhorn_knopp(shifted, 1 / 16), sinkhorn_knopp(logits, 1 / 16), rtol=1e-3, atol=1e-4
        )

    @pytest.mark.parametrize("size", [1.0, 1e4])
    def test_large_logits_and_a_sample_far_behind_the_others_still_give_probabilities(self, size):
        logits = size * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        logits[3] -= 1e4
        logits[0, 1] = -1e4
        result = sinkhorn_knopp(logits, 0.04)
        assert result.isfinite().all()
        torch.testing.assert_close(result.sum(dim=1), torch.ones(6))

    @pytest.mark.parametrize("spread", [1.0, 10.0, 100.0, 1e4])
    def test_equals_the_algorithm_in_logarithms_however_far_logits_are_apart(self, spread):
        """Also where samples and prototypes are behind others by more than fp32's exponents reach."""
        generator = torch.Generator().manual_seed(int(spread))
        logits = torch.randn(12, 9, generator=generator)
        logits += spread * torch.randn(12, 1, generator=generator) + spread * torch.randn(9, generator=generator)
        logits = (64 * logits).round() / 64  # so that fp32 has their differences exactly
        expected = 16 * logits.double()
        for _ in range(3):
            expected = expected.log_softmax(dim=0).log_softmax(dim=1)
        torch.testing.assert_close(sinkhorn_knopp(logits, 1 / 16).double(), expected.exp(), rtol=0, atol=1e-5)

    def test_all_views_are_one_batch(self):
        logits = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
        result = SinkhornKnopp(3).probabilities(logits, 0.1)
        assert result.shape == logits.shape
        torch.testing.assert_close(result.view(10, 7).double(), published_sinkhorn(logits.view(10, 7), 0.1, 3))
