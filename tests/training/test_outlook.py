"""What a run says of itself once its speed is known."""

import pytest
import torch

from dino.training.outlook import outlook
from dino.training.settings import load


@pytest.mark.parametrize(
    ("speed", "waiting", "said", "unsaid"),
    [
        (100.0, 0.0, ["in use, 15.0 minutes to the end"], ["shorter", "waits"]),  # 900 steps of 100 images
        (1.0, 0.0, ["25.0 hours to the end", "fewer train.epochs", "views.local_crops"], ["waits"]),
        (100.0, 0.6, ["60% of the time waits", "data.workers"], ["shorter"]),
    ],
)
def test_time_is_what_is_left_and_ways_are_named_where_they_are_wanted(speed, waiting, said, unsaid):
    config = load(None, ["train.steps=1000", "train.batch_size=100"])
    text = outlook(config, 100, speed, waiting, torch.device("cpu"))
    assert [part for part in said if part not in text] == []
    assert [part for part in unsaid if part in text] == []
