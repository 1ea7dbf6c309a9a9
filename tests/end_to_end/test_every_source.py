"""Everything that reads images takes them from every source: the same pictures give the same features everywhere."""

import io
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import random_backbone, write_own
from launching import TINY
from PIL import Image

import dino
from dino import cli
from dino.models import ViTSpec

COUNT, CLASSES = 24, ("cat", "dog")


def content(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path) -> str:
    for number in range(COUNT):
        (path / CLASSES[number % 2]).mkdir(parents=True, exist_ok=True)
        (path / CLASSES[number % 2] / f"{number:02d}.png").write_bytes(content(number))
    return str(path)


def zipped(path: Path) -> str:
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for number in range(COUNT):
            archive.writestr(f"{CLASSES[number % 2]}/{number:02d}.png", content(number))
    return str(path / "a.zip")


def listed(path: Path) -> str:
    folder(path)
    rows = [f"{CLASSES[n % 2]}/{n:02d}.png,{CLASSES[n % 2]}" for n in range(COUNT)]
    (path / "list.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    return str(path / "list.csv")


def tars(path: Path) -> str:
    for shard in range(3):
        with tarfile.TarFile(path / f"s-{shard}.tar", "w") as archive:
            for number in range(shard * 8, shard * 8 + 8):
                label = CLASSES[number % 2].encode()
                for name, part in ((f"{number:02d}.png", content(number)), (f"{number:02d}.cls", label)):
                    facts = tarfile.TarInfo(name)
                    facts.size = len(part)
                    archive.addfile(facts, io.BytesIO(part))
    return f"{path}/s-{{0..2}}.tar"


def parquet(path: Path) -> str:
    images = pa.array([{"bytes": content(n), "path": None} for n in range(COUNT)])
    table = pa.table({"image": images, "label": [CLASSES[n % 2] for n in range(COUNT)]})
    pq.write_table(table, path / "train.parquet", row_group_size=5)
    return str(path)


def remote(path: Path) -> str:
    files = fsspec.filesystem("memory")
    for number in range(COUNT):
        files.pipe_file(f"/every/{CLASSES[number % 2]}/{number:02d}.png", content(number))
    return "memory://every"


def several(path: Path) -> str:
    (path / "one").mkdir()
    root = parquet(path / "one")
    return f"[{root}, {zipped(path)}]"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pool").mkdir()
    return write_own(tmp_path / "weights", random_backbone(ViTSpec(16, 1, 2, patch_size=4, image_size=12)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [zipped, listed, tars, parquet, remote])
def test_features_are_those_of_the_folder(make: Callable[[Path], str], weights, tmp_path):
    features = [dino.embed(weights, root) for root in (make(tmp_path / "pool"), folder(tmp_path / "same"))]
    tokens, expected = (part.class_tokens[np.argsort(part.class_tokens[:, 0], kind="stable")] for part in features)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-5)
    assert sorted(features[0].labels) == sorted(features[1].labels)


@pytest.mark.slow
def test_several_are_trained_on_curated_judged_and_shown(weights, tmp_path, monkeypatch):
    root = several(tmp_path / "pool")
    curation = dino.curate(root, tmp_path / "curated", weights=weights, **{"duplicates.near": 0, "embed.workers": 0})
    assert (curation.images, curation.kept) == (2 * COUNT, COUNT)
    given = (setting.split("=", 1) for setting in TINY if not setting.startswith("data.kind"))
    values = {key: yaml.safe_load(text) for key, text in given}
    own = {"train.steps": 2, "train.batch_size": 8, "data.order": "shards", "data.window": 6, "data.channels": 3}
    assert dino.train(curation.manifest, tmp_path / "run", **values | own).metrics
    for command in (["knn"], ["visualize", "--out", str(tmp_path / "pictures"), "--rows", "2"]):
        monkeypatch.setattr(sys, "argv", ["dino", *command, "--weights", str(weights), "--data", root])
        cli.main()
    assert (tmp_path / "pictures" / "page.html").exists()
