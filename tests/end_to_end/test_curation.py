"""The command from images to a manifest, on to pre-training and back; killed for real, on two processes, refused."""

import shutil
from subprocess import CompletedProcess

import numpy as np
import pyarrow.parquet as pq
import pytest
from launching import REPOSITORY, TINY, error_of, metrics
from PIL import Image
from sklearn.datasets import load_digits

pytestmark = pytest.mark.slow

CURATE = REPOSITORY / "train" / "curate.py"
SMALL = "clusters.counts=[12,3] clusters.iterations=10 clusters.resamplings=1 clusters.precision=fp32 run.cpu_threads=1"
FOLDERS = [setting for setting in TINY if not setting.startswith("data.kind")]
TRAIN = [
    "train.steps=3",
    "train.batch_size=16",
    "data.max_unreadable=0.1",
    "views.global_size=16",
    "views.local_size=8",
]
SPLIT = "from dino.curation import embed, points; embed.PART = points.BLOCK = 16"  # 60 images are too few to be split
EXITS_BETWEEN_PARTS = """
import os
from dino.curation import embed
part, lives = embed._embed_part, [2]
def killed(*arguments):
    lives[0] -= 1
    if lives[0] < 0:
        os._exit(9)
    part(*arguments)
embed._embed_part = killed
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """60 digits of 48 pixels, one of them twice, and a file that is no image."""
    root = tmp_path_factory.mktemp("pool")
    for number, pixels in enumerate(load_digits().images[:60]):
        picture = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        picture.save(root / f"{number:02d}.png")
    shutil.copy(root / "00.png", root / "equal.png")
    (root / "text.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def weights(runs, pool, tmp_path_factory):
    """A run on the pool as it is."""
    run = tmp_path_factory.mktemp("weights") / "run"
    runs.finish(*TRAIN, f"data.root={pool}", f"run.dir={run}", settings=FOLDERS)
    return run


@pytest.fixture(scope="module")
def curate(runs, pool, weights):
    """Starts the command on the pool."""

    def start(run, *settings, two: bool = False, before: str = "") -> CompletedProcess:
        words = [CURATE, f"data.root={pool}", f"weights={weights}", *SMALL.split(), f"run.dir={run}", *settings]
        return runs.fork(words, two, before=before)

    return start


@pytest.fixture(scope="module")
def curated(curate, tmp_path_factory):
    """A curation that is done."""
    run = tmp_path_factory.mktemp("curated") / "run"
    done = curate(run, before=SPLIT)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def rows(run) -> list[dict]:
    return pq.read_table(run / "manifest.parquet").to_pylist()


def test_says_what_became_of_the_images(curated):
    run, output = curated
    kept = sum(row["kept"] for row in rows(run))
    assert f"62 images: {kept} kept, {61 - kept} duplicate, 1 unreadable" in output
    assert str(run / "manifest.parquet") in output
    assert (run / "report.html").exists()


def test_killed_between_parts_it_goes_on_with_those_that_are_missing(curate, curated, tmp_path):
    killed = curate(tmp_path / "run", before=SPLIT + EXITS_BETWEEN_PARTS)
    assert killed.returncode == 9, killed.stderr
    parts = tmp_path / "run" / "embeddings" / "parts"
    before = {part: part.stat().st_mtime_ns for part in parts.glob("*.json")}
    assert len(before) == 2
    done = curate(tmp_path / "run", before=SPLIT)
    assert done.returncode == 0, done.stderr
    assert len(list(parts.glob("*.json"))) == 4
    assert {part: part.stat().st_mtime_ns for part in before} == before
    assert rows(tmp_path / "run") == rows(curated[0])


def test_two_processes_give_the_manifest_of_one(curate, curated, tmp_path):
    done = curate(tmp_path / "run", two=True, before=SPLIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images:") == 1
    assert rows(tmp_path / "run") == rows(curated[0])


def test_pretrain_on_the_manifest_then_curate_with_that(runs, curate, curated, tmp_path):
    manifest, run = curated[0] / "manifest.parquet", tmp_path / "second"
    trained = runs.finish(*TRAIN, f"data.root={manifest}", f"run.dir={run}", settings=FOLDERS)
    kept = sum(row["kept"] for row in rows(curated[0]))
    assert f"{kept} (manifest, 3 channels)" in trained.stdout
    assert len(metrics(run)) == 3
    done = curate(tmp_path / "again", f"data.root={manifest}", f"weights={run}")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "again")) == kept
    manifest = tmp_path / "again" / "manifest.parquet"
    runs.finish(*TRAIN, f"data.root={manifest}", f"run.dir={tmp_path / 'third'}", settings=FOLDERS)


def test_a_pre_training_is_not_written_over(curate, weights):
    before = (weights / "config.yaml").read_text()
    assert "holds no curation" in error_of(curate(weights))
    assert (weights / "config.yaml").read_text() == before
