"""A run on images of many bands and of fractions: measured once, kept in its settings and weights, and gone on with."""

import numpy as np
import pytest
import torch
from builders import differing, weights

import dino
from dino.errors import UserError
from dino.report.run import Reporter

SETTINGS = {
    "data.channels": 4,
    "data.bits": "float",
    "data.workers": 0,
    "views.global_size": 8,
    "views.local_size": 4,
    "views.local_crops": 1,
    "model.arch": "vit_tiny",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "objective.prototypes": 16,
    "objective.head_hidden": 16,
    "objective.head_bottleneck": 8,
    "train.batch_size": 8,
    "train.steps": 4,
    "train.cpu_threads": 1,
    "optim.lr_end": 0.001,
    "optim.lr": 0.001,
    "optim.warmup_steps": 0,
    "optim.weight_decay_end": 0.04,  # rates that do not depend on the number of steps
    "objective.teacher_momentum": 0.9,
    "objective.teacher_momentum_end": 0.9,
    "objective.teacher_temperature": 0.04,
    "objective.teacher_temperature_warmup": 0,
    "objective.freeze_last_layer_steps": 0,
    "train.checkpoint_every": 2,
    "monitor.log_every": 1,
    "monitor.health_every": 0,
}


@pytest.fixture
def bands(tmp_path):
    folder, generator = tmp_path / "bands", np.random.default_rng(0)
    for kind, mean in (("dark", -3.0), ("light", 3.0)):
        (folder / kind).mkdir(parents=True)
        for number in range(12):
            image = generator.normal(mean, [1, 2, 3, 4], (16, 16, 4)).astype(np.float32)
            np.save(folder / kind / f"{number}.npy", image)
    return folder


def no_page(*_: object, **__: object) -> dict[str, bytes]:
    """In place of a report, which costs more than these runs."""
    return {}


@pytest.mark.parametrize("cache", ["device", "none"])
def test_what_was_measured_holds_for_all_that_comes_after(bands, tmp_path, monkeypatch, fresh_accelerate, cache):
    monkeypatch.setattr(Reporter, "write", no_page)
    settings = SETTINGS | {"data.cache": cache}
    whole = dino.train(bands, tmp_path / "whole", **settings)
    low, high = whole.config.data.range
    assert -20 < low < -3
    assert 3 < high < 20
    spread = np.array([10, 13, 18, 25]) ** 0.5 / (high - low)  # kinds are 6 apart: a variance of 9 more
    assert np.allclose(whole.config.views.std, spread, rtol=0.15)

    dino.train(bands, tmp_path / "parts", **settings | {"train.steps": 2})
    original = np.load(bands / "dark" / "0.npy")
    np.save(bands / "dark" / "0.npy", original - 100)  # what is measured once is not measured again
    parts = dino.train(bands, tmp_path / "parts", **settings)
    assert (parts.config.data, parts.config.views) == (whole.config.data, whole.config.views)
    np.save(bands / "dark" / "0.npy", original)
    exact = dino.train(bands, tmp_path / "exact", **settings | {"train.steps": 2})
    exact = dino.train(bands, tmp_path / "exact", **settings)
    assert differing(weights(exact.backbone), weights(whole.backbone)) == set()

    backbone = whole.backbone
    assert tuple(backbone.preprocess.levels) == ("float", (low, high))
    assert list(backbone.preprocess.mean) == whole.config.views.mean
    features = dino.embed(backbone, bands)
    assert features.labels == ["dark"] * 12 + ["light"] * 12
    by_hand = np.stack([np.load(bands / name) for name in features.names])
    pixels = torch.from_numpy(((by_hand - low) / (high - low)).clip(0, 1) * 255).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        assert np.allclose(backbone(backbone.preprocess.of_levels(pixels)).numpy(), features.class_tokens, atol=1e-4)


def test_a_range_that_cannot_be_is_refused(bands, tmp_path, fresh_accelerate):
    for given, message in (([1.0, 1.0], "two numbers"), ([1.0], "two numbers")):
        with pytest.raises(UserError, match=message):
            dino.train(bands, tmp_path / "run", **SETTINGS | {"data.range": given})
    with pytest.raises(UserError, match=r"data\.range .* data\.bits=8"):
        dino.train(bands, tmp_path / "run", **SETTINGS | {"data.range": [0.0, 1.0], "data.bits": "8"})
