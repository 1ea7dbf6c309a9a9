"""The losses of the first 50 steps of two small runs, against figures kept from earlier ones.

The tolerances allow for other processors and other releases of torch (2.11 to 2.14), whose roundings grow with the
steps; a change of the recipe, of the order of the images or of the views exceeds them. Where such a change is meant,
remove golden_losses.json and run this file: the test writes the figures anew, and fails once to say so.
"""

import json
from pathlib import Path

import pytest
from launching import losses

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).with_name("golden_losses.json")
SETTINGS = (
    *("train.steps=50", "train.seed=0", "train.precision=fp32", "views.global_size=16", "model.drop_path=0"),
    *("objective.prototypes=256", "objective.head_hidden=64", "objective.head_bottleneck=32"),
    "objective.teacher_momentum=0.99",
)
# Rates at which the losses still move at the end: a curve that has come to rest would agree with any other.
CURVES = {
    "centre": (*SETTINGS, "objective.centering=center", "optim.lr=0.0003"),
    "sinkhorn": (*SETTINGS, "objective.centering=sinkhorn", "optim.lr=0.0001"),
}


def test_first_fifty_losses_are_those_of_the_golden_runs(runs, tmp_path):
    commands = {name: [*settings, f"run.dir={tmp_path / name}"] for name, settings in CURVES.items()}
    runs.together(commands)
    found = {name: losses(tmp_path / name) for name in CURVES}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was written anew: look at it, then run the test again")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, curve in golden.items():
        assert len(curve) == 50
        assert found[name][:10] == pytest.approx(curve[:10], rel=2e-3), name
        assert found[name] == pytest.approx(curve, rel=2e-2), name
