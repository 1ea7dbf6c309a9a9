"""Object storage through fsspec: the same pools as from the disk, and each block fetched once."""

import shutil

import fsspec
import pytest
import torch
from pools import fill, png
from test_shards import hugging_face, pixels, web_dataset

from dino.data import UnreadableImage, open_images, stamp
from dino.data.sources import storage
from dino.data.sources.storage import File, braces_expanded, files_of, read
from dino.errors import UserError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """memory://bucket; its `fetched` lists what was asked of it."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    fetched = []
    original = type(memory).cat_file

    def counting(self, path, start=None, end=None, **options):
        fetched.append((path, start, end))
        return original(self, path, start, end, **options)

    monkeypatch.setattr(type(memory), "cat_file", counting)
    monkeypatch.setattr(storage, "BLOCKS", storage._Blocks())
    memory.fetched = fetched
    yield memory
    memory.store.clear()


def upload(bucket, folder, to):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.pipe_file(f"/bucket/{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_image_files(bucket, tmp_path):
    upload(
        bucket, fill(tmp_path / "pool", ["cats/1.png", "cats/2.png", "dogs/3.png", "notes.txt", "cats/.x.png"]), "pool"
    )
    images = open_images("memory://bucket/pool")
    assert (images.kind, list(images.names)) == ("remote", ["cats/1.png", "cats/2.png", "dogs/3.png"])
    assert list(images.labels) == ["cats", "cats", "dogs"]
    assert all(torch.equal(images.read(n), pixels(n)) for n in (2, 0, 1))
    assert list(open_images("memory://bucket/pool/cats/*.png").names) == ["1.png", "2.png"]
    bucket.pipe_file("/bucket/pool/dogs/3.png", png(9) + b"!")
    assert stamp(open_images("memory://bucket/pool")) != stamp(images)


@pytest.mark.parametrize(
    ("make", "kind"), [(web_dataset, "tar"), (lambda p: hugging_face(p / "a.parquet", range(12)), "parquet")]
)
def test_shards_are_the_same_pool_as_on_the_disk(bucket, tmp_path, make, kind):
    make(tmp_path / "pool")
    upload(bucket, tmp_path / "pool", "pool")
    images, local = open_images("memory://bucket/pool"), open_images(tmp_path / "pool")
    assert (images.kind, list(images.names), list(images.labels)) == (kind, list(local.names), list(local.labels))
    assert all(torch.equal(images.read(n), pixels(n)) for n in (11, 0, 5))
    bucket.fetched.clear()
    again = open_images("memory://bucket/pool")
    assert [again.read(n) is not None for n in range(12)] == [True] * 12
    assert bucket.fetched == []  # all is on the disk


def test_only_what_is_asked_for_once_the_disk_is_full(bucket, tmp_path, monkeypatch):
    bucket.pipe_file("/bucket/a.bin", bytes(range(256)) * 4)
    file = files_of("memory://bucket/a.bin", ())[0]
    monkeypatch.setattr(storage, "BLOCK", 256)
    monkeypatch.setenv("DINO_BLOCK_CACHE", str(512 / 2**30))  # two blocks
    assert read(file, 10, 300) == (bytes(range(256)) * 4)[10:310]
    assert read(file, 700, 10) == (bytes(range(256)) * 4)[700:710]
    assert bucket.fetched == [("/bucket/a.bin", 0, 256), ("/bucket/a.bin", 256, 512), ("/bucket/a.bin", 700, 710)]
    bucket.fetched.clear()
    assert (read(file, 0, 1), bucket.fetched) == (b"\0", [])
    monkeypatch.setenv("DINO_BLOCK_CACHE", "0")
    shutil.rmtree(tmp_path / "cache")
    assert (read(file, 0, 1), bucket.fetched) == (b"\0", [("/bucket/a.bin", 0, 1)])
    monkeypatch.setenv("DINO_BLOCK_CACHE", "all of it")
    with pytest.raises(UserError, match="DINO_BLOCK_CACHE=all of it is no number of GiB"):
        read(file, 0, 1)


@pytest.mark.parametrize("change", [lambda b: b"\1" + b[1:], lambda b: b[:-1], lambda b: b"", lambda b: b[:-32]])
def test_a_block_that_has_changed_on_the_disk_is_fetched_again(bucket, tmp_path, monkeypatch, change):
    bucket.pipe_file("/bucket/a.bin", bytes(range(256)))
    file = files_of("memory://bucket/a.bin", ())[0]
    read(file, 0, 1)
    (block,) = (tmp_path / "cache" / "blocks").glob("*/*")
    block.write_bytes(change(block.read_bytes()))
    monkeypatch.setattr(storage.BLOCKS, "whole", set())  # as of another process
    bucket.fetched.clear()
    assert [read(file, 0, 256), read(file, 3, 2)] == [bytes(range(256)), b"\3\4"]
    assert bucket.fetched == [("/bucket/a.bin", 0, 256)]


def test_what_is_gone_is_unreadable(bucket):
    bucket.pipe_file("/bucket/a.png", png(1))
    images = open_images("memory://bucket/*.png")
    bucket.rm("/bucket/a.png")
    with pytest.raises(UnreadableImage):
        images.read(0)


@pytest.mark.parametrize("root", ["memory://bucket/nothing", "memory://bucket/nothing/*.png", "memory://bucket/x.tar"])
def test_nothing_there(bucket, root):
    with pytest.raises(UserError, match="bucket"):
        open_images(root)


def test_a_storage_whose_package_is_missing_is_named(bucket):
    with pytest.raises(UserError, match="unheard"):
        open_images("unheard://bucket/images")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(pattern, names):
    assert braces_expanded(pattern) == names


@pytest.mark.parametrize("pattern", ["{5..1}.tar", "{0..99999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_braces_that_stand_for_nothing_or_for_too_much(pattern):
    with pytest.raises(UserError, match="stands for"):
        braces_expanded(pattern)


def test_bytes_outside_a_file_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    file = File(str(tmp_path / "a"), 5, "")
    assert read(file, 2, 3) == b"345"
    for offset, length in ((-1, 2), (4, 2), (0, -1)):
        with pytest.raises(UnreadableImage):
            read(file, offset, length)
