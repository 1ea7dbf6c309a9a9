"""Tar and Parquet shards: the same images whichever way they are named, read by place, indexed once."""

import io
import json
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pools import png
from torch.utils.data import DataLoader

from dino.data import UnreadableImage, open_images, stamp
from dino.data.decode import decode
from dino.data.sources import index
from dino.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))


def tar(path: Path, members: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return path


def web_dataset(folder: Path, shards: int = 3, images: int = 4) -> Path:
    for shard in range(shards):
        members = {}
        for number in range(shard * images, (shard + 1) * images):
            members[f"{number:04d}.png"] = png(number)
            members[f"{number:04d}.cls"] = f"{number % 3}\n".encode()
            members[f"{number:04d}.json"] = json.dumps({"breed": f"breed {number % 2}"}).encode()
        tar(folder / f"shard-{shard:03d}.tar", members)
    return folder


def hugging_face(path: Path, numbers: range, rows: int = 4) -> Path:
    """A file as `datasets` writes it."""
    cells = pa.array(
        [{"bytes": png(n), "path": None} for n in numbers], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    labels = pa.array([n % 2 for n in numbers], pa.int64())
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": cells, "label": labels, "breed": [f"b{n % 3}" for n in numbers]})
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(facts), path, row_group_size=rows)
    return path


def pixels(number: int) -> torch.Tensor:
    return decode(png(number), 3)


class TestTar:
    @pytest.mark.parametrize("way", ["", "/shard-{000..002}.tar", "/*.tar", "/shard-00{0,1,2}.tar"])
    def test_images_labels_and_shards(self, tmp_path, way):
        images = open_images(str(web_dataset(tmp_path / "pool")) + way)
        assert images.kind == "tar"
        assert list(images.names) == [f"shard-{n // 4:03d}.tar/{n:04d}.png" for n in range(12)]
        assert list(images.labels) == [str(n % 3) for n in range(12)]
        assert images.shards.tolist() == [n // 4 for n in range(12)]
        assert all(torch.equal(images.read(n), pixels(n)) for n in (11, 0, 5, 4))
        assert images.source.column("breed").to_pylist() == [f"breed {n % 2}" for n in range(12)]
        assert images.source.column("colour") is None

    def test_folders_inside_are_classes_where_no_cls_member_is(self, tmp_path):
        members = {"./cats/1.png": png(1), "./dogs/2.png": png(2), "./._cats/x.png": png(3), "notes.txt": b"!"}
        images = open_images(tar(tmp_path / "a.tar", members))
        assert list(images.names) == ["a.tar/cats/1.png", "a.tar/dogs/2.png"]
        assert list(images.labels) == ["cats", "dogs"]

    @pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_formats_links_repeated_and_long_names(self, tmp_path, format_):
        path = tmp_path / "a.tar"
        long = "é" * 40 + "/" + "n" * 60 + ".png"
        with tarfile.open(path, "w", format=format_) as archive:
            for name, number in ((long, 1), ("twice.png", 2), ("twice.png", 3)):
                facts = tarfile.TarInfo(name)
                facts.size = len(png(number))
                archive.addfile(facts, io.BytesIO(png(number)))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        images = open_images(path)
        assert list(images.names) == [f"a.tar/{long}", "a.tar/twice.png"]
        assert torch.equal(images.read(0), pixels(1))
        assert torch.equal(images.read(1), pixels(3))  # as unpacking it would leave

    def test_is_indexed_once_and_anew_when_a_shard_changes(self, tmp_path, monkeypatch):
        folder, looked_at = web_dataset(tmp_path / "pool"), []
        build = index.indexed

        def counting(file, format_, function):
            return build(file, format_, lambda file: looked_at.append(file.path) or function(file))

        monkeypatch.setattr("dino.data.sources.tar.indexed", counting)
        before = stamp(open_images(folder))
        assert (len(looked_at), stamp(open_images(folder)), len(looked_at)) == (3, before, 3)
        tar(folder / "shard-001.tar", {"new.png": png(50), "other.png": png(51)})
        images = open_images(folder)
        assert (len(looked_at), len(images.names)) == (4, 10)
        assert stamp(images) != before
        for kept in (tmp_path / "cache" / "indexes").iterdir():
            kept.write_bytes(kept.read_bytes()[:100])  # a damaged index is made anew
        assert list(open_images(folder).names) == list(images.names)

    def test_a_shard_that_changes_under_a_run_is_unreadable_or_other_bytes_never_a_crash(self, tmp_path):
        path = tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2)})
        images = open_images(path)
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(UnreadableImage, match="shorter"):
            images.read(1)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.tar.gz", b"\x1f\x8b", "compressed"),
            ("a.tar", b"", "cannot be read as a tar"),
            ("a.tar", b"x" * 2000, "cannot be read as a tar"),
            ("a.tar", b"\0" * 10240, "no image"),
        ],
    )
    def test_what_is_none_is_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            open_images(tmp_path / name)
        assert name in str(error.value)

    def test_cut_off(self, tmp_path):
        path = tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2) * 50})
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(UserError, match=r"a\.tar cannot be read"):
            open_images(path)

    def test_forked_and_pickled(self, tmp_path):
        images = open_images(web_dataset(tmp_path / "pool"))
        copy = pickle.loads(pickle.dumps(images))
        assert torch.equal(copy.read(7), pixels(7))


