"""Runs that draw images by a manifest's weights while crop sizes change: killed, and on other numbers of processes."""

import pyarrow as pa
import pytest
from launching import backbone, checkpoint, checkpoints, copy_run, losses, steps_logged, write_images
from test_continued import KILLED_AT

from dino.data.manifest import write_manifest

pytestmark = pytest.mark.slow

IMAGES, STEPS, BORDER = 40, 16, 8  # of 8 images: an epoch of 60 samples ends in step 8 and in step 15
SETTINGS = (
    *("data.kind=manifest", "data.channels=1", "train.batch_size=8", f"train.steps={STEPS}", "data.cache=none"),
    *("train.checkpoint_every=3", "train.keep_checkpoints=9", "model.drop_path=0"),
    "train.phases=[{begin: 0.5, global_size: 12, local_size: 8}]",
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The half of the images counts for twice as many samples as the other."""
    folder = tmp_path_factory.mktemp("weighted")
    names = [path.name for path in write_images(folder / "images", IMAGES)]
    weights = [2.0 if number % 2 else 1.0 for number in range(IMAGES)]
    columns = {"path": pa.array(names), "kept": [True] * IMAGES, "weight": weights}
    write_manifest(folder / "manifest.parquet", columns, str(folder / "images"), "folder")
    return folder / "manifest.parquet"


@pytest.fixture(scope="module")
def commands(manifest):
    plain = (*SETTINGS, f"data.root={manifest}")
    random = (*plain, "model.drop_path=0.3", "model.drop_path_kind=subset")
    return {"plain": plain, "random": random, "sharded": (*plain, "train.fsdp=true")}


@pytest.fixture(scope="module")
def done(runs, commands, tmp_path_factory):
    """Run directories of uninterrupted runs, by name."""
    folder = tmp_path_factory.mktemp("whole")
    named = {name: (*commands[name], f"run.dir={folder / name}") for name in commands}
    runs.together(named, sharded="two")
    return {name: folder / name for name in named}


@pytest.mark.parametrize("step", [5, BORDER, BORDER + 1])
def test_killed_within_an_epoch_or_where_a_phase_begins_it_ends_bit_identical(runs, commands, done, tmp_path, step):
    command = (*commands["random"], f"run.dir={tmp_path / 'run'}")
    assert runs.run(*command, before=KILLED_AT.format(step=step)).returncode == -9
    runs.finish(*command)
    assert backbone(tmp_path / "run") == backbone(done["random"])
    assert steps_logged(tmp_path / "run") == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_two_processes_then_one_then_two_draw_the_same_images(runs, commands, done, tmp_path, name):
    """The curve of one process, to the rounding that sums in another order have."""
    run = tmp_path / "run"
    command = (*commands[name], f"run.dir={run}")
    runs.finish(*command, "train.time_limit=0.0001", launcher="two")
    assert checkpoints(run) == [1]
    killed = runs.run(*command, before=KILLED_AT.format(step=BORDER))
    assert (killed.returncode, checkpoints(run)[-1]) == (-9, 6)
    assert "going on from step 6\n" in runs.finish(*command, launcher="two").stdout
    assert losses(run) == pytest.approx(losses(done["plain"]), rel=1e-3)


def test_sharded_it_resumes_bit_identically(runs, commands, done, tmp_path):
    run = copy_run(done["sharded"], tmp_path / "run", 9)
    runs.finish(*commands["sharded"], f"run.dir={run}", launcher="two")
    names = ("student", "teacher", "optimizer")
    files = [
        [(checkpoint(of, STEPS) / f"{name}.safetensors").read_bytes() for name in names]
        for of in (run, done["sharded"])
    ]
    assert files[0] == files[1]
