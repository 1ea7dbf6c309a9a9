"""Labels from folders, a column or a file, by name: what each image is called, and what is said where none is known."""

import json
import tarfile
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dino.data import open_images
from dino.errors import UserError
from tests.data.pools import archive, fill, png

NAMES = ["animals/cat/1.png", "animals/dog/2.png", "plants/oak/3.png", "plants/oak/4.png"]


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos", NAMES)


def labels(root, wanted, **options) -> dict[str, str]:
    pool = open_images(root, labels=wanted, **options)
    return dict(zip(pool.names, pool.labels, strict=True))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("folders", ["animals", "animals", "plants", "plants"]),
        ("folders:1", ["animals", "animals", "plants", "plants"]),
        ("folders:2", ["cat", "dog", "oak", "oak"]),
        ("folders:-1", ["cat", "dog", "oak", "oak"]),
        ("folders:-2", ["animals", "animals", "plants", "plants"]),
    ],
)
def test_by_folders(photos, wanted, expected):
    assert labels(photos, wanted) == dict(zip(NAMES, expected, strict=True))


SPECIES = ["Katze", "Hund", "Eiche", "Eiche"]


@pytest.mark.parametrize(
    "keys",
    [
        NAMES,
        [f"./{name}" for name in NAMES],
        ["animals/cat/1", "animals/dog/2", "plants/oak/3", "plants/oak/4"],
        ["1.png", "2.png", "3.png", "4.png"],
        [f"/elsewhere/{name}" for name in NAMES],
        ["1", "2", "3", "4"],
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_file_may_call_images_in_many_ways(photos, tmp_path, keys, kind):
    root = photos
    if kind == "zip":
        root = archive(tmp_path / "photos.zip", {name: (photos / name).read_bytes() for name in NAMES})
    table = tmp_path / "labels.csv"
    rows = "\n".join(f"{key},{species},{n}" for n, (key, species) in enumerate(zip(keys, SPECIES, strict=True)))
    table.write_text(f"id,species,number\n{rows}\n")
    assert labels(root, f"{table}:species") == dict(zip(NAMES, SPECIES, strict=True))
    assert list(labels(root, f"{table}:number").values()) == ["0", "1", "2", "3"]


def test_a_column_of_each_source_that_has_some(photos, tmp_path):
    listed = tmp_path / "list.csv"
    listed.write_text("path,label,age\n" + "".join(f"photos/{name},x{n},{n % 2}\n" for n, name in enumerate(NAMES)))
    parquet = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [png(n) for n in range(4)], "age": ["old", "young", "old", "young"]}), parquet)
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as file:
        for n in range(4):
            for name, content in ((f"{n}.png", png(n)), (f"{n}.json", json.dumps({"age": n % 2}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, BytesIO(content))
    assert list(labels(listed, "age").values()) == ["0", "1", "0", "1"]
    assert list(labels(parquet, "age").values()) == ["old", "young", "old", "young"]
    assert list(labels(shard, "age").values()) == ["0", "1", "0", "1"]
    assert list(labels([listed, parquet], "age").values()) == ["0", "1", "0", "1", "old", "young", "old", "young"]


def test_images_without_a_label_are_refused_or_left_out(photos, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(f"path,label\n{NAMES[0]},cat\n{NAMES[1]},\n{NAMES[3]},oak\ngone.png,ghost\n{NAMES[3]},oak\n")
    with pytest.raises(UserError, match=rf"2 of 4 images have none, for example {NAMES[1]}"):
        open_images(photos, labels=str(table))
    assert labels(photos, str(table), labelled_only=True) == {NAMES[0]: "cat", NAMES[3]: "oak"}


def test_labels_of_a_manifest_are_those_of_its_pool(photos, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{name},{n}\n" for n, name in enumerate(NAMES)))
    kept = {"path": NAMES, "kept": [True, False, True, True], "weight": [1.0, 1.0, 2.0, 1.0]}
    pq.write_table(pa.table(kept), photos / "manifest.parquet")
    pool = open_images(photos / "manifest.parquet", labels=str(table))
    assert list(pool.labels) == ["0", "2", "3"]
    assert pool.weights.tolist() == pytest.approx([0.75, 1.5, 0.75])


@pytest.mark.parametrize(
    ("wanted", "rows", "message"),
    [
        ("species", "", "neither a column of the images"),
        ("gone.csv", "", r"neither a column of the images .* nor a file"),
        ("folders:4", "", r"lies in 2 folder"),
        ("folders:0", "", "count from 1"),
        ("{table}:age", "path,label\na.png,1\n", "no column age beside path: label"),
        ("{table}", "path,age,height\na.png,1,2\n", "no column called label or class beside path: age, height"),
        ("{table}", "path,label\nother.png,1\n", r"knows none of the images: it speaks of other\.png, they are called"),
        ("{table}", f"path,label\n{NAMES[0]},a\n{NAMES[0]},b\n", rf"calls {NAMES[0]} both a and b"),
        ("{table}", "path,label\nx/1.png,a\ny/1.png,b\n", r"several labels for images called 1\.png"),
        ("{table}", "".join(["path,label\n", *(f"{name},same\n" for name in NAMES)]), "all are 'same'"),
        ("{table}", "", "cannot be read as a list"),
        ("{table}", f"path,label\n{NAMES[0]},\n", "knows none"),
    ],
)
def test_what_cannot_be_meant_is_told(photos, tmp_path, wanted, rows, message):
    table = tmp_path / "labels.csv"
    table.write_text(rows)
    with pytest.raises(UserError, match=message):
        open_images(photos, labels=wanted.format(table=table), labelled_only=True)


def test_one_row_for_several_images_is_refused(tmp_path):
    photos = fill(tmp_path / "photos", ["a/1.png", "b/1.png", "b/2.png"])
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n1.png,x\n2.png,y\n")
    with pytest.raises(UserError, match=r"several images are called 1\.png"):
        open_images(photos, labels=str(table))
