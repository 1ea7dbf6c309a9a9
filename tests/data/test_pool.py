"""Pools of images: what is found in folders and archives, under which names and labels, and read by which process."""

import io
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino.data import Images, UnreadableImage, fingerprint, open_images
from dino.data.sources.omniglot import Drawing, article_subset, parse
from dino.data.sources.source import folder_labels, packed, texts
from dino.errors import UserError


def png(value: int) -> bytes:
    """A PNG of noise that only `value` gives."""
    array = np.random.default_rng(value).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


TREE = ["cats/b.png", "cats/a.PNG", "dogs/old/deep/c.jpeg", "dogs/é ü.webp", "birds.v2/d.tif"]
NOT_IMAGES = [
    "notes.txt",
    "cats/png",
    "dogs/movie.mp4",
    ".hidden.png",
    ".cache/x.png",
    "cats/._a.png",
    "dogs/.git/y.png",
]


class TestFolder:
    def test_images_at_every_depth_in_sorted_order_without_hidden_ones(self, tmp_path):
        images = open_images(str(fill(tmp_path / "pool", TREE + NOT_IMAGES)))
        assert list(images.names) == sorted(TREE)
        assert images.kind == "folder"
        assert images.channels == 3

    def test_a_hidden_root_is_no_reason_to_find_nothing(self, tmp_path):
        assert len(open_images(str(fill(tmp_path / ".pool", TREE))).names) == len(TREE)

    def test_each_name_reads_its_own_file(self, tmp_path):
        images = open_images(str(fill(tmp_path, TREE)))
        for index, name in enumerate(images.names):
            expected = np.asarray(Image.open(tmp_path / name))
            assert np.array_equal(images.read(index).permute(1, 2, 0).numpy(), expected)

    def test_links_are_followed_and_a_loop_ends(self, tmp_path):
        root = fill(tmp_path / "pool", ["a/x.png", "b/y.png"])
        elsewhere = fill(tmp_path / "elsewhere", ["z.png"])
        (root / "a" / "loop").symlink_to(root, target_is_directory=True)
        (root / "linked").symlink_to(elsewhere, target_is_directory=True)
        assert list(open_images(str(root)).names) == ["a/x.png", "b/y.png", "linked/z.png"]

    def test_a_dangling_link_is_unreadable(self, tmp_path):
        (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
        images = open_images(str(tmp_path))
        with pytest.raises(UnreadableImage, match="No such file"):
            images.read(0)

    def test_a_file_that_vanished_is_unreadable(self, tmp_path):
        images = open_images(str(fill(tmp_path, ["a.png", "b.png"])))
        (tmp_path / "a.png").unlink()
        with pytest.raises(UnreadableImage, match="No such file"):
            images.read(0)
        images.read(1)

    @pytest.mark.skipif(os.name != "posix", reason="POSIX names only")
    def test_names_that_are_no_utf_8(self, tmp_path):
        name = os.fsdecode(b"caf\xe9.png")
        try:
            (tmp_path / name).write_bytes(png(0))
        except OSError:
            pytest.skip("the file system takes UTF-8 names only")
        images = open_images(str(tmp_path))
        assert images.read(0).shape == (3, 8, 8)
        assert len(fingerprint(images)) == 16


class TestLabels:
    @pytest.mark.parametrize(
        ("names", "labels"),
        [
            (["cats/1.png", "dogs/1.png", "cats/2.png"], ["cats", "dogs", "cats"]),
            (["photos/cats/1.png", "photos/dogs/x/1.png"], ["cats", "dogs"]),  # a common folder is no class
            (["train/cats/1.png", "test/cats/1.png"], ["train", "test"]),
            (["1.png", "2.png"], None),
            (["all/1.png", "all/2.png"], None),
            (["1.png", "dogs/2.png"], None),  # one image has no class
            ([], None),
        ],
    )
    def test_are_the_first_level_at_which_paths_differ(self, names, labels):
        found = folder_labels(packed(names))
        assert (None if found is None else list(texts(found.dictionary_decode()))) == labels

    def test_belong_to_the_names(self, tmp_path):
        images = open_images(str(fill(tmp_path, TREE)))
        assert list(images.labels) == [name.split("/")[0] for name in images.names]


class TestZip:
    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_is_the_same_pool_as_the_folder(self, tmp_path, compression):
        root = fill(tmp_path / "pool", TREE + NOT_IMAGES)
        members = {name: (root / name).read_bytes() for name in reversed(TREE + NOT_IMAGES)}
        members["__MACOSX/cats/._a.png"] = b"resource fork"
        folder, packed = open_images(str(root)), open_images(str(archive(tmp_path / "p.zip", members, compression)))
        assert packed.kind == "zip"
        assert list(packed.names) == list(folder.names)
        assert list(packed.labels) == list(folder.labels)
        assert fingerprint(packed) == fingerprint(folder)
        for index in range(len(folder.names)):
            assert torch.equal(packed.read(index), folder.read(index))

    def test_names_that_escape_are_read_in_place_and_nothing_is_written(self, tmp_path):
        names = ["../../escaped.png", "/absolute.png", "a/../../b.png", "C:\\windows.png", "fine.png"]
        inside = tmp_path / "deep" / "deeper"
        inside.mkdir(parents=True)
        path = archive(inside / "p.zip", {name: png(number) for number, name in enumerate(names)})
        images = open_images(str(path))
        with zipfile.ZipFile(path) as file:
            assert list(images.names) == sorted(file.namelist())
        for index in range(len(images.names)):
            assert images.read(index).shape == (3, 8, 8)
        assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]

    def test_a_damaged_member_is_unreadable_and_the_others_are_not(self, tmp_path):
        path = archive(tmp_path / "p.zip", {"a.png": png(0), "b.png": png(1)})
        content = bytearray(path.read_bytes())
        begin = content.index(b"IDAT")
        content[begin + 8 : begin + 40] = bytes(32)  # caught by the archive's checksum
        path.write_bytes(content)
        images = open_images(str(path))
        with pytest.raises(UnreadableImage, match="CRC"):
            images.read(0)
        assert images.read(1).shape == (3, 8, 8)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    @pytest.mark.parametrize("damaged", [0.0, 0.5])
    def test_a_damaged_compressed_member_is_unreadable(self, tmp_path, compression, damaged):
        path = archive(tmp_path / "p.zip", {"a.png": png(0), "b.png": png(1)}, compression)
        with zipfile.ZipFile(path) as file:
            first = file.getinfo("a.png")
        content = bytearray(path.read_bytes())
        begin = first.header_offset + 30 + len("a.png") + int(damaged * first.compress_size)
        content[begin : begin + 20] = b"\xff" * 20
        path.write_bytes(content)
        images = open_images(str(path))
        with pytest.raises(UnreadableImage):
            images.read(0)
        assert images.read(1).shape == (3, 8, 8)

    def test_an_encrypted_member_is_unreadable(self, tmp_path):
        path = archive(tmp_path / "p.zip", {"a.png": png(0)})
        content = bytearray(path.read_bytes())
        content[6] |= 1  # the encryption flag, in the local header and in the directory
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match="encrypted"):
            open_images(str(path)).read(0)

    def test_survives_pickling(self, tmp_path):
        images = open_images(str(archive(tmp_path / "p.zip", {"a.png": png(0)})))
        copy = pickle.loads(pickle.dumps(images))
        assert torch.equal(copy.read(0), images.read(0))

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_forked_workers_read_the_same_pixels(self, tmp_path):
        names = [f"{number:03d}.png" for number in range(60)]
        path = archive(tmp_path / "p.zip", {name: png(number) for number, name in enumerate(names)})
        images = open_images(str(path))
        expected = [images.read(index) for index in range(len(names))]  # opens the archive in this process
        loader = DataLoader(Pixels(images), batch_size=None, num_workers=2, multiprocessing_context="fork")
        for epoch in range(2):
            for index, found in enumerate(loader):
                assert torch.equal(found, expected[index]), (epoch, index)


