"""Readings of embeddings that are compared: by hand, and only for methods that they concern."""

import math

import pytest
import torch
from accelerate import Accelerator
from builders import build, packed, views_of_batch

from dino.methods.queue import Queue
from dino.monitor.health import Health
from dino.monitor.indicators.pairs import alignment, similarities, uniformity

OF_PAIRS = {"health/alignment", "health/positive_similarity", "health/negative_similarity"}
SHOWN = {
    "simclr": OF_PAIRS,
    "moco": OF_PAIRS | {"health/queue_age"},
    "moco_v3": OF_PAIRS | {"health/predictor_rank"},
    "byol": OF_PAIRS | {"health/predictor_rank"},
    "simdino": OF_PAIRS,
    "swav": set(),
    "dino": set(),
}


def test_numbers_worked_by_hand():
    right, up = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    both = torch.stack([right, up])
    assert alignment(torch.stack([both, both.flip(0)])).item() == pytest.approx(2)  # at right angles
    assert alignment(torch.stack([both, both])).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(both).item() == pytest.approx(-4)  # log e^(−2·2)
    three = torch.stack([right, up, right])
    assert uniformity(three).item() == pytest.approx(math.log((2 * math.exp(-4) + 1) / 3), rel=1e-5)
    positive, negative = similarities(both[None], torch.stack([right, -up])[None])
    assert (positive.item(), negative.item()) == pytest.approx((0, 0))
    positive, negative = similarities(both[None], torch.stack([right, right])[None])
    assert (positive.item(), negative.item()) == pytest.approx((0.5, 0.5))


def test_a_queue_knows_how_old_it_is_and_drops_the_oldest():
    queue = Queue(5, 2)
    for step in (0, 1, 2):
        queue.add(torch.full((2, 2), float(step)), step)
    assert queue.rows[:, 0].tolist() == [2, 2, 1, 1, 0]
    assert queue.age(3).item() == pytest.approx((1 + 1 + 2 + 2 + 3) / 5)


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_of_a_method_is_what_it_has(name, fresh_accelerate, tiny):
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    local = 0 if name in ("simclr", "moco", "moco_v3", "byol") else 2
    config = tiny({"views.local_crops": local} | ({"objective.name": name} if name != "dino" else {}))
    built = build(accelerator, config)
    health = Health(accelerator, config, built.method, None)
    built.step(0, packed(views_of_batch(config, 0)))
    health.observe(range(8))
    values = health.measure(1)
    everything = OF_PAIRS | {"health/queue_age", "health/predictor_rank", "health/uniformity"}
    assert values.keys() & everything == SHOWN[name]
    assert all(math.isfinite(value) for value in values.values())
    assert ("health/uniformity" in health.names()) == bool(SHOWN[name])
