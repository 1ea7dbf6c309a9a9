"""Curation from images to a manifest, on to pre-training and back; killed, resumed, shared, changed, and fed badly."""

import json
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from launching import LAUNCHERS, LONGEST, REPOSITORY, TINY, error_of, metrics
from PIL import Image
from sklearn.datasets import load_digits

from dino.data.manifest import write_manifest

pytestmark = pytest.mark.slow

CURATE = REPOSITORY / "train" / "curate.py"
SMALL = (
    "clusters.counts=[12,3]",
    "clusters.iterations=10",
    "clusters.resamplings=1",
    "clusters.precision=fp32",
    "duplicates.similarity=0.995",
    "run.cpu_threads=1",
)
FOLDERS = [setting for setting in TINY if not setting.startswith("data.kind")]
EXITS = """
import os
from dino.curation import stage
finish, left = stage.Stage.finish, [{stages}]
def killed(self):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    finish(self)
stage.Stage.finish = killed
"""
EXITS_BETWEEN_PARTS = """
import os
from dino.curation import embed
part, left = embed._embed_part, [3]
def killed(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    part(*arguments)
embed._embed_part = killed
"""
SPLIT = "from dino.curation import embed, points; embed.PART = points.BLOCK = 16"  # 120 images are too few to be split
THEN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """120 digits of 48 pixels, uneven in number, with planted copies and a file that is no image."""
    root = tmp_path_factory.mktemp("pool")
    digits = load_digits()
    counts = dict.fromkeys(range(10), 0)
    for pixels, label in zip(digits.images, digits.target, strict=True):
        if counts[label] >= (40 if label < 2 else 5):
            continue
        counts[label] += 1
        (root / str(label)).mkdir(exist_ok=True)
        picture = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        picture.save(root / str(label) / f"{counts[label]:02d}.png")
    shutil.copy(root / "0" / "01.png", root / "9" / "equal.png")
    with Image.open(root / "1" / "02.png") as picture:
        picture.save(root / "8" / "encoded.jpg", quality=85)
    (root / "7" / "text.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def weights(runs, pool, tmp_path_factory):
    """A run on the pool as it is."""
    run = tmp_path_factory.mktemp("weights") / "run"
    runs.finish(*SETTINGS, f"data.root={pool}", f"run.dir={run}", settings=FOLDERS)
    return run


SETTINGS = (
    "train.steps=3",
    "views.global_size=16",
    "views.local_size=8",
    "data.max_unreadable=0.1",
    "train.batch_size=16",
)


def curate(runs, *arguments, launcher: str = "python", before: str = "") -> subprocess.CompletedProcess:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(f"{before}\n{THEN}")
        file.flush()
        script = [file.name, str(CURATE)] if before else [str(CURATE)]
        return _run(runs, [sys.executable, *LAUNCHERS[launcher], *script, *SMALL, *map(str, arguments)])


def _run(runs, command) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        env=runs.environment(OMP_NUM_THREADS="1"),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )


def finished(*arguments, **options) -> subprocess.CompletedProcess:
    done = curate(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def rows(run) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(run / "manifest.parquet").to_pylist()}


@pytest.fixture(scope="module")
def curated(runs, pool, weights, tmp_path_factory):
    """A finished curation."""
    run = tmp_path_factory.mktemp("curated") / "run"
    return run, finished(runs, f"data.root={pool}", f"weights={weights}", f"run.dir={run}")


def test_every_image_has_a_row_that_says_what_became_of_it(curated, pool):
    run, done = curated
    found = rows(run)
    assert len(found) == sum(path.suffix in (".png", ".jpg") for path in pool.rglob("*"))
    assert found["9/equal.png"]["duplicate_of"] == "0/01.png"
    assert found["9/equal.png"]["hash"] == found["0/01.png"]["hash"]
    assert {found["8/encoded.jpg"]["duplicate_of"], found["1/02.png"]["duplicate_of"]} & {"8/encoded.jpg", "1/02.png"}
    assert found["7/text.png"]["dropped"].startswith("unreadable: ")
    for row in found.values():
        assert row["kept"] == (row["weight"] > 0) == (row["dropped"] == "")
        assert (row["cluster_1"] >= 0) == (row["cluster_2"] >= 0) == (row["dropped"] in ("", "not chosen"))
        assert row["label"] == row["path"].split("/")[0]
    kept = [row for row in found.values() if row["kept"]]
    assert sum(row["weight"] for row in kept) == pytest.approx(len(kept))
    assert f"{len(found):,} images: {len(kept):,} kept" in done.stdout


