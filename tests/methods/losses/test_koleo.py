"""KoLeo against its definition (Oquab et al. 2023, §4), on one process and on several."""

import math

import pytest
import torch
import torch.distributed as dist
import worlds
from torch import Tensor

from dino.methods.losses import koleo_loss


def published_loss(features: Tensor) -> Tensor:
    """−1/n · Σᵢ log(min_{j≠i} ‖xᵢ − xⱼ + ε‖ + ε) of unit-length rows, pair by pair; ε is 1e-8 in DINOv2's training."""
    unit = [row / row.square().sum().sqrt() for row in features]
    terms = []
    for i, one in enumerate(unit):
        distances = [(one - other + 1e-8).square().sum().sqrt() for j, other in enumerate(unit) if j != i]
        terms.append(-torch.log(min(distances) + 1e-8))
    return sum(terms) / len(terms)


def random_features(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradient(features: Tensor) -> tuple[Tensor, Tensor]:
    leaf = features.clone().requires_grad_()
    loss = koleo_loss(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("count", "width"), [(2, 3), (3, 2), (8, 4), (33, 16), (5, 1000)])
def test_value_and_gradient_equal_the_definition(count, width):
    features = random_features(count, width)
    slow = features.clone().requires_grad_()
    expected = published_loss(slow)
    expected.backward()
    loss, gradient = with_gradient(features)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slow.grad, rtol=1e-4, atol=1e-6)


def test_number_worked_by_hand():
    """(1,0) and (0,1) are √2 apart; (−1,0) is √2 from (0,1): three times −log √2. Lengths do not matter."""
    loss = koleo_loss(torch.tensor([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0]]))
    assert loss.item() == pytest.approx(-0.5 * math.log(2), rel=1e-6)


def test_only_directions_count():
    """Scaling a row changes nothing; so no gradient lies along it."""
    features = random_features(9, 6)
    scales = torch.logspace(-3, 3, 9, dtype=torch.float64)[:, None]
    loss, gradient = with_gradient(features)
    scaled, scaled_gradient = with_gradient(features * scales)
    torch.testing.assert_close(scaled, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scaled_gradient * scales, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((gradient * features).sum(dim=1), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("apart", [1e-4, 1e-5, 1e-6, 2e-7])
def test_near_neighbours_part_as_the_definition_says(apart):
    """As at the start of DINOv2's training, where LayerScale lets little of an image through."""
    features = torch.eye(4, 6, dtype=torch.float64)
    features[1] = features[0] + apart * torch.tensor([0, 0.5, -0.5, 0.5, 0, 0.5], dtype=torch.float64)
    slow = features.clone().requires_grad_()
    expected = published_loss(slow)
    expected.backward()
    loss, gradient = with_gradient(features)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:2], slow.grad[:2], rtol=1e-3, atol=1e-2)
    assert gradient[:2].norm() > 0.1 / apart


# Copies must neither be −log 0 nor pull with the force of 1 / 0.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["a copy", "all rows equal", "all rows nought", "one row"])
def test_copies_are_finite(kind, dtype):
    features = random_features(6, 5).to(dtype)
    if kind == "a copy":
        features[3] = features[0]
    elif kind != "one row":
        features = features[:1].expand(5, 5) * (kind == "all rows equal")
    loss, gradient = with_gradient(features[:1] if kind == "one row" else features)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if kind == "a copy":
        assert gradient[[1, 2, 4, 5]].abs().sum() > 0  # the rest is still spread
    elif kind == "one row":  # which has nobody to part from
        assert loss.item() == gradient.abs().max() == 0
    else:
        assert loss > 5  # as near as can be told


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-5, 1e-20])
def test_near_copies_are_finite_and_dear(apart):
    """By the definition, as far as fp32 can tell."""
    features = random_features(4, 5)
    features /= features.norm(dim=1, keepdim=True)
    features[1] = features[0] + apart * random_features(1, 5, seed=1)[0]
    loss, gradient = with_gradient(features.float())
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), published_loss(features), rtol=1e-3 if apart > 1e-20 else 0.1, atol=0)
    assert loss > koleo_loss(random_features(4, 5)) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 3e-4, 1e3])
def test_half_precision_is_worked_in_fp32(dtype, size):
    """Also where the squares of the values are beyond fp16."""
    half = (size * random_features(16, 32)).to(dtype)
    loss, gradient = with_gradient(half)
    expected, expected_gradient = with_gradient(half.float())
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_autocast_changes_nothing():
    """Neighbours that half precision cannot tell apart: many directions near one another."""
    features = (1 + 0.02 * random_features(64, 32)).float()
    expected = koleo_loss(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo_loss(features), expected)


WORLDS = [3, 2]
CASES = {"several": 6, "one a process": 1, "a copy on another process": 6}  # name to rows of a process


def batch_of(case: str, processes: int) -> Tensor:
    features = random_features(CASES[case] * processes, 8, seed=3).float()
    if case == "a copy on another process":
        features[-1] = features[0]
    return features


def loss_and_gradient(inputs: Tensor, over_processes: bool) -> dict[str, Tensor]:
    """Of a linear layer under KoLeo: a weight that all processes share."""
    weight = torch.linspace(-1, 1, 40).view(8, 5).requires_grad_()
    loss = koleo_loss(inputs @ weight, over_processes)
    loss.backward()
    return {"loss": loss.detach(), "gradient": weight.grad}


def work(rank: int, processes: int) -> dict:
    """The means over processes that data-parallel training has, by case and whether neighbours are sought in all."""
    of_process = {}
    for case in CASES:
        for everywhere in (True, False):
            of_process[case, everywhere] = loss_and_gradient(
                batch_of(case, processes).chunk(processes)[rank], everywhere
            )
            for value in of_process[case, everywhere].values():
                dist.all_reduce(value)
                value /= processes
    return of_process


@pytest.fixture(scope="module")
def means(tmp_path_factory) -> dict[int, list]:
    return worlds.run(work, WORLDS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", WORLDS)
def test_neighbours_of_all_processes_or_of_each_by_itself(processes, case, means):
    """Over processes it is the loss of the whole batch; otherwise the mean of what each process's own part gives."""
    batch = batch_of(case, processes)
    whole = loss_and_gradient(batch, over_processes=False)
    assert whole["gradient"].abs().max() > 0.01
    for name, value in means[processes][0][case, True].items():
        # How far two copies are apart is rounding, which the loss takes the logarithm of.
        rtol = 0.05 if (case, name) == ("a copy on another process", "loss") else 1e-5
        torch.testing.assert_close(value, whole[name], rtol=rtol, atol=1e-6)
    parts = [loss_and_gradient(part, False) for part in batch.chunk(processes)]
    for name, value in means[processes][0][case, False].items():
        expected = torch.stack([part[name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
