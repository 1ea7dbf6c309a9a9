"""What a step asks of a device: launches, waits, memory. Counted on any machine, because a GPU's time is made of them.

A ViT-S in all but its width, on which no count depends. The limits lie a little above what is counted today (torch
2.14); the official DINO step has 5,100 operators and 476 waits in fp32, and 5,600 operators under autocast.
"""

import pytest
from accelerate import Accelerator
from builders import Built, build, packed, views_of_batch
from counting import Counted

from dino.training.memory import Kept

SMALL = {
    "model.arch": "vit_small",
    "model.embed_dim": 96,
    "model.depth": 12,
    "model.num_heads": 6,
    "model.drop_path": 0.1,
    "views.global_size": 16,
    "views.local_size": 8,
    "views.local_crops": 8,
    "objective.prototypes": 64,
    "objective.head_layers": 3,
    "objective.head_hidden": 64,
    "optim.clip_grad": 3.0,
    "optim.clip_scope": "parameter",
    "train.batch_size": 4,
}
DINOV2 = {
    "model.drop_path": 0.3,
    "model.drop_path_kind": "subset",
    "model.registers": 4,
    "model.layer_scale": 1e-5,
    "objective.ibot_weight": 1.0,
    "objective.koleo_weight": 0.1,
    "objective.centering": "sinkhorn",
    "optim.layer_decay": 0.9,
    "optim.patch_embed_lr": 0.2,
    "optim.clip_scope": "module",
}
CASES = [  # settings, precision, operators of a step, bytes kept for an image and its ten views
    pytest.param({}, "no", 880, 3.4e6, id="DINO in fp32"),
    pytest.param({}, "bf16", 1200, 2.1e6, id="DINO in bf16"),
    pytest.param(DINOV2, "bf16", 1700, 3.2e6, id="DINOv2 in bf16"),
]


@pytest.mark.parametrize(("settings", "precision", "operators", "size"), CASES)
def test_a_step_costs_no_more_than_it_did(settings, precision, operators, size, fresh_accelerate, tiny, monkeypatch):
    monkeypatch.setattr("dino.models.attention.prefers_bf16", lambda device: False)  # one operator, as on a GPU
    built = build(Accelerator(cpu=True, mixed_precision=precision), tiny(SMALL | settings))
    built.take(0)
    with Counted() as counted:
        built.step(1, packed(views_of_batch(built.step.config, 1)))
    assert counted.operators <= operators, counted.by_name
    assert (counted.syncs, counted.copies) == (0, 0), counted.by_name
    assert kept(built) <= size


def kept(built: Built) -> float:
    """Bytes that the student keeps for its backward pass, of an image."""
    config = built.step.config
    batches = built.step._batches(packed(views_of_batch(config, 2)))
    targets = built.method.targets(batches, 2)
    with Kept(built.method.student.parameters()) as counted:
        built.method.losses(batches[0], targets[0])
    return counted.bytes / config.train.batch_size
