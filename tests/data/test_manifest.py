"""The manifest: what is written is what training samples by, and what cannot be sampled by is told."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pools import fill

from dino.data import fingerprint, open_images, samples_per_epoch
from dino.data.manifest import METADATA_KEY, printable, read_manifest, write_manifest
from dino.errors import UserError

NAMES = ["class0/0.png", "class0/2.png", "class0/4.png", "class1/1.png", "class1/3.png"]


@pytest.fixture
def pool(tmp_path):
    """Five grey images, of which the shade is the number."""
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = int(path.stem)
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)
    return tmp_path / "images"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "manifest.parquet"


def write(pool, path, names=NAMES, kept=None, weight=None, kind="folder", **columns):
    kept, weight = kept or [True] * len(names), weight or [1.0] * len(names)
    write_manifest(path, {"path": names, "kept": kept, "weight": weight, **columns}, str(pool), kind)
    return path


def shades(images) -> list[int]:
    return [int(images.read(index)[0, 0, 0]) for index in range(len(images.names))]


def test_kept_images_with_their_weights(pool, path):
    write(pool, path, kept=[True, False, True, True, True], weight=[1, 9, 0.5, 0, 3])
    for images in (open_images(path, "manifest"), open_images(str(path))):  # found out by its name
        assert (images.kind, samples_per_epoch(images), shades(images)) == ("manifest", 4, [0, 4, 3])
        assert list(images.names) == ["class0/0.png", "class0/4.png", "class1/3.png"]
        assert list(images.labels) == ["class0", "class0", "class1"]
        assert images.weights.tolist() == pytest.approx([1, 0.5, 3])


def test_order_is_the_manifests(pool, path):
    images = open_images(write(pool, path, NAMES[::-1]))
    assert (list(images.names), shades(images)) == (NAMES[::-1], [3, 1, 4, 2, 0])


def test_it_moves_together_with_its_images(pool, path, tmp_path):
    assert b'"root": "images"' in pq.read_table(write(pool, path)).schema.metadata[METADATA_KEY]
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert len(open_images(moved / "manifest.parquet").names) == 5


def test_no_flipped_bit_changes_what_is_drawn_unnoticed(pool, path):
    """Of names, of what is kept and of the weights; a reader that knows no checksums still reads it."""
    names = [f"class0/{number}.png" for number in range(400)]
    write(pool, path, names, weight=[1 + number / 7 for number in range(400)])
    whole, content = read_manifest(path), path.read_bytes()
    noticed = 0
    end = len(content) - 4 - int.from_bytes(content[-8:-4], "little")  # of the columns; then come facts of the file
    for position in range(4, end - 4, 37):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            now = read_manifest(path)
        except UserError:
            noticed += 1
        else:
            assert list(now.names) == list(whole.names)
            np.testing.assert_array_equal(now.weights, whole.weights)
    assert noticed > 50


def test_other_programs_read_it(pool, path):
    table = pq.read_table(write(pool, path, weight=[1, 2, 0.5, 1, 1], cluster_1=np.arange(5)))
    assert table.column_names == ["path", "kept", "weight", "cluster_1"]
    assert table["weight"].to_pylist() == [1, 2, 0.5, 1, 1]


def test_of_names_that_are_no_utf_8(path, tmp_path):
    names = sorted(["a.png", os.fsdecode(b"caf\xe9.png"), "日本.png"])
    try:
        pool = fill(tmp_path / "pool", names)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    images = open_images(write(pool, path, [printable(name) for name in names]))
    assert list(images.names) == names
    assert [images.read(index).shape for index in range(3)] == [(3, 8, 8)] * 3


def test_of_a_part_of_a_pool(omniglot_zip, path):
    """Indices of the manifest are among the part's images, not among all of its archive."""
    part = open_images(omniglot_zip, "omniglot_train")
    names = part.names[::500]
    images = open_images(write(omniglot_zip, path, names, kind="omniglot_train"))
    assert (list(images.names), images.channels) == (names, 1)
    assert all(bool((images.read(row) == part.read(500 * row)).all()) for row in range(len(names)))


def test_weights_are_part_of_the_fingerprint(pool, path):
    digests = {fingerprint(open_images(write(pool, path, weight=[weight, 1, 1, 1, 1]))) for weight in (1, 2)}
    assert len(digests) == 2


def test_weights_of_any_scale_from_elsewhere(pool, path):
    """An epoch then has a sample for each image that is kept; one that says so keeps to what it says."""
    table = pq.read_table(write(pool, path, weight=[1, 2, 3, 4, 5]))
    scaled = table.set_column(2, "weight", pa.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    facts = {METADATA_KEY: b'{"kind": "folder", "root": "images"}'}
    for metadata, total in ((table.schema.metadata, 15), (facts, 5)):
        pq.write_table(scaled.replace_schema_metadata(metadata), path)
        assert read_manifest(path).weights.tolist() == pytest.approx((np.arange(1, 6) * total / 15).tolist())


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_one_of_another_program_lies_beside_the_images(pool, text):
    columns = {"path": pa.array(NAMES).cast(text), "kept": [True] * 5, "weight": [2.0, 4.0, 1.0, 2.0, 1.0]}
    pq.write_table(pa.table(columns), pool / "other.parquet")
    images = open_images(pool / "other.parquet")
    assert list(images.names) == NAMES
    assert images.weights.tolist() == pytest.approx([1, 2, 0.5, 1, 0.5])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, None])
