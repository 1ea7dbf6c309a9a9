"""TensorBoard: the lines of a run that was killed and went on are one curve, read back by its own reader."""

import pytest

from dino.config.schema import TrackingConfig
from dino.tracking import Trackers


def test_steps_after_the_checkpoint_are_replaced(accelerator, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking = TrackingConfig(["tensorboard"], "letters", None)
    for start, steps, loss in ((0, (1, 2, 3, 4, 5), 1.0), (3, (4, 5, 6), 2.0)):
        trackers = Trackers(accelerator, tracking, tmp_path / "mine", {"optim.lr": 0.1}, "pre-training", start)
        for step in steps:
            trackers.log({"loss/dino": loss * step, "health/verdict": "healthy"}, step)
        trackers.end()
    events = accumulator.EventAccumulator(str(tmp_path / "mine" / "letters"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss/dino")]
    assert curve == [(1, 1), (2, 2), (3, 3), (4, 8), (5, 10), (6, 12)]
    assert "health/verdict/text_summary" in events.Tags()["tensors"]
