"""Rebalancing while training: it happens when due, is part of the checkpoint, and does not depend on processes."""

import pytest
from launching import backbone, checkpoint, copy_run, error_of, metrics
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 16
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every=4", "train.keep_checkpoints=4", "train.batch_size=64")
SETTINGS += ("model.drop_path=0", "data.rebalance_every=6")


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory):
    """Finished runs by name."""
    folder = tmp_path_factory.mktemp("rebalanced")
    commands = {
        "one": SETTINGS,
        "two": SETTINGS,
        "workers": (*SETTINGS, "data.cache=none", "data.workers=1"),
        "never": (*SETTINGS, "data.rebalance_every=0"),
        "sharded": (*SETTINGS, "train.fsdp=true"),
    }
    commands = {name: (*settings, f"run.dir={folder / name}") for name, settings in commands.items()}
    runs.together(commands, two="two", sharded="two")
    return {name: folder / name for name in commands}


def weights(run, step):
    return load_file(checkpoint(run, step) / "draws.safetensors")["weights"]


def test_it_happens_when_due_and_is_written(done):
    lines = {line["step"]: line for line in metrics(done["one"])}
    assert [step for step, line in lines.items() if "data/effective_clusters" in line] == [6, 12]
    assert 1 < lines[6]["data/effective_clusters"] <= 20  # 1,000 images of the sample: 20 clusters
    assert lines[12]["data/largest_weight"] > 1
    assert all(0 < lines[step]["time/rebalance"] < 1 for step in (6, 12))


def test_images_outside_the_sample_keep_their_weight(done):
    before, after = (weights(done["one"], step) for step in (8, 16))
    assert 0 < (before != 1).sum() <= 1000
    changed = before != after
    assert 0 < changed.sum() <= 1000
    # The second sample takes the 797 of 1,797 images that the first left, and 203 of the first.
    assert (changed & (before == 1)).sum() > 700
    assert before.mean().item() == pytest.approx(1, abs=1e-9)


def test_without_it_nothing_changes(done):
    assert not (checkpoint(done["never"], 8) / "draws.safetensors").exists()
    both = [{line["step"]: line["loss/dino"] for line in metrics(done[name])} for name in ("one", "never")]
    assert [both[0][step] for step in range(1, 7)] == [both[1][step] for step in range(1, 7)]
    assert both[0][7] != both[1][7]


@pytest.mark.parametrize("step", [4, 12])
def test_resumed_it_is_bit_identical(runs, done, tmp_path, step):
    run = copy_run(done["one"], tmp_path / "run", step)
    runs.finish(*SETTINGS, f"run.dir={run}")
    assert backbone(run) == backbone(done["one"])


@pytest.mark.parametrize("name", ["two", "workers", "sharded"])
def test_processes_and_workers_give_the_same_curve(done, name):
    for line, wanted in zip(metrics(done[name]), metrics(done["one"]), strict=True):
        assert line["loss/dino"] == pytest.approx(wanted["loss/dino"], rel=1e-4), f"step {line['step']}"
        # Tokens that differ by rounding may leave an image or two in another cluster.
        assert line.get("data/largest_weight", 0) == pytest.approx(wanted.get("data/largest_weight", 0), rel=2e-3)


def test_too_few_images_to_cluster_are_told(runs, tmp_path):
    (tmp_path / "few").mkdir()
    for number in range(70):
        Image.new("L", (16, 16), 3 * number).save(tmp_path / "few" / f"{number}.png")
    few = (f"data.root={tmp_path / 'few'}", "data.kind=folder", "data.channels=1", f"run.dir={tmp_path / 'run'}")
    assert "needs at least 100 images to cluster, got 70" in error_of(runs.run(*SETTINGS, *few))
    assert not (tmp_path / "run").exists()
