"""The manifest: what is written is what training draws by, and what cannot be drawn by is told."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino.data import fingerprint, open_images, samples_per_epoch
from dino.data.manifest import METADATA_KEY, read_manifest, write_manifest
from dino.errors import UserError


@pytest.fixture
def pool(tmp_path):
    """Five grey images, of which the shade is the number."""
    for index in range(5):
        place = tmp_path / "images" / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, index, index)).save(place / f"{index}.png")
    return tmp_path / "images"


def write(pool, path, kept=(True, True, True, True, True), weight=(1.0, 2.0, 0.5, 1.0, 1.0), **columns):
    names = open_images(str(pool)).names
    write_manifest(path, {"path": names, "kept": list(kept), "weight": list(weight), **columns}, str(pool), "folder")
    return path


def test_kept_images_with_their_weights(pool, tmp_path):
    path = write(pool, tmp_path / "manifest.parquet", kept=(True, False, True, True, True), weight=(1, 9, 0.5, 0, 3))
    images = open_images(str(path), "manifest")
    assert images.kind == "manifest"
    assert list(images.names) == ["class0/0.png", "class0/4.png", "class1/3.png"]
    assert images.weights.tolist() == pytest.approx([1, 0.5, 3])
    assert samples_per_epoch(images) == 4
    assert list(images.labels) == ["class0", "class0", "class1"]
    assert [int(images.read(index)[0, 0, 0]) for index in range(3)] == [0, 4, 3]
    assert list(open_images(str(path)).names) == list(images.names)  # found out by its name


def test_it_moves_together_with_its_images(pool, tmp_path):
    write(pool, tmp_path / "manifest.parquet")
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert len(open_images(str(moved / "manifest.parquet")).names) == 5


def test_other_programs_read_it(pool, tmp_path):
    table = pq.read_table(write(pool, tmp_path / "manifest.parquet", cluster_1=np.arange(5)))
    assert table.column_names == ["path", "kept", "weight", "cluster_1"]
    assert table["weight"].to_pylist() == [1, 2, 0.5, 1, 1]


def test_weights_are_part_of_the_fingerprint(pool, tmp_path):
    first, second = (open_images(str(write(pool, tmp_path / f"{w}.parquet", weight=(w, 1, 1, 1, 1)))) for w in (1, 2))
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_is_told(pool, tmp_path, weight):
    path = write(pool, tmp_path / "manifest.parquet", weight=(1, 1, weight, 1, 1))
    with pytest.raises(UserError, match=r"the weight of 1 kept image\(s\) is .*class0/4.png"):
        open_images(str(path))
    write(pool, path, kept=(True, True, False, True, True), weight=(1, 1, weight, 1, 1))
    assert len(open_images(str(path)).names) == 4


def test_nothing_to_draw_is_told(pool, tmp_path):
    with pytest.raises(UserError, match="keeps no image"):
        open_images(str(write(pool, tmp_path / "manifest.parquet", weight=(0, 0, 0, 0, 0))))


def test_moved_images_are_told(pool, tmp_path):
    path = write(pool, tmp_path / "manifest.parquet")
    (pool / "class0" / "0.png").rename(pool / "class0" / "other.png")
    with pytest.raises(UserError, match=r"1 of 5 images are not in .*for example class0/0.png: put them back"):
        open_images(str(path))


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "class0/../../outside.png"])
def test_no_path_leaves_the_pool(pool, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    path = tmp_path / "manifest.parquet"
    write_manifest(path, {"path": [name], "kept": [True], "weight": [1.0]}, str(pool), "folder")
    with pytest.raises(UserError, match="1 of 1 images are not in"):
        open_images(str(path))


def test_an_image_named_twice_is_told(pool, tmp_path):
    path = tmp_path / "manifest.parquet"
    columns = {"path": ["class0/0.png"] * 2, "kept": [True] * 2, "weight": [1.0] * 2}
    write_manifest(path, columns, str(pool), "folder")
    with pytest.raises(UserError, match="names some images twice"):
        open_images(str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as a manifest"),
        (b"no parquet at all", "cannot be read as a manifest"),
        ({"path": ["a"], "kept": [True]}, "no column weight"),
        ({"path": ["a"], "kept": [True], "weight": [1.0]}, "no image in "),
    ],
)
def test_other_files_are_told(tmp_path, content, said):
    path = tmp_path / "manifest.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(pa.table(content), path)
    with pytest.raises(UserError, match=said):
        open_images(str(path))


def test_one_of_another_program_lies_beside_the_images(pool):
    table = pq.read_table(write(pool, pool / "manifest.parquet"))
    pq.write_table(table.replace_schema_metadata(None), pool / "mine.parquet")
    found, wanted = (open_images(str(pool / f"{name}.parquet")) for name in ("mine", "manifest"))
    assert list(found.names) == list(wanted.names)
    np.testing.assert_array_equal(found.weights / found.weights.sum(), wanted.weights / wanted.weights.sum())


def test_damaged_facts_are_told(pool, tmp_path):
    path = write(pool, tmp_path / "manifest.parquet")
    pq.write_table(pq.read_table(path).replace_schema_metadata({METADATA_KEY: b"{"}), path)
    with pytest.raises(UserError, match="what it says of its images is damaged"):
        open_images(str(path))


def test_a_pool_that_is_gone_is_told(pool, tmp_path):
    path = write(pool, tmp_path / "manifest.parquet")
    pool.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"images does not exist"):
        open_images(str(path))


def test_where_the_images_are_is_relative(pool, tmp_path):
    table = pq.read_table(write(pool, tmp_path / "manifest.parquet"))
    assert b'"root": "images"' in table.schema.metadata[METADATA_KEY]
    assert read_manifest(tmp_path / "manifest.parquet").root == str(tmp_path / "images")


def test_weights_of_any_scale_from_elsewhere(pool, tmp_path):
    """An epoch then has a draw for each image that is kept; one that says so keeps to what it says."""
    path = write(pool, tmp_path / "manifest.parquet", weight=(1, 2, 3, 4, 5))
    table = pq.read_table(path)
    scaled = table.set_column(2, "weight", pa.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    facts = {METADATA_KEY: b'{"kind": "folder", "root": "images"}'}
    for metadata, total in ((table.schema.metadata, 15), (facts, 5)):
        pq.write_table(scaled.replace_schema_metadata(metadata), path)
        weights = read_manifest(path).weights
        assert weights.tolist() == pytest.approx((np.arange(1, 6) * total / 15).tolist())


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("kept", [0, 1, 1, 0, 1], "kept must be true or false, got int64"),
        ("weight", ["one"] * 5, "weights must be numbers, got string"),
    ],
)
def test_columns_of_another_type_are_told(pool, tmp_path, column, values, said):
    path = write(pool, tmp_path / "manifest.parquet")
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)
    with pytest.raises(UserError, match=said):
        read_manifest(path)
