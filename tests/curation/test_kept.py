"""What a curation keeps as files: copied, linked or listed, from every source, into any folder or not at all."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dino.commands import curate as command
from dino.curation.kept import check_target, write_kept
from dino.data import open_images
from dino.data.manifest import write_manifest
from dino.errors import UserError
from tests.data.pools import archive, fill, png

NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/ü 3.png"]
KEPT = [0, 2, 3]


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos", NAMES)


def manifest_of(root, file: Path, kept=KEPT) -> Path:
    pool = open_images(root)
    rows = range(len(pool.names))
    columns = {"path": list(pool.names), "kept": [row in kept for row in rows], "weight": [2.0] * len(rows)}
    write_manifest(file, columns, str(root), pool.kind)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".dino-kept"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


EXPECTED = {NAMES[number]: png(number) for number in KEPT}


@pytest.mark.parametrize("way", ["copy", "link"])
def test_of_a_folder(photos, tmp_path, way):
    manifest = manifest_of(photos, tmp_path / "manifest.parquet")
    target = tmp_path / "kept"
    for _ in range(2):  # once more changes nothing
        assert write_kept(manifest, way, target) == 3
        assert contents(target) == EXPECTED
    assert (target / NAMES[0]).is_symlink() == (way == "link")
    assert sorted(open_images(target).names) == sorted(EXPECTED)


def test_an_interrupted_copy_goes_on(photos, tmp_path):
    manifest, target = manifest_of(photos, tmp_path / "manifest.parquet"), tmp_path / "kept"
    write_kept(manifest, "copy", target)
    (target / NAMES[0]).write_bytes(b"half")
    (target / NAMES[2]).unlink()
    check_target("copy", target, iter([str(photos)]))
    assert write_kept(manifest, "copy", target) == 3
    assert contents(target) == EXPECTED


def test_a_list_is_a_pool_of_the_same_images(photos, tmp_path):
    manifest, target = manifest_of(photos, tmp_path / "manifest.parquet"), tmp_path / "elsewhere.txt"
    assert write_kept(manifest, "list", target) == 3
    pool = open_images(target)
    assert [pool.content(index) for index in range(3)] == list(EXPECTED.values())


def test_of_archives_tables_and_several_roots(photos, tmp_path):
    zipped = archive(tmp_path / "more.zip", {"../../up.png": png(7), "c/5.png": png(8)})
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [png(9)], "n": [1]}), table)
    root = f"[{photos}, {zipped}, {table}]"
    manifest = manifest_of(root, tmp_path / "manifest.parquet", kept=range(7))
    write_kept(manifest, "copy", tmp_path / "deep" / "kept")
    copied = contents(tmp_path / "deep" / "kept")
    assert copied["photos/a/1.png"] == png(0)
    assert copied["more.zip/up.png"] == png(7)  # whatever it is called, it stays inside
    assert copied["more.zip/c/5.png"] == png(8)
    assert copied["rows.parquet/rows.parquet/00000000.png"] == png(9)
    assert len(copied) == 7
    with pytest.raises(UserError, match="no file that a link could lead to: use --copy"):
        write_kept(manifest, "link", tmp_path / "links")


def test_what_is_gone_is_left_out(photos, tmp_path, caplog):
    manifest = manifest_of(photos, tmp_path / "manifest.parquet")
    (photos / NAMES[0]).unlink()
    (photos / NAMES[0]).symlink_to("nowhere.png")
    for way in ("copy", "link"):
        assert write_kept(manifest, way, tmp_path / way) == 2
        assert f"left out: {NAMES[0]}" in caplog.text
        caplog.clear()


def test_images_of_another_curation_are_not_mixed_in(photos, tmp_path):
    write_kept(manifest_of(photos, tmp_path / "manifest.parquet"), "copy", tmp_path / "kept")
    with pytest.raises(UserError, match="what another curation kept"):
        write_kept(manifest_of(photos, tmp_path / "other.parquet", kept=[1]), "copy", tmp_path / "kept")
    with pytest.raises(UserError, match="what another curation kept"):
        write_kept(tmp_path / "manifest.parquet", "link", tmp_path / "kept")


@pytest.mark.parametrize(
    ("way", "target", "message"),
    [
        ("copy", "photos", "lie in each other"),
        ("link", "photos/kept", "lie in each other"),
        ("copy", ".", "lie in each other"),
        ("copy", "to_photos", "lie in each other"),
        ("copy", "full", "is not empty"),
        ("copy", "full/file", "is a file"),
        ("list", "full", r"ends in \.txt"),
        ("list", "kept.csv", r"ends in \.txt"),
    ],
)
def test_where_they_cannot_go_is_told_before_the_work(photos, tmp_path, monkeypatch, way, target, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "to_photos").symlink_to(photos)
    settings = [f"data.root={photos}", "weights=none", f"run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["dino curate", *settings, f"--{way}", str(tmp_path / target)])
    with pytest.raises(UserError, match=message):
        command.main()
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert sorted(open_images(photos).names) == sorted(NAMES)
