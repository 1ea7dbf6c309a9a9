"""Sources: what is found in folders, archives and data sets, under which names and labels, read by which process."""

import errno
import io
import os
import pickle
import socket
import struct
import tracemalloc
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import compress

import numpy as np
import pytest
import torch
from PIL import Image
from pools import archive, fill, png
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder

from dino.data import Limits, Pool, UnreadableImage, fingerprint, open_images, read_or_reason, stamp
from dino.data.sources.omniglot import article_subset, held_out, parse
from dino.data.sources.source import Names, folder_labels, packed
from dino.errors import UserError

TREE = ["cats/b.png", "cats/a.PNG", "dogs/old/deep/c.jpeg", "dogs/é ü.webp", "birds.v2/d.tif"]
HIDDEN = [".hidden.png", ".cache/x.png", "cats/._a.png", "dogs/.git/y.png"]
TREE_AND_MORE = [*TREE, *HIDDEN, "notes.txt", "cats/png", "dogs/movie.mp4"]


class TestFolder:
    @pytest.mark.parametrize("root", ["pool", ".pool"])  # a hidden root is no reason to find nothing
    def test_images_at_every_depth_in_sorted_order_without_hidden_ones(self, tmp_path, root):
        images = open_images(fill(tmp_path / root, TREE_AND_MORE))
        assert (images.kind, images.channels, list(images.names)) == ("folder", 3, sorted(TREE))
        assert list(images.labels) == [name.split("/")[0] for name in images.names]
        for index, name in enumerate(images.names):
            expected = np.asarray(Image.open(tmp_path / root / name))
            assert np.array_equal(images.read(index).permute(1, 2, 0).numpy(), expected)

    def test_links_are_followed_and_a_loop_ends(self, tmp_path):
        root = fill(tmp_path / "pool", ["a/x.png", "b/y.png"])
        elsewhere = fill(tmp_path / "elsewhere", ["z.png"])
        (root / "a" / "loop").symlink_to(root, target_is_directory=True)
        (root / "linked").symlink_to(elsewhere, target_is_directory=True)
        assert list(open_images(root).names) == ["a/x.png", "b/y.png", "linked/z.png"]

    def test_files_that_are_gone_are_unreadable(self, tmp_path):
        fill(tmp_path, ["a.png", "b.png"])
        (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
        images = open_images(tmp_path)
        (tmp_path / "a.png").unlink()
        for index in (0, 2):
            with pytest.raises(UnreadableImage, match="No such file"):
                images.read(index)
        images.read(1)

    def test_what_is_no_regular_file_is_left_out_and_never_opened(self, tmp_path, caplog):
        fill(tmp_path, ["real.png", "later.png"])
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        (tmp_path / "folder.png").mkdir()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s.png"))
        images = open_images(tmp_path)
        assert list(images.names) == ["later.png", "real.png"]
        assert "3 not a regular file (pipe.png, s.png, zero.png)" in caplog.text
        (tmp_path / "later.png").unlink()
        os.mkfifo(tmp_path / "later.png")
        with pytest.raises(UnreadableImage, match="not a regular file"):
            images.read(0)
        images.read(1)

    def test_what_is_left_out_is_counted_by_kind_and_told_once(self, tmp_path, caplog):
        films = [f"clip{number}.MP4" for number in range(5)]
        fill(tmp_path, ["a.png", "b.GIF", "notes", "we\x1b[31mird.txt", *films, "x/c.txt"])
        for _ in range(2):
            assert list(open_images(tmp_path).names) == ["a.png", "b.GIF"]
        (line,) = [record.getMessage() for record in caplog.records]
        assert "5 .mp4 (clip0.MP4, clip1.MP4, clip2.MP4, …); 2 .txt (" in line
        assert "1 without an ending (notes)" in line
        assert "we\\x1b[31mird.txt" in line
        caplog.clear()
        open_images(archive(tmp_path / "pool.zip", {"a.png": png(1), "b.mov": b"", ".hidden": b"", "x/": b""}))
        assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == ["1 .mov (b.mov)"]

    def test_a_folder_that_may_not_be_listed_is_told(self, tmp_path, caplog, monkeypatch):
        """Root may list all."""
        fill(tmp_path, ["a/1.png", "b/2.png"])
        listed = os.scandir

        def scandir(path):
            if str(path).endswith("b"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(os, "scandir", scandir)
        assert list(open_images(tmp_path).names) == ["a/1.png"]
        assert "1 folders that cannot be listed: Permission denied (b)" in caplog.text

    def test_a_runs_own_directory_is_passed_over(self, tmp_path, caplog):
        fill(tmp_path, ["a.png", "runs/mine/report.png", "runs/other/b.png"])
        (tmp_path / "runs/mine/config.yaml").touch()
        (tmp_path / "runs/other/config.yaml").touch()
        (tmp_path / "runs/mine/metrics.jsonl").touch()
        assert list(open_images(tmp_path).names) == ["a.png", "runs/other/b.png"]
        assert "1 directories of runs (runs/mine)" in caplog.text

    @pytest.mark.parametrize("root", ["/proc", "/proc/self", "/sys", "link"])
    def test_the_kernels_files_are_no_images(self, tmp_path, root):
        (tmp_path / "link").symlink_to("/proc")
        with pytest.raises(UserError, match="belongs to the kernel"):
            open_images(tmp_path / root)
        fill(tmp_path, ["a.png"])
        assert list(open_images(tmp_path).names) == ["a.png"]

    def test_files_larger_than_allowed_are_not_read(self, tmp_path):
        with fill(tmp_path, ["a.png", "b.png"]).joinpath("a.png").open("r+b") as file:
            file.truncate(10**12)  # sparse
        images = open_images(tmp_path)
        with pytest.raises(UnreadableImage, match=r"1,000,000,000,000 bytes are more than data\.max_bytes=268,435,456"):
            images.read(0)
        images.read(1)
        small = open_images(tmp_path, limits=Limits(bytes=50))
        assert [bool(read_or_reason(small, index)[1]) for index in range(2)] == [True, True]

    def test_names_that_are_no_utf_8(self, tmp_path):
        names = ["a.png", os.fsdecode(b"caf\xe9.png"), "\ue000.png", "日本.png"]
        try:
            fill(tmp_path, names)
        except OSError:
            pytest.skip("the file system takes UTF-8 names only")
        images = open_images(tmp_path)
        assert list(images.names) == sorted(names)
        assert all(images.read(index).shape == (3, 8, 8) for index in range(4))
        assert len(fingerprint(images)) == len(stamp(images)) == 16

    def test_stamp_changes_when_a_file_does(self, tmp_path):
        images, other = open_images(fill(tmp_path / "pool", TREE)), open_images(fill(tmp_path / "other", TREE))
        before = stamp(images)
        assert stamp(open_images(tmp_path / "pool")) == before != stamp(other)
        (tmp_path / "pool" / TREE[0]).write_bytes(png(9) + b"longer")
        assert stamp(images) != before


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cats/1.png", "dogs/1.png", "cats/2.png"], ["cats", "dogs", "cats"]),
        (["photos/cats/1.png", "photos/dogs/x/1.png"], ["cats", "dogs"]),  # a common folder is no class
        (["train/cats/1.png", "test/cats/1.png", "test/dogs/1.png"], ["cats", "cats", "dogs"]),  # a split is no class
        (["x/train2017/a/1.png", "x/val2017/b/1.png"], ["a", "b"]),
        (["seg_train/a/1.png", "seg_test/b/c/1.png"], ["a", "b"]),
        (["Train/1.png", "Test/2.png"], None),
        (["train/cats/1.png", "test/cats/1.png"], None),
        (["train/cats/1.png", "bus/cats/1.png"], ["train", "bus"]),  # vehicles
        (["train/1.png", "training/2.png"], ["train", "training"]),  # not two sides of anything
        (["pool/a/1.png", "pool/ab/1.png"], ["a", "ab"]),
        (["1.png", "2.png"], None),
        (["all/1.png", "all/2.png"], None),
        (["1.png", "dogs/2.png"], None),  # one image has no class
        ([], None),
    ],
)
def test_labels_are_the_first_level_at_which_paths_differ(names, labels):
    encoded = folder_labels(packed(names))
    assert (None if encoded is None else list(Names(encoded.dictionary_decode()))) == labels