def test_clusters_of_the_top_level_are_drawn_evenly(curated):
    found = [row for row in rows(curated[0]).values() if row["kept"]]
    shares = np.bincount([row["cluster_2"] for row in found], weights=[row["weight"] for row in found])
    assert shares.max() == pytest.approx(len(found) / 3, rel=1e-6)
    assert max(row["weight"] for row in found) <= 10 + 1e-9


def test_the_page_shows_it(curated):
    page = (curated[0] / "report.html").read_text()
    for title in (
        "What became of the images",
        "Effective numbers",
        "Shares of the 12 clusters",
        "The largest clusters",
        "Near copies",
    ):
        assert title in page
    assert page.count("<img") >= 5


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_killed_at_the_end_of_any_stage_it_ends_alike(runs, curated, pool, weights, tmp_path, stages):
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    killed = curate(runs, *arguments, before=EXITS.format(stages=stages))
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "run" / "manifest.parquet").exists()
    finished(runs, *arguments)
    assert rows(tmp_path / "run") == rows(curated[0])


def test_killed_between_parts_it_goes_on_with_those_that_are_left(runs, curated, pool, weights, tmp_path):
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    killed = curate(runs, *arguments, before=SPLIT + EXITS_BETWEEN_PARTS)
    assert killed.returncode == 9, killed.stderr
    parts = tmp_path / "run" / "embeddings" / "parts"
    before = {part: part.stat().st_mtime_ns for part in sorted(parts.glob("*.json"))}
    assert len(before) == 3
    finished(runs, *arguments, before=SPLIT)
    assert len(list(parts.glob("*.json"))) > 5
    assert {part: part.stat().st_mtime_ns for part in before} == before
    assert rows(tmp_path / "run").keys() == rows(curated[0]).keys()
    for name, row in rows(tmp_path / "run").items():
        assert (row["hash"], row["dropped"]) == (rows(curated[0])[name]["hash"], rows(curated[0])[name]["dropped"])


def test_two_processes_give_the_manifest_of_one(runs, curated, pool, weights, tmp_path):
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    done = finished(runs, *arguments, launcher="torchrun", before=SPLIT)
    assert len(list((tmp_path / "run" / "embeddings" / "parts").glob("*.json"))) > 5
    assert done.stdout.count("images:") == 1
    found, wanted = rows(tmp_path / "run"), rows(curated[0])
    for name, row in wanted.items():
        assert {key: value for key, value in found[name].items() if key != "distance"} == {
            key: value for key, value in row.items() if key != "distance"
        }