class Pixels(Dataset):
    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images.read(index)


class TestRefusals:
    def test_nothing_named(self):
        with pytest.raises(UserError, match=r"data\.root="):
            open_images("")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="missing does not exist"):
            open_images(str(tmp_path / "missing"))

    def test_no_image_in_a_folder_names_the_endings(self, tmp_path):
        (tmp_path / "readme.txt").write_text("hello")
        with pytest.raises(UserError, match=r"no image .*\.jpg, .*\.png.*\.webp.*\.tiff.*\.npy"):
            open_images(str(tmp_path))

    def test_no_image_in_an_archive_names_the_endings(self, tmp_path):
        with pytest.raises(UserError, match=r"no image .*\.jpg, .*\.png"):
            open_images(str(archive(tmp_path / "p.zip", {"readme.txt": b"hello"})))

    @pytest.mark.parametrize("content", [b"", b"not an archive", png(0)])
    def test_no_archive(self, tmp_path, content):
        (tmp_path / "p.zip").write_bytes(content)
        with pytest.raises(UserError, match=r"neither a folder nor a zip"):
            open_images(str(tmp_path / "p.zip"))

    def test_a_truncated_archive(self, tmp_path):
        path = archive(tmp_path / "p.zip", {f"{number}.png": png(number) for number in range(20)})
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(UserError, match=r"p\.zip"):
            open_images(str(path))

    def test_a_kind_that_the_root_is_not(self, tmp_path):
        folder, packed = fill(tmp_path / "pool", TREE), archive(tmp_path / "p.zip", {"a.png": png(0)})
        with pytest.raises(UserError, match=r"data\.kind=zip.* is a folder: use data\.kind=folder"):
            open_images(str(folder), "zip")
        with pytest.raises(UserError, match=r"data\.kind=folder.* is a zip archive: use data\.kind=zip"):
            open_images(str(packed), "folder")

    def test_other_layouts_as_omniglot(self, tmp_path):
        with pytest.raises(UserError, match="not laid out as Omniglot"):
            open_images(str(fill(tmp_path, ["a.png"])), "omniglot")

    def test_digits_in_colour(self):
        with pytest.raises(UserError, match="1 channel"):
            open_images("", "digits", 3)


