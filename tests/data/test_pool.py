"""A pool: what the program sees of a source, what its index costs, and how a wrong one is refused."""

import pickle
import tracemalloc
import zipfile
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pools import archive, fill, noise_pool, png

from dino.data import Pool, UnreadableImage, fingerprint, open_images, read_or_reason, samples_per_epoch, stamp
from dino.data.sources import SOURCES, Kind
from dino.data.sources.source import Source, packed
from dino.data.sources.zip import MEMBER
from dino.errors import UserError


class Named(Source):
    """A source of which only names and labels are asked."""

    def __init__(self, names, labels=None):
        self.names, self.labels = packed(names), None if labels is None else packed(labels).dictionary_encode()


NAMES, LABELS = ["b/1.png", "a/2.png", "c/é.png", "b/\udce9.png"], ["b", "a", "c", "b"]


class TestNamesAndLabels:
    @pytest.mark.parametrize("indices", [None, [3, 0, 1], [2]])
    def test_are_those_of_the_source_at_the_pools_indices(self, indices):
        pool = Pool(Named(NAMES, LABELS), "x", 3, None if indices is None else np.array(indices))
        rows = range(4) if indices is None else indices
        names, labels = [NAMES[row] for row in rows], [LABELS[row] for row in rows]
        for column, expected in ((pool.names, names), (pool.labels, labels)):
            assert list(column) == expected
            assert [column[index] for index in range(len(column))] == expected
            assert column[np.int64(0)] == column[-len(column)] == expected[0]
            assert column[1:] == expected[1:]
            with pytest.raises(IndexError):
                column[len(column)]
        assert pool.labels.classes == sorted(set(labels))
        assert [pool.labels.classes[code] for code in pool.labels.codes] == labels

    def test_a_subset_of_a_subset(self):
        pool = Pool(Named(NAMES, LABELS), "x", 3).subset(np.array([3, 0, 1]), "y")
        part = pool.subset(np.array([2, 0]), "z", np.array([0.5, 2.9]))
        assert (list(part.names), list(part.labels), part.kind) == (["a/2.png", "b/\udce9.png"], ["a", "b"], "z")
        assert (samples_per_epoch(pool), samples_per_epoch(part)) == (3, 3)

    def test_an_image_costs_less_than_150_bytes(self):
        """Names of 60 characters with labels, a subset and weights; an archive's table of members comes on top."""
        count, before = 200_000, pa.total_allocated_bytes()
        source = Named((f"{'x' * 49}{index:011d}" for index in range(count)), ["a", "b"] * (count // 2))
        tracemalloc.start()
        pool = Pool(source, "x", 3).subset(np.arange(count)[::-1].copy(), "y", np.ones(count))
        assert len(pool.names[0]) == 60
        cost = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        assert 60 * count < cost < (150 - MEMBER.itemsize) * count
        assert len(pickle.dumps(pool)) < 150 * count  # what a spawned worker gets


class TestFingerprint:
    def test_changes_with_names_their_order_and_weights(self):
        pools = [(["a", "b"],), (["a"],), (["b", "a"],), (["ab"],), (["a", "b", "c"],), (["a", "b"], np.ones(2))]
        digests = {fingerprint(Pool(Named(names), "x", 3, None, *weights)) for names, *weights in pools}
        assert len(digests) == len(pools)
        assert fingerprint(Pool(Named(["a", "b"]), "other", 1)) in digests

    def test_stamp_is_the_sources(self):
        pool = noise_pool([(4, 4)] * 3)
        assert stamp(pool) == stamp(pool.subset(np.array([1]), "y")) == "noise"


def test_read_or_reason():
    pool = noise_pool([(4, 4)] * 3, unreadable=(1,))
    image, reason = read_or_reason(pool, 0)
    assert torch.equal(image, pool.source.pixels[0])
    assert reason == ""
    assert read_or_reason(pool, 1) == (None, "1 is broken")
    pool.source.read = Mock(side_effect=UnreadableImage)
    assert read_or_reason(pool, 1) == (None, "unreadable")
    pool.source.read = Mock(side_effect=MemoryError)  # no fault of the image
    with pytest.raises(MemoryError):
        read_or_reason(pool, 1)


class TestTransform:
    def test_is_done_to_every_image_that_is_read(self, tmp_path):
        root = fill(tmp_path, ["a.png", "b.png"])
        images, plain = open_images(root, transform=lambda image: image[:, 2:, :6]), open_images(root)
        for index in range(2):
            assert torch.equal(images.read(index), plain.read(index)[:, 2:, :6])
        part = images.subset(np.array([1]), "x")
        assert torch.equal(part.read(0), plain.read(1)[:, 2:, :6])

    def test_sees_the_whole_of_a_large_photograph(self, tmp_path):
        Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
        assert open_images(str(tmp_path)).read(0, enough=32 * 24).shape == (3, 24, 32)
        images = open_images(str(tmp_path), transform=lambda image: image[:, :40])
        assert images.read(0, enough=32 * 24).shape == (3, 40, 64)

    @pytest.mark.parametrize(
        "transform", [lambda image: image / 255, lambda image: image[:1], lambda image: image.flatten(), np.asarray]
    )
    def test_what_is_no_image_any_more_is_the_users_to_mend(self, tmp_path, transform):
        images = open_images(fill(tmp_path, ["a.png"]), transform=transform)
        with pytest.raises(UserError, match=r"the transform must give uint8 \(3, H, W\)"):
            images.read(0)


class TestOpening:
    def test_a_source_is_one_class_and_one_line(self, monkeypatch):
        class Three(Named):
            def __init__(self, root: str):
                super().__init__(["x", "y", root])

            def read(self, index: int) -> torch.Tensor:
                return torch.full((1, 4 if index < 2 else 2, 4), index, dtype=torch.uint8)

        kind = Kind(Three, accepts=lambda root: root.startswith("three://"), noun="a three", channels=1)
        monkeypatch.setitem(SOURCES, "three", kind)
        for images in (open_images("three://z", "three"), open_images("three://z")):
            assert (images.kind, images.channels, list(images.names)) == ("three", 1, ["x", "y", "three://z"])
            assert images.read(1).unique().tolist() == [1]
        assert "too few" in read_or_reason(images, 2)[1]
        assert "data.channels is 3" in read_or_reason(open_images("three://z", channels=3), 0)[1]
        with pytest.raises(UserError, match=r"neither .* a folder nor a zip archive nor .* a three"):
            open_images(__file__, "three")

    @pytest.mark.parametrize(
        ("root", "kind", "message"),
        [
            ("", "auto", r"data\.root="),
            ("", "manifest", r"data\.root="),
            ("missing", "auto", "missing does not exist"),
            ("missing", "zip", "missing does not exist"),
            ("missing", "dataset", "handed in from Python"),
            ("missing.parquet", "auto", "missing.parquet does not exist"),
            ("pool", "fodler", "no kind of data is called fodler: .*did you mean folder"),
            ("pool", "zip", r"data\.kind=zip.* is a folder: use data\.kind=folder"),
            ("p.zip", "folder", r"data\.kind=folder.* is a zip archive: use data\.kind=zip"),
            ("text", "auto", r"no image .*\.jpg, .*\.png.*\.webp.*\.tiff.*\.npy"),
            ("text.zip", "auto", r"no image .*\.jpg, .*\.png"),
            ("empty.zip", "auto", "neither .* a folder nor a zip"),
            ("png.zip", "zip", "neither .* a folder nor a zip"),
            ("truncated.zip", "auto", r"truncated\.zip"),
        ],
    )
    def test_what_cannot_be_opened_is_told(self, tmp_path, root, kind, message):
        fill(tmp_path / "pool", ["a.png"])
        archive(tmp_path / "p.zip", {"a.png": png(0)})
        fill(tmp_path / "text", ["readme.txt"])
        archive(tmp_path / "text.zip", {"readme.txt": b"hello"})
        (tmp_path / "empty.zip").write_bytes(b"")
        (tmp_path / "png.zip").write_bytes(png(0))
        whole = archive(tmp_path / "truncated.zip", {f"{number}.png": png(number) for number in range(20)})
        whole.write_bytes(whole.read_bytes()[:-40])
        with pytest.raises(UserError, match=message):
            open_images(root and str(tmp_path / root), kind)

    def test_a_damaged_list_of_members_is_told(self, tmp_path):
        path = archive(tmp_path / "p.zip", {"a.png": png(0)})
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x01\x02")] ^= 255
        path.write_bytes(content)
        assert zipfile.is_zipfile(path)
        with pytest.raises(UserError, match="cannot be read as a zip archive"):
            open_images(path)

    def test_digits_in_colour(self):
        with pytest.raises(UserError, match="1 channel"):
            open_images("", "digits", 3)