def test_a_changed_setting_begins_with_the_first_stage_that_it_touches(runs, curated, pool, weights, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(curated[0], run)
    embedded, copies = run / "embeddings" / "tokens.npy", run / "duplicates" / "copies.npz"
    before = embedded.stat().st_mtime_ns, copies.stat().st_mtime_ns
    finished(runs, f"data.root={pool}", f"weights={weights}", f"run.dir={run}", "clusters.counts=[6]")
    assert (embedded.stat().st_mtime_ns, copies.stat().st_mtime_ns) == before
    assert {row["cluster_1"] for row in rows(run).values()} == set(range(-1, 6))
    assert "cluster_2" not in next(iter(rows(run).values()))
    done = finished(runs, f"data.root={pool}", f"weights={weights}", f"run.dir={run}", "duplicates.near=0")
    assert copies.stat().st_mtime_ns != before[1]
    assert embedded.stat().st_mtime_ns == before[0]
    assert "1 duplicate" in done.stdout


def test_pretrain_on_the_manifest_then_curate_with_that(runs, curated, tmp_path):
    manifest, run = curated[0] / "manifest.parquet", tmp_path / "second"
    trained = runs.finish(*SETTINGS, f"data.root={manifest}", f"run.dir={run}", settings=FOLDERS)
    kept = sum(row["kept"] for row in rows(curated[0]).values())
    assert f"{kept} (manifest, 3 channels)" in trained.stdout
    assert len(metrics(run)) == 3
    finished(runs, f"data.root={manifest}", f"weights={run}", f"run.dir={tmp_path / 'again'}")
    again = rows(tmp_path / "again")
    assert len(again) == kept
    runs.finish(
        *SETTINGS,
        f"data.root={tmp_path / 'again' / 'manifest.parquet'}",
        f"run.dir={tmp_path / 'third'}",
        settings=FOLDERS,
    )


def test_a_subset_instead_of_weights(runs, pool, weights, tmp_path):
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    finished(runs, *arguments, "rebalance.output=subset", "rebalance.budget=30", "rebalance.repeats=1")
    found = [row for row in rows(tmp_path / "run").values() if row["kept"]]
    assert len(found) == 30
    assert {row["weight"] for row in found} == {1.0}
    assert sum(row["dropped"] == "not chosen" for row in rows(tmp_path / "run").values()) > 30


@pytest.mark.parametrize("retrieve", ["samples", "clusters"])
def test_retrieval_and_test_sets(runs, pool, weights, tmp_path, retrieve):
    """Seeds are the zeros; of the ones, one is in a test set."""
    (tmp_path / "seeds").mkdir()
    for number in range(1, 6):
        shutil.copy(pool / "0" / f"{number:02d}.png", tmp_path / "seeds")
    (tmp_path / "test").mkdir()
    shutil.copy(pool / "1" / "05.png", tmp_path / "test" / "picture.png")
    finished(
        runs,
        f"data.root={pool}",
        f"weights={weights}",
        f"run.dir={tmp_path / 'run'}",
        "rebalance.method=retrieval",
        f"rebalance.seeds={tmp_path / 'seeds'}",
        f"rebalance.retrieve={retrieve}",
        "rebalance.least=1",
        "rebalance.neighbours=1",
        f"duplicates.against=[{tmp_path / 'test'}]",
    )
    found = rows(tmp_path / "run")
    assert found["1/05.png"]["dropped"] == f"matches {tmp_path / 'test'}"
    kept = {name for name, row in found.items() if row["kept"]}
    seeds = {found[f"0/{number:02d}.png"]["duplicate_of"] or f"0/{number:02d}.png" for number in range(1, 6)}
    assert kept == seeds if retrieve == "samples" else seeds <= kept
    assert len(kept) < len(found) / 2 or retrieve == "clusters"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["clusters.counts=[5000]"], "clusters.counts=[5000] of "),
        (["clusters.cuonts=[3]"], "did you mean 'clusters.counts'?"),
        (["duplicates.against=[nowhere]"], "nowhere does not exist"),
    ],
)
def test_refused_with_a_message_that_names_the_fix(runs, pool, weights, tmp_path, settings, said):
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    assert said in error_of(curate(runs, *arguments, *settings))