class Items(Dataset):
    """A user's data set of the items given; an exception among them is raised."""

    def __init__(self, *items: object, **attributes: object):
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Reads(Items):
    """Images of the pool given."""

    def __getitem__(self, index: int) -> object:
        return self.pool.read(self.items[index])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
class TestCompression:
    def test_an_archive_is_the_same_pool_as_the_folder(self, tmp_path, compression):
        root = fill(tmp_path / "pool", TREE_AND_MORE)
        members = {name: (root / name).read_bytes() for name in reversed(TREE_AND_MORE)}
        members["__MACOSX/cats/._a.png"] = b"resource fork"
        folder, zipped = open_images(root), open_images(archive(tmp_path / "p.zip", members, compression))
        assert (zipped.kind, list(zipped.names)) == ("zip", list(folder.names))
        assert list(zipped.labels) == list(folder.labels)
        assert fingerprint(zipped) == fingerprint(folder)
        copy = pickle.loads(pickle.dumps(zipped))  # as worker processes get it
        for index in range(len(folder.names)):
            assert torch.equal(zipped.read(index), folder.read(index))
            assert torch.equal(copy.read(index), folder.read(index))

    @pytest.mark.parametrize("damaged", [0.0, 0.5])
    def test_a_damaged_member_is_unreadable_and_the_others_are_not(self, tmp_path, compression, damaged):
        path = archive(tmp_path / "p.zip", {"a.png": png(0), "b.png": png(1)}, compression)
        with zipfile.ZipFile(path) as file:
            first = file.getinfo("a.png")
        content = bytearray(path.read_bytes())
        begin = first.header_offset + 30 + len("a.png") + int(damaged * first.compress_size)
        content[begin : begin + 20] = b"\xff" * 20
        path.write_bytes(content)
        images = open_images(path)
        with pytest.raises(UnreadableImage, match=r"\w"):  # a stored one is caught by the archive's checksum
            images.read(0)
        assert images.read(1).shape == (3, 8, 8)