class TestFingerprint:
    def test_changes_when_a_file_is_added_removed_or_renamed(self, tmp_path):
        def digest(name: str, files: list[str]) -> str:
            return fingerprint(open_images(str(fill(tmp_path / name, files))))

        same = digest("1", ["a.png", "b.png"])
        assert digest("2", ["a.png", "b.png"]) == same
        others = [["a.png"], ["a.png", "c.png"], ["a.png", "b.png", "c.png"], ["a.png", "x/b.png"]]
        found = {digest(f"other{number}", files) for number, files in enumerate(others)}
        assert len(found) == len(others)
        assert same not in found

    def test_names_do_not_run_into_each_other(self):
        class Names:
            weights = None

            def __init__(self, *names: str):
                self.names = names

        assert fingerprint(Names("ab", "c")) != fingerprint(Names("a", "bc"))
        assert fingerprint(Names("a", "b")) != fingerprint(Names("b", "a"))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, digits = open_images("", "digits"), load_digits()
    assert (len(images.names), images.channels, images.kind) == (1797, 1, "digits")
    assert len(set(images.names)) == 1797
    for index in (0, 100, 1796):
        pixels = images.read(index)
        assert pixels.shape == (1, 8, 8)
        assert pixels.dtype == torch.uint8
        assert images.labels[index] == str(digits.target[index])
        np.testing.assert_allclose(pixels[0] / 255 * 16, digits.images[index], atol=0.04)
    assert max(int(images.read(index).max()) for index in range(50)) == 255  # 16 of 16 is all ink


class TestOmniglot:
    def test_path_says_alphabet_character_and_drawer(self):
        name = "images_background/Early_Aramaic/character07/0123_19.png"
        assert parse(name) == Drawing("Early_Aramaic", "character07", 19)

    @pytest.mark.parametrize("name", ["a.png", "x/y/z.png", "Greek/character01/0123_x.png", "0123_01.png"])
    def test_other_paths_are_refused(self, name):
        with pytest.raises(UserError, match="not laid out as Omniglot"):
            parse(name)

    def test_the_background_set(self, omniglot_zip):
        images = open_images(str(omniglot_zip), "omniglot")
        drawings = [parse(name) for name in images.names]
        assert (images.channels, images.kind, len(drawings)) == (1, "omniglot", 19280)
        assert len({drawing.alphabet for drawing in drawings}) == 30
        assert set(Counter((d.alphabet, d.character) for d in drawings).values()) == {20}
        assert len({(d.alphabet, d.character) for d in drawings}) == 964
        assert {drawing.drawer for drawing in drawings} == set(range(1, 21))
        assert list(images.labels) == [drawing.alphabet for drawing in drawings]

    def test_drawings_are_black_ink_on_white(self, omniglot_zip):
        image = open_images(str(omniglot_zip), "omniglot").read(0)
        assert image.shape == (1, 105, 105)
        assert set(image.unique().tolist()) == {0, 255}
        assert image.float().mean() > 200

    def test_article_subset(self, omniglot_zip):
        """9,543 drawings of all 30 alphabets, at most 10 of each character."""
        names = open_images(str(omniglot_zip), "omniglot").names
        chosen = article_subset(names)
        drawings = [parse(names[index]) for index in chosen]
        assert len(chosen) == len(set(chosen.tolist())) == 9543
        assert np.array_equal(chosen, np.sort(chosen))
        assert max(Counter((d.alphabet, d.character) for d in drawings).values()) == 10
        assert len({drawing.alphabet for drawing in drawings}) == 30
        assert len({drawing.drawer for drawing in drawings}) == 20
        assert np.array_equal(chosen, article_subset(names))
        assert not np.array_equal(chosen, article_subset(names, seed=43))


def test_photographs_of_a_real_archive(caltech_zip):
    images = open_images(str(caltech_zip))
    assert len(images.names) == 8677
    assert len(set(images.labels)) == 101
    counts = Counter(images.labels).values()
    assert (max(counts), min(counts)) == (800, 31)
    for index in range(0, 8677, 500):
        image = images.read(index)
        assert image.shape[0] == 3
        assert min(image.shape[1:]) <= 128
