"""The losses of SimCLR, MoCo, BYOL and SimDINO against their definitions, on one process and on several."""

import math

import definitions
import pytest
import torch
import torch.distributed as dist
import worlds
from torch import Tensor

from dino.methods import losses

CASES = {  # name: (of the package, by definition), each a function of (student's, teacher's, further rows)
    "nt_xent": (
        lambda z, t, more: losses.nt_xent(z, t, 0.3),
        lambda z, t, more: definitions.nt_xent(z, t, 0.3),
    ),
    "queue_contrast": (
        lambda z, t, more: losses.queue_contrast(z, t, more, 0.2),
        lambda z, t, more: definitions.queue_contrast(z, t.detach(), more, 0.2),
    ),
    "batch_contrast": (
        lambda z, t, more: losses.batch_contrast(z, t, 0.2),
        lambda z, t, more: definitions.batch_contrast(z, t.detach(), 0.2),
    ),
    "regression_loss": (
        lambda z, t, more: losses.regression_loss(z, t),
        lambda z, t, more: definitions.regression(z, t.detach()),
    ),
    "view_distance": (
        lambda z, t, more: losses.view_distance(torch.stack([z, t.detach().roll(1, dims=1), -z]), torch.stack([t, z])),
        lambda z, t, more: definitions.view_distance(
            torch.stack([z, t.detach().roll(1, dims=1), -z]), torch.stack([t, z]).detach()
        ),
    ),
    "coding_rate": (
        lambda z, t, more: losses.coding_rate(z, 0.5),
        lambda z, t, more: definitions.coding_rate(z, 0.5),
    ),
}
cases = pytest.mark.parametrize("case", CASES)
WORLDS = [3, 2]


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(loss, *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients; none is 0."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = loss(*leaves)
    value.backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [value.detach(), *gradients]


@cases
@pytest.mark.parametrize(("images", "width"), [(2, 3), (5, 4), (9, 16)])
def test_value_and_gradients_equal_the_definition(case, images, width):
    """Where no gradient is to flow (a teacher's embeddings), there is none."""
    ours, plain = CASES[case]
    inputs = rows(images, width, 0), rows(images, width, 1)
    more = rows(7, width, 2)
    of_ours = with_gradients(lambda z, t: ours(z, t, more), *inputs)
    expected = with_gradients(lambda z, t: plain(z, t, more), *inputs)
    assert of_ours[0].dtype == torch.float32
    assert of_ours[0].shape == ()
    assert of_ours[1].norm() > 1e-3
    for value, wanted in zip(of_ours, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


@cases
def test_half_precision_and_autocast_are_worked_in_fp32(case):
    ours, _ = CASES[case]
    half = [rows(6, 8, seed).bfloat16() for seed in (0, 1, 2)]
    expected = ours(*(value.float() for value in half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(*half), expected, rtol=1e-6, atol=1e-6)


@cases
@pytest.mark.parametrize("kind", ["all rows equal", "all rows nought"])
def test_collapsed_embeddings_are_finite(case, kind):
    ours, _ = CASES[case]
    same = torch.ones(4, 8) * (kind == "all rows equal")
    assert all(value.isfinite().all() for value in with_gradients(lambda z, t: ours(z, t, same), same, same.clone()))


def test_numbers_worked_by_hand():
    """Where all embeddings are alike, a softmax over n gives ln n; opposite vectors are 4 apart."""
    same = torch.ones(5, 3)
    assert losses.nt_xent(same, same, 0.1).item() == pytest.approx(math.log(9), rel=1e-6)
    assert losses.queue_contrast(same, same, same, 0.1).item() == pytest.approx(math.log(6), rel=1e-6)
    assert losses.batch_contrast(same, same, 0.2).item() == pytest.approx(0.4 * math.log(5), rel=1e-6)
    assert losses.regression_loss(same, -same).item() == pytest.approx(4)
    assert losses.coding_rate(same, 0.5).item() == pytest.approx(0.5 * math.log(1 + 3 / 0.25), rel=1e-6)
    even = torch.eye(3)
    assert losses.coding_rate(even, 0.5).item() == pytest.approx(1.5 * math.log(1 + 1 / 0.25), rel=1e-6)


def work(rank: int, processes: int) -> dict[str, list[Tensor]]:
    """By case, the means over processes of the loss and of the gradient of a layer that all share."""
    return {case: [mean(value) for value in of_layer(case, rank, processes)] for case in CASES}


def mean(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value / dist.get_world_size()


def of_layer(case: str, rank: int, processes: int) -> list[Tensor]:
    inputs = [rows(12, 5, seed).chunk(processes)[rank].float() for seed in (0, 1)]
    weight = torch.linspace(-1, 1, 20).view(5, 4)
    weight[0, 0] = 2.0
    more = rows(6, 4, 2).float()
    return with_gradients(lambda layer: CASES[case][0](inputs[0] @ layer, inputs[1] @ layer, more), weight)


@pytest.fixture(scope="module")
def means(tmp_path_factory) -> dict[int, list]:
    return worlds.run(work, WORLDS, tmp_path_factory.mktemp("processes"))


@cases
@pytest.mark.parametrize("processes", WORLDS)
def test_over_processes_it_is_the_loss_of_the_whole_batch(processes, case, means):
    expected = of_layer(case, 0, 1)
    assert expected[1].norm() > 1e-3
    for values in means[processes]:
        for value, wanted in zip(values[case], expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
