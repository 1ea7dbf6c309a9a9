"""With train.compile one graph serves all blocks, whatever their stochastic depth, and none is made later on."""

import pytest
import torch
from builders import DINOV2, SINKHORN, build, packed, views_of_batch
from torch import nn
from torch._dynamo.utils import counters

from dino.training import launch

SUBSET = DINOV2 | SINKHORN | {"model.drop_path_kind": "subset", "model.registers": 2, "model.layer_scale": 0.1}
CASES = [  # settings, global sizes of the phases
    pytest.param({}, [16], id="DINO"),
    pytest.param(SUBSET, [16, 24, 32], marks=pytest.mark.slow, id="DINOv2"),
    pytest.param({"train.activation_checkpointing": True}, [16, 24], marks=pytest.mark.slow, id="checkpointing"),
]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo looks at
@pytest.mark.parametrize(("settings", "sizes"), CASES)
def test_blocks_share_graphs(settings, sizes, accelerator, tiny, monkeypatch):
    """Two of student and teacher each, and as many again for each further size of crops."""
    torch._dynamo.reset()
    counters.clear()
    eager = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: eager(self, backend="aot_eager", **how))
    changes = {"model.depth": 4, "model.drop_path": 0.3, "train.compile": True} | settings
    phases = [tiny(changes | {"views.global_size": size, "views.local_size": size // 2}) for size in sizes]
    phases[0].train.phases = phases[1:]  # only how many there are is looked at
    built = build(accelerator, phases[0])
    launch.place(accelerator, built.method, phases[0].train)
    for config in phases:
        built.step(0, packed(views_of_batch(config, 0)))
    assert counters["stats"]["unique_graphs"] == 4 * len(phases)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, config in enumerate([*phases, *phases], 1):
            built.step(step, packed(views_of_batch(config, step)))
    torch._dynamo.reset()