def test_images_that_are_all_alike(runs, weights, tmp_path):
    (tmp_path / "pool").mkdir()
    for number in range(30):
        Image.new("RGB", (20, 20), (200, 10, 10)).save(tmp_path / "pool" / f"{number}.png")
    arguments = (f"data.root={tmp_path / 'pool'}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    assert "clusters.counts=[12, 3] of 1 points" in error_of(curate(runs, *arguments))
    finished(runs, *arguments, "clusters.counts=[]")
    assert sum(row["kept"] for row in rows(tmp_path / "run").values()) == 1


def test_another_folder_is_left_alone(runs, pool, weights, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    refused = curate(runs, f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path}")
    assert "is not empty and holds no curation" in error_of(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_directories_that_lie_in_each_other(runs, pool, weights, curated, tmp_path):
    """A manifest would be overwritten by itself, and a curation's files become images of the pool."""
    copy = tmp_path / "copy"
    shutil.copytree(curated[0], copy)
    columns = {"path": ["0/01.png"], "kept": [True], "weight": [1.0]}
    write_manifest(tmp_path / "of_copy.parquet", columns, str(copy / "manifest.parquet"), "manifest")
    (copy / "mine").mkdir()
    shutil.copy(pool / "0" / "01.png", copy / "mine")
    for root, run, *more in (
        (pool, pool / "run"),
        (copy / "manifest.parquet", copy),
        (tmp_path / "of_copy.parquet", copy),
        (pool, copy, f"duplicates.against=[{copy / 'mine'}]"),
    ):
        refused = curate(runs, f"data.root={root}", f"weights={weights}", f"run.dir={run}", *more)
        assert "lie in each other" in error_of(refused)
    assert (copy / "mine" / "01.png").exists()
    assert rows(copy) == rows(curated[0])


def test_a_pre_training_is_not_written_over(runs, pool, weights):
    before = (weights / "config.yaml").read_text()
    refused = curate(runs, f"data.root={pool}", f"weights={weights}", f"run.dir={weights}")
    assert "holds no curation" in error_of(refused)
    assert (weights / "config.yaml").read_text() == before


def test_images_that_a_test_set_gets_later_are_looked_for(runs, pool, weights, tmp_path):
    (tmp_path / "test").mkdir()
    shutil.copy(pool / "1" / "05.png", tmp_path / "test" / "first.png")
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    arguments += (f"duplicates.against=[{tmp_path / 'test'}]",)
    finished(runs, *arguments)
    assert not rows(tmp_path / "run")["1/06.png"]["dropped"]
    shutil.copy(pool / "1" / "06.png", tmp_path / "test" / "second.png")
    finished(runs, *arguments)
    assert rows(tmp_path / "run")["1/06.png"]["dropped"].startswith("matches ")


def test_another_pool_of_the_same_names_is_embedded_anew(runs, pool, weights, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    arguments = (f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    finished(runs, f"data.root={pool}", *arguments)
    shutil.copy(pool / "0" / "01.png", tmp_path / "pool" / "3" / "02.png")
    finished(runs, f"data.root={tmp_path / 'pool'}", *arguments)
    assert rows(tmp_path / "run")["3/02.png"]["duplicate_of"] == "0/01.png"


def test_copies_of_copies(runs, pool, weights, tmp_path):
    """More equal images than neighbours are looked at: the encoded ones are found behind them all the same."""
    (tmp_path / "pool").mkdir()
    for number in range(8):
        shutil.copy(pool / "0" / "01.png", tmp_path / "pool" / f"{number}.png")
        shutil.copy(pool / "8" / "encoded.jpg", tmp_path / "pool" / f"{number}.jpg")
    shutil.copy(pool / "1" / "02.png", tmp_path / "pool" / "like_encoded.png")
    arguments = (f"data.root={tmp_path / 'pool'}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    finished(runs, *arguments, "duplicates.neighbours=2", "clusters.counts=[1]")
    assert sum(row["kept"] for row in rows(tmp_path / "run").values()) == 2


@pytest.mark.parametrize(
    "settings",
    [
        ("rebalance.method=flat", "rebalance.smoothing=0.5", "clusters.spherical=false"),
        ("rebalance.method=none", "clusters.precision=bf16", "clusters.counts=[9]"),
    ],
)
def test_other_ways_to_rebalance(runs, pool, weights, curated, tmp_path, settings):
    finished(runs, f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}", *settings)
    found = rows(tmp_path / "run")
    kept = [row for row in found.values() if row["kept"]]
    assert {row["path"] for row in kept} == {row["path"] for row in rows(curated[0]).values() if row["kept"]}
    assert sum(row["weight"] for row in kept) == pytest.approx(len(kept))
    assert (len({round(row["weight"], 6) for row in kept}) == 1) == ("rebalance.method=none" in settings)


def test_nothing_to_draw_is_told(runs, pool, weights, tmp_path):
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    refused = curate(runs, *arguments, "rebalance.output=subset", "rebalance.repeats=0.001")
    assert "no image would be drawn" in error_of(refused)
    assert not (tmp_path / "run" / "manifest.parquet").exists()


def test_seeds_that_no_cluster_has_enough_of(runs, pool, weights, tmp_path):
    (tmp_path / "seeds").mkdir()
    shutil.copy(pool / "0" / "01.png", tmp_path / "seeds")
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    retrieval = ("rebalance.method=retrieval", f"rebalance.seeds={tmp_path / 'seeds'}", "rebalance.retrieve=clusters")
    assert "rebalance.least=4" in error_of(curate(runs, *arguments, *retrieval))


def test_parts_are_not_embedded_twice(runs, pool, weights, tmp_path):
    """A part that a killed run has left is taken as it is."""
    arguments = (f"data.root={pool}", f"weights={weights}", f"run.dir={tmp_path / 'run'}")
    finished(runs, *arguments)
    part = tmp_path / "run" / "embeddings" / "parts" / "000000.json"
    facts = json.loads(part.read_text())
    facts[0][0] = "f" * 32
    part.write_text(json.dumps(facts))
    (tmp_path / "run" / "embeddings" / "done.json").unlink()
    finished(runs, *arguments)
    assert "f" * 32 in {row["hash"] for row in rows(tmp_path / "run").values()}
