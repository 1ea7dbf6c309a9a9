"""On several real processes, each with its shard, targets and averages are those of the whole batch on one."""

import pytest
import torch
import worlds
from torch import Tensor

from dino.distributed import mean_over_processes
from dino.methods.ema import synchronise_buffers
from dino.methods.losses import Center, SinkhornKnopp, dino_loss

PROTOTYPES = 7
COUNTS = {  # rows of each process: equal as for class tokens, or as masked patches fall
    2: [[4, 4], [5, 3], [1, 12], [0, 6], [4, 0], [0, 0]],
    3: [[2, 2, 2], [1, 6, 4], [0, 5, 2], [0, 0, 3], [3, 0, 9]],
}
TOLERANCES = {0.0: 1e-6, 40.0: 1e-4}  # of probabilities, by `ahead`: fp32 resolves 3e-5 at 40 / τ = 400


def all_rows(counts: list[int], ahead: float) -> Tensor:
    """Cosines, as a head gives them; every third row is `ahead` of the others, also of all of another process."""
    logits = 2 * torch.rand(sum(counts), PROTOTYPES, generator=torch.Generator().manual_seed(sum(counts))) - 1
    logits[::3] += ahead
    return logits


def results(logits: Tensor) -> dict[str, Tensor]:
    """What a process finds out from its rows; two steps, the center of the first used in the second."""
    center, sinkhorn = Center(PROTOTYPES), SinkhornKnopp()
    center.update(logits)
    targets = center.probabilities(logits, 0.1)
    center.update(2 * logits)
    return {"sinkhorn": sinkhorn.probabilities(logits, 0.1), "targets": targets, "center": center.center.clone()}


def loss_of(targets: Tensor) -> Tensor:
    """Of two views, alike on both sides: (B, K) probabilities."""
    views = targets.expand(2, *targets.shape)
    return mean_over_processes(dino_loss(views, views, 0.1))


def work(rank: int, processes: int) -> dict:
    of_process: dict = {}
    for counts in COUNTS[processes]:
        for ahead in TOLERANCES:
            of_process[(*counts, ahead)] = results(all_rows(counts, ahead).split(counts)[rank])
    equal = COUNTS[processes][0]
    of_process["loss"] = loss_of(all_rows(equal, 0.0).softmax(dim=-1).split(equal)[rank])
    module = torch.nn.BatchNorm1d(3)
    module.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]) * (rank + 1))
    synchronise_buffers(module)
    return of_process | {"running_mean": module.running_mean}


@pytest.fixture(scope="module")
def of_worlds(tmp_path_factory) -> dict[int, list]:
    return worlds.run(work, list(COUNTS), tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("ahead", TOLERANCES)
@pytest.mark.parametrize("counts", [counts for cases in COUNTS.values() for counts in cases], ids=str)
def test_targets_and_center_are_those_of_all_rows(counts, ahead, of_worlds):
    """Each row weighs the same, whichever process has it; where nobody has any, the center stays, finite."""
    parts = [of_process[(*counts, ahead)] for of_process in of_worlds[len(counts)]]
    assert [len(part["sinkhorn"]) for part in parts] == counts
    expected, tolerance = results(all_rows(counts, ahead)), TOLERANCES[ahead]
    for name in ("sinkhorn", "targets"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, expected[name], rtol=0, atol=tolerance)
    for part in parts:
        assert part["center"].isfinite().all()
        torch.testing.assert_close(part["center"], expected["center"], rtol=1e-6, atol=1e-6)
        assert torch.equal(part["center"], parts[0]["center"])


@pytest.mark.parametrize("processes", COUNTS)
def test_loss_averages_to_that_of_the_whole_batch(processes, of_worlds):
    expected = loss_of(all_rows(COUNTS[processes][0], 0.0).softmax(dim=-1))
    for of_process in of_worlds[processes]:
        torch.testing.assert_close(of_process["loss"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("processes", COUNTS)
def test_running_statistics_of_a_teacher_are_averaged(processes, of_worlds):
    """(1 + … + P) / P = (P + 1) / 2 times (1, 2, 3)."""
    for of_process in of_worlds[processes]:
        torch.testing.assert_close(of_process["running_mean"], torch.tensor([1.0, 2.0, 3.0]) * (processes + 1) / 2)