def test_one_class_written_in_two_ways_is_one(tmp_path):
    """é as one letter, as Linux has it, and as two, as in archives made on a Mac; and bytes that are no letter."""
    names = ["a/caf\u00e9/1.png", "a/cafe\u0301/2.png", "a/\udcff/3.png"]
    try:
        images = open_images(fill(tmp_path, names))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert images.labels.classes == ["caf\u00e9", "\udcff"]
    assert sorted(images.labels) == ["caf\u00e9", "caf\u00e9", "\udcff"]


class TestZip:
    def test_names_that_escape_are_read_in_place_and_nothing_is_written(self, tmp_path):
        names = ["../../escaped.png", "/absolute.png", "a/../../b.png", "C:\\windows.png", "fine.png"]
        inside = tmp_path / "deep" / "deeper"
        inside.mkdir(parents=True)
        path = archive(inside / "p.zip", {name: png(number) for number, name in enumerate(names)})
        images = open_images(path)
        assert list(images.names) == sorted(names)
        assert all(images.read(index).shape == (3, 8, 8) for index in range(len(names)))
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]

    def test_a_name_that_zipfile_shortens_is_read_all_the_same(self, tmp_path):
        path = archive(tmp_path / "p.zip", {"a.png_x": png(0)})
        path.write_bytes(path.read_bytes().replace(b"a.png_x", b"a.png\0x"))
        assert open_images(path).read(0).shape == (3, 8, 8)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_what_a_member_becomes_is_bounded(self, tmp_path, compression):
        """20 MB of zeros in a few kilobytes, which the directory gives their own size, or one of 1,000 bytes."""
        path = archive(tmp_path / "p.zip", {"a.png": bytes(20 * 10**6)}, compression)
        with pytest.raises(UnreadableImage, match=r"20,000,000 bytes are more than data\.max_bytes=1,000,000"):
            open_images(path, limits=Limits(bytes=10**6)).read(0)
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02") + 24
        content[at : at + 4] = struct.pack("<I", 1000)
        path.write_bytes(content)
        images = open_images(path)
        tracemalloc.start()
        with pytest.raises(UnreadableImage):
            images.read(0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert compression != zipfile.ZIP_DEFLATED or peak < 5 * 10**6  # the others' smallest step is larger

    def test_large_members_are_whole_however_they_are_packed(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        np.save(buffer, noise)
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            path = archive(tmp_path / f"{compression}.zip", {"a.npy": buffer.getvalue()}, compression)
            assert np.array_equal(open_images(path).read(0).permute(1, 2, 0).numpy(), noise)

    @pytest.mark.parametrize("damage", [(4, b"\xff\xff"), (6, b"\xff\xff"), (46, b"\xff\xfe")])
    def test_an_archive_of_another_time_or_with_broken_names_is_told(self, tmp_path, damage):
        path = archive(tmp_path / "p.zip", {"é.png": png(0)})
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02") + damage[0]
        content[at : at + len(damage[1])] = damage[1]
        path.write_bytes(content)
        image, reason = None, ""
        try:
            image, reason = read_or_reason(open_images(path), 0)
        except UserError as error:
            reason = str(error)
        assert (image is None) == bool(reason)  # it is there, or why it is not

    def test_an_encrypted_member_is_unreadable(self, tmp_path):
        path = archive(tmp_path / "p.zip", {"a.png": png(0)})
        content = bytearray(path.read_bytes())
        content[6] |= 1  # the encryption flag, in the local header and in the directory
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match="encrypted"):
            open_images(path).read(0)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_forked_workers_read_the_same_pixels(self, tmp_path):
        images = open_images(archive(tmp_path / "p.zip", {f"{number:03d}.png": png(number) for number in range(60)}))
        expected = [images.read(index) for index in range(60)]  # opens the archive in this process
        reads = Reads(*range(60), pool=images)
        for index, image in enumerate(DataLoader(reads, None, num_workers=2, multiprocessing_context="fork")):
            assert torch.equal(image, expected[index]), index

    def test_photographs_of_a_real_archive(self, caltech_zip):
        images = open_images(caltech_zip)
        counts = Counter(images.labels).values()
        assert (len(set(images.names)), len(counts), max(counts), min(counts)) == (8677, 101, 800, 31)
        for index in range(0, 8677, 1000):
            channels, *size = images.read(index).shape
            assert (channels, min(size) <= 128) == (3, True)


def test_digits_are_scikit_learns():
    images, digits = open_images("", "digits"), load_digits()
    assert (len(set(images.names)), images.channels, images.kind) == (1797, 1, "digits")
    for index in (0, 100, 1796):
        pixels = images.read(index)
        assert (pixels.shape, pixels.dtype) == ((1, 8, 8), torch.uint8)
        assert images.labels[index] == str(digits.target[index])
        np.testing.assert_allclose(pixels[0] / 255 * 16, digits.images[index], atol=0.04)


HWC = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
CHW = torch.from_numpy(HWC.transpose(2, 0, 1).copy())
GREY = HWC[..., 0]


class TestDataset:
    def test_torchvisions_image_folder_is_the_same_pool_as_the_folder(self, tmp_path):
        names = ["cats/a.png", "cats/b.png", "dogs/c.png"]
        folder, dataset = open_images(fill(tmp_path, names)), open_images(ImageFolder(str(tmp_path)))
        assert (dataset.kind, dataset.channels, len(set(dataset.names))) == ("dataset", 3, 3)
        assert list(dataset.labels) == list(folder.labels)
        assert all(torch.equal(dataset.read(index), folder.read(index)) for index in range(3))
        first, _ = random_split(ImageFolder(str(tmp_path)), [2, 1], torch.Generator().manual_seed(1))
        assert [folder.labels[index] for index in first.indices] == list(open_images(first).labels or ["cats"] * 2)

    @pytest.mark.parametrize("channels", ["auto", 3])
    @pytest.mark.parametrize(
        "item", [HWC, CHW, Image.fromarray(HWC), torch.from_numpy(HWC), CHW.numpy(), (HWC, 1), (CHW,), [CHW, "cat"]]
    )
    def test_items_in_any_form(self, item, channels):
        images = open_images(Items(item, item), channels=channels)
        assert images.channels == 3
        assert torch.equal(images.read(1), CHW)

    @pytest.mark.parametrize(
        ("item", "channels"), [(GREY, "auto"), (CHW[:1], "auto"), (HWC[..., :1], "auto"), (Image.fromarray(GREY), 1)]
    )
    def test_one_channel(self, item, channels):
        images = open_images(Items(item), channels=channels)
        assert images.channels == 1
        assert torch.equal(images.read(0), CHW[:1])

    @pytest.mark.parametrize(
        ("dataset", "labels"),
        [
            (Items(CHW, CHW, CHW, targets=[1, 0, 1]), ["1", "0", "1"]),
            (Items(CHW, CHW, CHW, targets=torch.tensor([1, 0, 1]), classes=["cat", "dog"]), ["dog", "cat", "dog"]),
            (Subset(Items(CHW, CHW, CHW, targets=[2, 0, 1], classes=["a", "b", "c"]), [2, 0]), ["b", "c"]),
            (TensorDataset(CHW.repeat(3, 1, 1, 1), torch.tensor([5, 5, 7])), ["5", "5", "7"]),
            (Items((HWC, "cat"), (HWC, "dog")), ["cat", "dog"]),
            (Items((HWC, 3), (HWC, 3)), None),  # one class is none
            (Items((HWC, 3), OSError()), None),
            (Items((HWC, {"boxes": []}), (HWC, {"boxes": []})), None),
            (Items(HWC, HWC), None),
        ],
    )
    def test_labels(self, dataset, labels):
        images = open_images(dataset)
        assert (None if images.labels is None else list(images.labels)) == labels

    def test_what_cannot_be_read_is_unreadable(self):
        items = Items(CHW, OSError("torn\nfile"), CHW.float(), CHW[:2], "x.png", CHW[:, :3])
        reasons = ["torn file", "torch.float32", "2 channels", "a str", "9×3 pixels are too few"]
        for index, reason in enumerate(reasons, 1):
            with pytest.raises(UnreadableImage, match=reason):
                open_images(items).read(index)

    @pytest.mark.parametrize(
        ("dataset", "message"), [(Items(), "empty"), (Items(CHW / 255), "ToTensor"), (Items("a.png"), "a str")]
    )
    def test_what_is_no_data_set_of_images_is_told(self, dataset, message):
        with pytest.raises(UserError, match=message):
            open_images(dataset)

    def test_stamp_changes_with_the_pixels(self):
        stamps = [stamp(open_images(items)) for items in (Items(CHW), Items(CHW), Items(255 - CHW), Items(CHW, CHW))]
        assert stamps[0] == stamps[1]
        assert len(set(stamps)) == 3


@pytest.fixture(scope="module")
def omniglot(omniglot_zip) -> Pool:
    return open_images(omniglot_zip, "omniglot")


@pytest.fixture(scope="module")
def names(omniglot) -> list[str]:
    return list(omniglot.names)


def drawers(names: Iterable[str]) -> dict[tuple[str, str], list[int]]:
    """The drawers, in order, of each character: alphabet and name."""
    table = defaultdict(list)
    for drawing in sorted(parse(name) for name in names):
        table[drawing.alphabet, drawing.character].append(drawing.drawer)
    return table


class TestOmniglot:
    @pytest.mark.parametrize("name", ["a.png", "x/y/z.png", "Greek/character01/0123_x.png", "0123_01.png"])
    def test_other_paths_are_refused(self, name, tmp_path):
        with pytest.raises(UserError, match="not laid out as Omniglot"):
            open_images(fill(tmp_path, [name]), "omniglot")

    def test_the_background_set(self, omniglot, names):
        characters = drawers(names)
        assert (omniglot.channels, omniglot.kind, len(names), len(characters)) == (1, "omniglot", 19280, 964)
        assert all(own == list(range(1, 21)) for own in characters.values())
        assert list(omniglot.labels) == [name.split("/")[-3] for name in names]
        assert len(omniglot.labels.classes) == 30
        image = omniglot.read(0)  # black ink on white
        assert (image.shape, image.unique().tolist()) == ((1, 105, 105), [0, 255])
        assert image.float().mean() > 200

    def test_the_articles_subset_reaches_all_alphabets_and_drawers(self, names):
        subset = [names[index] for index in article_subset(names)]
        assert subset == sorted(set(subset))
        assert (len(subset), max(map(len, drawers(subset).values()))) == (9543, 10)
        assert len({parse(name).alphabet for name in subset}) == 30
        assert len({parse(name).drawer for name in subset}) == 20

    def test_held_out_are_six_drawers_and_a_fifth_of_the_characters_of_each_alphabet(self, names):
        everything, test = drawers(names), drawers(compress(names, held_out(names)))
        whole = {character for character, own in test.items() if len(own) == 20}
        characters = Counter(alphabet for alphabet, _ in everything)
        assert Counter(alphabet for alphabet, _ in whole) == {own: round(characters[own] / 5) for own in characters}
        assert all(test[character] == list(range(15, 21)) for character in everything.keys() - whole)
        assert drawers(compress(names, held_out(names, by_drawer=False))).keys() == whole
        assert len({character for _, character in whole}) > 30  # they are not the first ones of each alphabet

    def test_held_out_depends_on_the_seed_and_not_on_order_or_folder(self, names):
        expected, order = held_out(names), np.random.default_rng(0).permutation(len(names))
        assert not np.array_equal(held_out(names, seed=43), expected)
        moved = ["somewhere/" + "/".join(names[index].split("/")[-3:]) for index in order]
        assert np.array_equal(held_out(moved), expected[order])

    def test_the_training_part_is_the_rest(self, omniglot, omniglot_zip, names):
        part, rest = open_images(omniglot_zip, "omniglot_train"), np.flatnonzero(~held_out(names))
        assert (part.kind, part.channels) == ("omniglot_train", 1)
        assert list(part.names) == [names[index] for index in rest]
        assert fingerprint(part) != fingerprint(omniglot), "a run must not be resumed with the other pool"
        copy = pickle.loads(pickle.dumps(part))
        for index in range(0, len(rest), 997):
            assert part.labels[index] == omniglot.labels[rest[index]]
            assert torch.equal(part.read(index), omniglot.read(rest[index]))
            assert torch.equal(copy.read(index), part.read(index))
