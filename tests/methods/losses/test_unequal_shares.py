"""Masked patches are never shared out equally: targets and centres are those of all processes' rows together."""

import pytest
import torch
import worlds
from torch import Tensor

from dino.methods.losses import Centre, SinkhornKnopp

PROTOTYPES = 7
SHARES = {  # rows of each process
    2: [[5, 3], [1, 12], [0, 6], [4, 0], [0, 0]],
    3: [[1, 6, 4], [0, 5, 2], [0, 0, 3], [3, 0, 9]],
}
TOLERANCES = {0.0: 1e-6, 40.0: 1e-4}  # of probabilities, by `ahead`: fp32 resolves 3e-5 at 40 / τ = 400


def all_rows(shares: list[int], ahead: float) -> Tensor:
    """Cosines, as a head gives them; every third row is `ahead` of the others, also of all of another process."""
    logits = 2 * torch.rand(sum(shares), PROTOTYPES, generator=torch.Generator().manual_seed(sum(shares))) - 1
    logits[::3] += ahead
    return logits


def results(logits: Tensor) -> dict[str, Tensor]:
    """What a process finds out from its rows; two steps, the centre of the first used in the second."""
    centre, sinkhorn = Centre(PROTOTYPES), SinkhornKnopp()
    centre.update(logits)
    targets = centre.probabilities(logits, 0.1)
    centre.update(2 * logits)
    return {"sinkhorn": sinkhorn.probabilities(logits, 0.1), "targets": targets, "centre": centre.center.clone()}


def work(rank: int, processes: int) -> dict:
    return {
        (*shares, ahead): results(all_rows(shares, ahead).split(shares)[rank])
        for shares in SHARES[processes]
        for ahead in TOLERANCES
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list]:
    return worlds.run(work, list(SHARES), tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("ahead", TOLERANCES)
@pytest.mark.parametrize("shares", [shares for cases in SHARES.values() for shares in cases], ids=str)
def test_targets_and_centre_are_those_of_all_rows(shares, ahead, found):
    """Each row weighs the same, whichever process has it; where nobody has any, the centre stays, finite."""
    parts = [of_process[(*shares, ahead)] for of_process in found[len(shares)]]
    assert [len(part["sinkhorn"]) for part in parts] == shares
    expected, tolerance = results(all_rows(shares, ahead)), TOLERANCES[ahead]
    for name in ("sinkhorn", "targets"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, expected[name], rtol=0, atol=tolerance)
    for part in parts:
        assert part["centre"].isfinite().all()
        torch.testing.assert_close(part["centre"], expected["centre"], rtol=1e-6, atol=1e-6)
        assert torch.equal(part["centre"], parts[0]["centre"])