def test_a_weight_that_is_none_is_told_of_images_that_are_kept(pool, weight):
    weights = pa.array([1.0, 1.0, weight, 1.0, 1.0])
    columns = {"path": NAMES, "weight": weights}
    pq.write_table(pa.table(columns | {"kept": [True, True, False, True, True]}), pool / "other.parquet")
    assert len(open_images(pool / "other.parquet").names) == 4
    pq.write_table(pa.table(columns | {"kept": [True] * 5}), pool / "other.parquet")
    with pytest.raises(UserError, match=r"the weight of 1 kept image\(s\) is .*class0/4.png"):
        open_images(pool / "other.parquet")


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "class0/../../outside.png", "class0/5.png", None])
def test_a_path_that_is_not_in_the_pool_is_told(pool, path, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    write(pool, path, pa.array(["class0/0.png", name]))
    with pytest.raises(UserError, match=rf"1 of 2 images are not in .*images, for example {name}: put them back"):
        open_images(path)


def test_an_image_named_twice_is_told(pool, path):
    write(pool, path, ["class0/0.png"] * 2)
    with pytest.raises(UserError, match="names some images twice"):
        open_images(path)


ONE = {"path": ["a"], "kept": [True], "weight": [1.0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a manifest"),
        (b"no parquet at all", "cannot be read as a manifest"),
        ({"path": ["a"], "kept": [True]}, "no column weight"),
        (ONE, "no image in "),
        (ONE | {"kept": [1]}, "kept must be true or false, got int64"),
        (ONE | {"weight": ["one"]}, "weights must be numbers, got string"),
        (ONE | {"path": [[1]]}, "paths must be text, got list"),
        (ONE | {"weight": [0.0]}, "keeps no image"),
        (ONE | {"kept": [False]}, "keeps no image"),
        (pa.table(ONE, metadata={METADATA_KEY: b"{"}), "what it says of its images is damaged"),
        (pa.table(ONE, metadata={METADATA_KEY: b'{"kind": "folder", "root": "gone"}'}), "gone does not exist"),
    ],
)
def test_what_is_no_manifest_is_told(path, content, message):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), path)
    with pytest.raises(UserError, match=message):
        open_images(path)


class TestFromStrangers:
    def test_one_that_leads_to_itself(self, pool, path, tmp_path):
        other = tmp_path / "other.parquet"
        write(other, path, kind="manifest")
        write(path, other, kind="manifest")
        for start in (path, other):
            with pytest.raises(UserError, match="leads to itself"):
                open_images(start)
        write(write(pool, other), path, kind="manifest")
        assert len(open_images(path).names) == 5

    @pytest.mark.parametrize("draws", [1e18, float("nan"), float("inf"), -1, "many", [1], 10**400])
    def test_draws_that_cannot_be(self, pool, path, draws):
        table = pq.read_table(write(pool, path))
        facts = json.dumps({"root": str(pool), "kind": "folder", "draws": draws}).encode()
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: facts}), path)
        with pytest.raises(UserError, match=r"draw|damaged"):
            open_images(path)

    def test_weights_that_add_up_to_more_than_a_number(self, pool, path):
        pq.write_table(pa.table({"path": NAMES, "kept": [True] * 5, "weight": [1.7e308] * 5}), path)
        with pytest.raises(UserError, match="add up to more"):
            open_images(path)

    def test_rows_that_take_no_room_in_the_file(self, path):
        """Two million equal rows in a few kilobytes: each would be a name of 10,000 letters."""
        count = 2_000_000
        name = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * 10_000]))
        columns = {"path": name, "kept": pa.array(np.ones(count, bool)), "weight": pa.array(np.ones(count))}
        pq.write_table(pa.table(columns), path)
        with pytest.raises(UserError, match="are no table of images"):
            open_images(path)

    def test_repeated_names_stay_packed(self, pool, path):
        names = [*("y" * 100_000 for _ in range(400)), *(f"{index:0300x}" for index in range(2000))]
        pq.write_table(pa.table({"path": names, "kept": [True] * 2400, "weight": [1.0] * 2400}), path)
        with pytest.raises(UserError, match="twice"):
            open_images(path)

    def test_a_pipe_is_no_manifest(self, path):
        os.mkfifo(path)
        with pytest.raises(UserError, match="cannot be read"):
            read_manifest(path)

    def test_names_that_steer_a_terminal_are_shown_as_text(self, pool, path):
        with pytest.raises(UserError) as refused:
            open_images(write(pool, path, names=["a\x1b[2J\n.png", *NAMES[1:]]))
        assert "a\\x1b[2J\\n.png" in str(refused.value)
