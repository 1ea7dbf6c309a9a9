"""`dino.curate` on pictures of digits: what becomes of each image, whatever is killed, changed, or fed badly."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import dino
from dino import run_lock
from dino.curation import embed
from dino.curation.stage import Stage
from dino.data.manifest import write_manifest
from dino.errors import UserError
from dino.models import VisionTransformer, ViTSpec, save_backbone

SMALL = {
    "clusters.counts": [12, 3],
    "clusters.iterations": 10,
    "clusters.resamplings": 1,
    "clusters.precision": "fp32",
    "duplicates.similarity": 0.995,
    "embed.workers": 0,
    "run.cpu_threads": 1,
}


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
def weights(tmp_path_factory):
    """A network that has learned nothing: near images still have near features."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    backbone = VisionTransformer(ViTSpec(16, 4, 2, 2, 32), initialisation="fan_in")
    save_backbone(file, backbone, {"image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}, {})
    return file


@pytest.fixture
def curate(pool, weights, tmp_path):
    """Curates into tmp_path/run unless told otherwise."""

    def call(data: Path = pool, run: Path = tmp_path / "run", **settings) -> dino.Curation:
        return dino.curate(data, run, weights, **SMALL | settings)

    return call


@pytest.fixture(scope="module")
def curation(pool, weights, tmp_path_factory):
    """A curation that is done."""
    return dino.curate(pool, tmp_path_factory.mktemp("curated") / "run", weights, **SMALL)


def rows(curation: dino.Curation) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(curation.manifest).to_pylist()}


def copied(files: list[Path], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number, file in enumerate(files):
        shutil.copy(file, folder / f"{number}{file.suffix}")
    return folder


class TestResult:
    def test_every_image_has_a_row_that_says_what_became_of_it(self, curation, pool):
        of_image = rows(curation)
        assert len(of_image) == sum(path.suffix in (".png", ".jpg") for path in pool.rglob("*"))
        assert of_image["9/equal.png"]["duplicate_of"] == "0/01.png"
        assert of_image["9/equal.png"]["hash"] == of_image["0/01.png"]["hash"]
        assert {of_image["8/encoded.jpg"]["duplicate_of"], of_image["1/02.png"]["duplicate_of"]} >= {"1/02.png", None}
        assert of_image["7/text.png"]["dropped"].startswith("unreadable: ")
        for row in of_image.values():
            assert row["kept"] == (row["weight"] > 0) == (row["dropped"] == "")
            assert (row["cluster_1"] >= 0) == (row["cluster_2"] >= 0) == (row["dropped"] in ("", "not chosen"))
            assert row["label"] == row["path"].split("/")[0]
        kept = [row for row in of_image.values() if row["kept"]]
        assert sum(row["weight"] for row in kept) == pytest.approx(len(kept))
        assert (curation.images, curation.kept) == (len(of_image), len(kept))
        assert sum(curation.dropped.values()) == len(of_image) - len(kept)
        assert curation.dropped["unreadable"] == 1

    def test_clusters_of_the_top_level_are_drawn_evenly(self, curation):
        kept = [row for row in rows(curation).values() if row["kept"]]
        draws = np.bincount([row["cluster_2"] for row in kept], weights=[row["weight"] for row in kept])
        assert draws.max() == pytest.approx(len(kept) / 3, rel=1e-6)
        assert max(row["weight"] for row in kept) <= 10 + 1e-9

    def test_the_page_shows_it(self, curation):
        page = curation.report.read_text()
        for title in ("What became of the images", "Effective numbers", "Shares of the 12 clusters", "Near copies"):
            assert title in page
        assert page.count("<img") >= 5

    def test_a_subset_instead_of_weights(self, curate):
        settings = {"rebalance.output": "subset", "rebalance.budget": 30, "rebalance.repeats": 1}
        of_image = rows(curate(**settings))
        kept = [row for row in of_image.values() if row["kept"]]
        assert len(kept) == 30
        assert {row["weight"] for row in kept} == {1.0}
        assert sum(row["dropped"] == "not chosen" for row in of_image.values()) > 30

    @pytest.mark.parametrize(
        "settings",
        [
            {"rebalance.method": "flat", "rebalance.smoothing": 0.5, "clusters.spherical": False},
            {"rebalance.method": "none", "clusters.precision": "bf16", "clusters.counts": [9]},
            {"clusters.parts": 3, "duplicates.cells": 6, "duplicates.probes": 6},
        ],
    )
    def test_other_ways_to_rebalance(self, curate, curation, settings):
        kept = {path: row["weight"] for path, row in rows(curate(**settings)).items() if row["kept"]}
        assert set(kept) == {path for path, row in rows(curation).items() if row["kept"]}
        assert sum(kept.values()) == pytest.approx(len(kept))
        is_even = len({round(weight, 6) for weight in kept.values()}) == 1
        assert is_even == (settings.get("rebalance.method") == "none")

    @pytest.mark.parametrize(("retrieve", "spherical"), [("samples", True), ("clusters", True), ("clusters", False)])
    def test_retrieval_and_test_sets(self, curate, pool, tmp_path, retrieve, spherical):
        """Seeds are five zeros; of the ones, one is in a test set, which gets another later."""
        settings = {
            "rebalance.method": "retrieval",
            "rebalance.seeds": str(copied([pool / "0" / f"{n:02d}.png" for n in range(1, 6)], tmp_path / "seeds")),
            "rebalance.retrieve": retrieve,
            "rebalance.least": 1,
            "rebalance.neighbours": 1,
            "clusters.spherical": spherical,
            "duplicates.against": [str(copied([pool / "1" / "05.png"], tmp_path / "test"))],
        }
        of_image = rows(curate(**settings))
        assert of_image["1/05.png"]["dropped"] == f"matches {tmp_path / 'test'}"
        kept = {name for name, row in of_image.items() if row["kept"]}
        seeds = {of_image[f"0/{n:02d}.png"]["duplicate_of"] or f"0/{n:02d}.png" for n in range(1, 6)}
        assert kept == seeds if retrieve == "samples" else seeds <= kept
        assert not of_image["1/06.png"]["dropped"].startswith("matches")
        copied([pool / "1" / "05.png", pool / "1" / "06.png"], tmp_path / "test")
        assert rows(curate(**settings))["1/06.png"]["dropped"].startswith("matches ")

    def test_copies_of_copies(self, curate, pool, tmp_path):
        """More equal images than neighbours are looked at: the encoded ones are seen behind them all the same."""
        copies = [pool / "0" / "01.png"] * 8 + [pool / "8" / "encoded.jpg"] * 8 + [pool / "1" / "02.png"]
        data = copied(copies, tmp_path / "pool")
        assert curate(data, **{"duplicates.neighbours": 2, "clusters.counts": [1]}).kept == 2


class TestResume:
    @pytest.mark.parametrize("stages", [0, 1, 2])
    def test_killed_at_the_end_of_any_stage_it_ends_alike(self, curate, curation, tmp_path, monkeypatch, stages):
        finish, calls = Stage.finish, []

        def mortal(self):
            calls.append(1)
            if len(calls) > stages:
                raise KeyboardInterrupt
            finish(self)

        with monkeypatch.context() as patch:
            patch.setattr(Stage, "finish", mortal)
            with pytest.raises(KeyboardInterrupt):
                curate()
        assert not (tmp_path / "run" / "manifest.parquet").exists()
        assert rows(curate()) == rows(curation)

    def test_parts_are_not_embedded_twice(self, curate, tmp_path):
        """A part that a killed run has written is taken as it is."""
        curate()
        part = tmp_path / "run" / "embeddings" / "parts" / "000000.json"
        facts = json.loads(part.read_text())
        facts[0][0] = "f" * 32
        part.write_text(json.dumps(facts))
        (tmp_path / "run" / "embeddings" / "done.json").unlink()
        assert "f" * 32 in {row["hash"] for row in rows(curate()).values()}

    def test_parts_change_nothing_but_the_batches(self, curate, curation, monkeypatch):
        monkeypatch.setattr(embed, "PART", 16)
        for name, row in rows(curate()).items():
            assert (row["hash"], row["dropped"]) == tuple(rows(curation)[name][key] for key in ("hash", "dropped"))

    def test_a_changed_setting_begins_with_the_first_stage_that_it_touches(self, curate, curation, tmp_path):
        run = tmp_path / "copy"
        shutil.copytree(curation.manifest.parent, run)
        embedded, copies = run / "embeddings" / "tokens.npy", run / "duplicates" / "copies.npz"
        before = embedded.stat().st_mtime_ns, copies.stat().st_mtime_ns
        clustered_anew = rows(curate(run=run, **{"clusters.counts": [6]}))
        assert (embedded.stat().st_mtime_ns, copies.stat().st_mtime_ns) == before
        assert {row["cluster_1"] for row in clustered_anew.values()} == set(range(-1, 6))
        assert "cluster_2" not in next(iter(clustered_anew.values()))
        without_near_copies = curate(run=run, **{"duplicates.near": 0})
        assert embedded.stat().st_mtime_ns == before[0]
        assert copies.stat().st_mtime_ns != before[1]
        assert without_near_copies.dropped["duplicate"] == 1

    def test_another_pool_of_the_same_names_is_embedded_anew(self, curate, pool, tmp_path):
        shutil.copytree(pool, tmp_path / "pool")
        curate()
        shutil.copy(pool / "0" / "01.png", tmp_path / "pool" / "3" / "02.png")
        assert rows(curate(tmp_path / "pool"))["3/02.png"]["duplicate_of"] == "0/01.png"


UNFINISHED = {
    "tokens of fewer images": ("tokens.npy", lambda file: np.save(file, np.zeros((3, 16), np.float16))),
    "tokens of another type": ("tokens.npy", lambda file: np.save(file, np.zeros((124, 16), np.int8))),
    "tokens that are none": ("tokens.npy", lambda file: file.write_bytes(b"\x93NUMPY")),
    "thumbnails of fewer images": ("thumbnails.npy", lambda file: np.save(file, np.zeros((3, 64, 64), np.uint8))),
    "facts of no image": ("parts/000000.json", lambda file: file.write_text("[]")),
    "facts of other types": ("parts/000000.json", lambda file: file.write_text(json.dumps([[1, 2, 3, 4]] * 124))),
    "facts of impossible sizes": (
        "parts/000000.json",
        lambda file: file.write_text(json.dumps([["a" * 32, -1, 2**40, ""]] * 124)),
    ),
}


@pytest.mark.parametrize(("name", "change"), UNFINISHED.values(), ids=UNFINISHED)
def test_what_an_unfinished_stage_has_left_may_be_damaged(curate, curation, tmp_path, name, change):
    """It has no digests yet."""
    run = shutil.copytree(curation.manifest.parent, tmp_path / "run")
    (run / "embeddings" / "done.json").unlink()
    change(run / "embeddings" / name)
    with pytest.raises(UserError, match=rf"{name.split('/')[-1]} is damaged.*: remove .* and start the same command"):
        curate(run=run)


class TestRefusals:
    @pytest.mark.parametrize("name", ["manifest.parquet", "report.html"])
    def test_what_is_in_the_way_of_its_files_is_told_at_once(self, curate, tmp_path, monkeypatch, name):
        monkeypatch.setattr("dino.curation.curate.curate_pool", None)  # it does not come to that
        (tmp_path / "run" / name).mkdir(parents=True)
        with pytest.raises(UserError, match=f"{name} is in the way of the run"):
            curate(run=tmp_path / "run")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"clusters.counts": [5000]}, r"clusters.counts=\[5000\] of "),
            ({"clusters.cuonts": [3]}, r"did you mean 'clusters.counts'\?"),
            ({"duplicates.against": ["nowhere"]}, "nowhere does not exist"),
            ({"rebalance.output": "subset", "rebalance.repeats": 0.001}, "no image would be drawn"),
            (
                {"rebalance.method": "retrieval", "rebalance.retrieve": "clusters", "rebalance.seeds": "one seed"},
                "rebalance.least=4",
            ),
        ],
    )
    def test_name_the_fix(self, curate, pool, tmp_path, settings, message):
        if "rebalance.seeds" in settings:
            settings = settings | {"rebalance.seeds": str(copied([pool / "0" / "01.png"], tmp_path / "seeds"))}
        with pytest.raises(UserError, match=message):
            curate(**settings)
        assert not (tmp_path / "run" / "manifest.parquet").exists()

    def test_images_that_are_all_alike(self, curate, tmp_path):
        (tmp_path / "pool").mkdir()
        for number in range(30):
            Image.new("RGB", (20, 20), (200, 10, 10)).save(tmp_path / "pool" / f"{number}.png")
        with pytest.raises(UserError, match=r"clusters.counts=\[12, 3\] of 1 points"):
            curate(tmp_path / "pool")
        assert curate(tmp_path / "pool", **{"clusters.counts": []}).kept == 1

    def test_another_curation_is_waited_for(self, curate, tmp_path, monkeypatch):
        monkeypatch.setattr(run_lock, "_lock", lambda descriptor: False)
        with pytest.raises(UserError, match="is in use by process"):
            curate(run=tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()

    def test_another_folder_is_left_alone(self, curate, tmp_path):
        """Also one of a pre-training, whose settings are others."""
        (tmp_path / "config.yaml").write_text("train: {steps: 3}")
        with pytest.raises(UserError, match="is not empty and holds no curation"):
            curate(run=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
        assert (tmp_path / "config.yaml").read_text() == "train: {steps: 3}"

    def test_directories_that_lie_in_each_other(self, curate, pool, curation, tmp_path):
        """A manifest would be overwritten by itself, and a curation's files become images of the pool."""
        copy = tmp_path / "copy"
        shutil.copytree(curation.manifest.parent, copy)
        columns = {"path": ["0/01.png"], "kept": [True], "weight": [1.0]}
        write_manifest(tmp_path / "of_copy.parquet", columns, str(copy / "manifest.parquet"), "manifest")
        own = copied([pool / "0" / "01.png"], copy / "own")
        for data, run, against in (
            (pool, pool / "run", []),
            (copy / "manifest.parquet", copy, []),
            (tmp_path / "of_copy.parquet", copy, []),
            (pool, copy, [str(own)]),
        ):
            with pytest.raises(UserError, match="lie in each other"):
                curate(data, run, **{"duplicates.against": against})
        assert (copy / "manifest.parquet").read_bytes() == curation.manifest.read_bytes()