class TestParquet:
    def test_images_and_classes_by_name(self, tmp_path):
        for part, numbers in enumerate((range(10), range(10, 17))):
            hugging_face(tmp_path / "hf" / "data" / f"train-{part:05d}-of-00002.parquet", numbers)
        images = open_images(tmp_path / "hf")
        assert (images.kind, len(images.names)) == ("parquet", 17)
        assert images.names[11] == "train-00001-of-00002.parquet/00000001"
        assert list(images.labels) == [["cat", "dog"][n % 2] for n in range(17)]
        assert images.source.column("breed").to_pylist() == [f"b{n % 3}" for n in range(17)]
        assert all(torch.equal(images.read(n), pixels(n)) for n in (16, 0, 9, 10, 3))
        assert images.shards.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4] * 3  # row groups
        again = pickle.loads(pickle.dumps(images))
        assert torch.equal(again.read(12), pixels(12))

    def test_workers_read_the_same(self, tmp_path):
        images = open_images(hugging_face(tmp_path / "a.parquet", range(12)))
        images.read(0)  # a row group is kept when workers are forked

        class Reads(torch.utils.data.Dataset):
            def __getitem__(self, number):
                return images.read(number)

            def __len__(self):
                return 12

        loaded = list(DataLoader(Reads(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
        assert all(torch.equal(image, pixels(number)) for number, image in enumerate(loaded))

    def test_plain_bytes_weights_and_labels_without_names(self, tmp_path):
        table = {"jpg": [png(1), None, png(2)], "meta": [b"a", b"b", b"c"], "cls": [7, 8, 7], "weight": [1, 0, 3]}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        images = open_images(tmp_path / "a.parquet")
        assert list(images.labels) == ["7", "8", "7"]
        assert images.weights.tolist() == [0.5, 0, 1.5]
        with pytest.raises(UnreadableImage, match="no bytes"):
            images.read(1)

    def test_other_columns_in_another_file(self, tmp_path):
        hugging_face(tmp_path / "a.parquet", range(4))
        pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "b.parquet")
        with pytest.raises(UserError, match=r"b\.parquet has other columns"):
            open_images(tmp_path)

    def test_numbers_that_are_no_class_have_no_label(self, tmp_path):
        path = hugging_face(tmp_path / "a.parquet", range(4))
        table = pq.read_table(path)
        table = table.set_column(1, "label", pa.array([0, -1, 1, 0], pa.int64()))
        pq.write_table(table, path)
        assert open_images(path).labels is None  # test sets are published with −1

    @pytest.mark.parametrize("rows", [{"text": ["a"]}, {"height": [1.5], "width": [2.0]}])
    def test_without_images(self, tmp_path, rows):
        pq.write_table(pa.table(rows), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet"):
            open_images(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["tar", "parquet", "zip"])
def test_images_and_archives_beside_those_that_are_read_are_told(ending, tmp_path, caplog):
    folder = tmp_path / "mixed"
    if ending == "tar":
        web_dataset(folder)
    elif ending == "parquet":
        for number in range(3):
            hugging_face(folder / f"{number}.parquet", range(4))
    else:
        folder.mkdir()
        for number in range(3):
            with zipfile.ZipFile(folder / f"{number}.zip", "w") as archive:
                archive.writestr("a.png", png(number))
    open_images(folder)
    assert not caplog.records
    other = "zip" if ending == "tar" else "tar"
    for name in ("loose.png", f"other.{other}", "README.md", ".hidden.png"):
        (folder / name).write_bytes(b"")
    for _ in range(2):
        open_images(folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"read by its .{ending} files" in line
    assert {"1 .png (loose.png)", f"1 .{other} (other.{other})"} <= set(re.split(r"left out: |; |\. Move", line))


def test_names_take_little_memory():
    from dino.data.sources.source import packed

    names = packed(f"shard-{n // 10000:06d}.tar/{n:09d}.jpg" for n in range(10_000))
    assert names.nbytes / len(names) < 150
    assert np.array(names[0].as_py()).nbytes < 150
