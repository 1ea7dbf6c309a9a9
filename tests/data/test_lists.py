"""Lists of paths, and several roots as one pool."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pools import archive, fill, png

from dino.config.read import read
from dino.config.schema import Config
from dino.data import EpochStream, UnreadableImage, open_images, samples_per_epoch, stamp
from dino.data.decode import decode
from dino.data.manifest import read_manifest, write_manifest
from dino.errors import UserError

NAMES = ["b/1.png", "a/2.png", "a/ü 3.png"]


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "lists", NAMES)


class TestLists:
    def test_a_text_file(self, folder):
        (folder / "list.txt").write_bytes("\r\n".join([*NAMES, "", "  "]).encode())
        images = open_images(folder / "list.txt")
        assert (images.kind, list(images.names), list(images.labels)) == ("list", NAMES, ["b", "a", "a"])
        assert all(torch.equal(images.read(n), decode(png(n), 3)) for n in (2, 0, 1))

    @pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
    def test_a_table_with_labels_and_weights(self, folder, ending):
        table = {
            "id": [7, 8, 9],
            "File_Name": NAMES,
            "label": ["x", "y", "x"],
            "weight": [0.0, 1, 3],
            "breed": [1, 2, 3],
        }
        path = folder / f"list.{ending}"
        if ending == "parquet":
            pq.write_table(pa.table(table), path)
        else:
            sign = {"csv": ",", "tsv": "\t"}[ending]
            path.write_text("\n".join(sign.join(map(str, row)) for row in [table, *zip(*table.values(), strict=True)]))
        images = open_images(path)
        assert (images.kind, list(images.names), list(images.labels)) == ("list", NAMES, ["x", "y", "x"])
        assert images.weights.tolist() == [0, 0.5, 1.5]
        assert samples_per_epoch(images) == 2
        assert images.source.column("breed").to_pylist() == ["1", "2", "3"]

    def test_absolute_paths_and_what_is_not_there(self, folder, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        lines = [str(folder / NAMES[0]), "nowhere.png", str(tmp_path / "pipe.png")]
        (folder / "list.txt").write_text("\n".join(lines))
        images = open_images(folder / "list.txt")
        assert torch.equal(images.read(0), decode(png(0), 3))
        for index in (1, 2):
            with pytest.raises(UnreadableImage):
                images.read(index)

    def test_stamp_changes_with_an_image_and_with_the_list(self, folder):
        (folder / "list.txt").write_text("\n".join(NAMES))
        stamps = {stamp(open_images(folder / "list.txt"))}
        (folder / NAMES[1]).write_bytes(png(7) + b"!")
        stamps.add(stamp(open_images(folder / "list.txt")))
        (folder / "list.txt").write_text("\n".join(NAMES[:2]))
        stamps.add(stamp(open_images(folder / "list.txt")))
        assert len(stamps) == 3

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "path,label\nx.png,1\nx.png,2\n", "twice"),
            ("a.csv", "height,width\n1,2\n", "no column of paths"),
            ("a.csv", "path,weight\nx.png,-1\n", "from 0 on, row 1"),
            ("a.csv", "path,weight\nx.png,0\n", "no weight"),
            ("a.csv", "path,weight\nx.png,many\n", "must be numbers"),
            ("a.csv", "path\n", "lists no image"),
            ("a.csv", "", "cannot be read"),
            ("a.csv", "path,label\nx.png\n", "cannot be read"),
            ("a.txt", "\n\n", "lists no image"),
        ],
    )
    def test_what_is_none_is_named(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as error:
            open_images(tmp_path / name)
        assert name in str(error.value)


class TestSeveralRoots:
    def roots(self, tmp_path):
        one, other = (
            fill(tmp_path / "x" / "photos", ["a/1.png", "b/2.png"]),
            fill(tmp_path / "y" / "photos", ["a/1.png", "c/2.png"]),
        )
        zipped = archive(tmp_path / "more.zip", {"b/1.png": png(5), "d/2.png": png(6)})
        return [str(one), str(other), str(zipped)]

    def test_are_one_pool(self, tmp_path):
        roots = self.roots(tmp_path)
        images = open_images(roots)
        photos = ["photos-1/a/1.png", "photos-1/b/2.png", "photos-2/a/1.png", "photos-2/c/2.png"]
        assert list(images.names) == [*photos, "more.zip/b/1.png", "more.zip/d/2.png"]
        assert list(images.labels) == list("abacbd")
        assert all(torch.equal(images.read(n), decode(png(s), 3)) for n, s in enumerate([0, 1, 0, 1, 5, 6]))
        as_text = open_images(f"[{', '.join(roots)}]", "several")
        assert (list(as_text.names), stamp(as_text)) == (list(images.names), stamp(images))
        assert as_text.kind == images.kind == "several"

    def test_weights_where_one_root_has_some(self, tmp_path):
        folder = fill(tmp_path / "a", ["1.png", "2.png"])
        listed = fill(tmp_path / "b", ["3.png", "4.png"])
        (listed / "list.csv").write_text("path,weight\n3.png,1\n4.png,3\n")
        images = open_images([folder, listed / "list.csv"])
        assert images.weights.tolist() == [1, 1, 0.5, 1.5]
        assert images.labels is None

    def test_a_manifest_of_them_leads_back_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.roots(tmp_path)
        root = "[x/photos, more.zip]"
        images = open_images(root)
        columns = {"path": list(images.names), "kept": [True, False, True, True], "weight": [1.0, 0, 2, 1]}
        write_manifest(tmp_path / "manifest.parquet", columns, root, images.kind)
        monkeypatch.chdir("/")
        assert read_manifest(tmp_path / "manifest.parquet").kind == "several"
        again = open_images(tmp_path / "manifest.parquet")
        assert list(again.names) == ["photos/a/1.png", "more.zip/b/1.png", "more.zip/d/2.png"]
        assert torch.equal(again.read(2), decode(png(6), 3))

    def test_a_folder_of_zips_is_all_of_them(self, tmp_path):
        (tmp_path / "zips").mkdir()
        for number in range(2):
            archive(tmp_path / "zips" / f"{number}.zip", {f"{number}.png": png(number)})
        for root in (tmp_path / "zips", str(tmp_path / "zips" / "{0..1}.zip"), str(tmp_path / "zips" / "*.zip")):
            assert list(open_images(root).names) == ["0.zip/0.png", "1.zip/1.png"]

    @pytest.mark.parametrize("root", ["[", "[]", "[a, [b]]", "[a-{1..2}.tar, b]", "[a"])
    def test_what_is_no_list_of_roots(self, root):
        with pytest.raises(UserError):
            open_images(root)

    def test_a_folder_that_is_called_like_a_list(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fill(tmp_path / "[a, b]", ["1.png"])
        assert open_images("[a, b]").kind == "folder"

    def test_in_yaml_and_on_the_command_line(self, tmp_path):
        (tmp_path / "config.yaml").write_text("data: {root: [photos, 'scans, old.zip', '[x]']}\n")
        root = read(Config, tmp_path / "config.yaml").data.root
        assert root == read(Config, None, {"data.root": ["photos", "scans, old.zip", "[x]"]}).data.root
        assert root == read(Config, None, [f"data.root={root}"]).data.root
        with pytest.raises(UserError, match="photos does not exist"):
            open_images(root)


class TestShardsInTurn:
    SHARDS = np.repeat(np.arange(10, dtype=np.int32), 7)

    def order(self, stream, epoch):
        steps = range(epoch * 10, (epoch + 1) * 10)
        return [image for step in steps for _, image in stream.batch(step)]

    @pytest.mark.parametrize("window", [1, 5, 14, 1000])
    def test_every_image_once_an_epoch_near_its_shard(self, window):
        stream = EpochStream(70, 7, 3, shards=self.SHARDS, window=window)
        orders = [self.order(stream, epoch) for epoch in range(4)]
        assert all(sorted(order) == list(range(70)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4
        for order in orders:
            shards = self.SHARDS[order]
            open_at_once = [len(set(shards[start : start + window])) for start in range(0, 70 - window, 7)]
            assert all(count <= 2 * window / 7 + 2 for count in open_at_once)
        if window == 1:
            assert all(np.count_nonzero(np.diff(self.SHARDS[order])) == 9 for order in orders)

    def test_weights_hold(self):
        weights = np.random.default_rng(0).random(70) * 2
        weights *= 70 / weights.sum()
        stream = EpochStream(70, 7, 3, weights, 70, self.SHARDS, 5)
        for epoch in range(3):
            counts = np.bincount(self.order(stream, epoch), minlength=70)
            assert (counts >= np.floor(weights)).all()
            assert (counts <= np.ceil(weights)).all()

    def test_any_step_at_once(self):
        stream, steps = EpochStream(70, 7, 3, shards=self.SHARDS, window=9), [25, 0, 11, 3]
        fresh = [EpochStream(70, 7, 3, shards=self.SHARDS, window=9).batch(step) for step in steps]
        assert [stream.batch(step) for step in steps] == fresh
