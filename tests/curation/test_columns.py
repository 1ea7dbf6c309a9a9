"""A manifest's columns, put together from what stages know: what they say, row by row, and what a row costs."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dino.curation.clusters import Clusters
from dino.curation.duplicates import Copies
from dino.curation.embed import Embedded
from dino.curation.pipeline import manifest_columns, reasons_to_drop
from dino.data import Pool
from dino.data.manifest import printable, write_manifest
from dino.data.sources.source import Source, packed
from dino.report.curation import reasons

ROOTS = ["test/a", "test/b"]


class Named(Source):
    """Names of 40 letters, one of them not in UTF-8, and two classes."""

    def __init__(self, count: int, odd: bool):
        names = [f"photographs/collection-{index % 7:04d}/{index:010d}" for index in range(count)]
        self.names = packed(["\udce9" + name[1:] if odd and not index else name for index, name in enumerate(names)])
        self.labels = packed(["cat", "dog"] * (count // 2)).dictionary_encode()


def known(count: int) -> tuple[Embedded, Copies, Clusters, np.ndarray]:
    """At random: a tenth cannot be read, a fifth are copies, a tenth match a test set, a tenth are not drawn."""
    generator = np.random.default_rng(0)
    chance = generator.random((4, count))
    texts = np.array(["it is torn", "it is too large"])[generator.integers(2, size=count)]
    readable = chance[0] > 0.1
    reason = pa.array(np.where(readable, "", texts)).dictionary_encode()
    hashes = np.where(readable, np.char.add("f" * 24, np.char.zfill(np.arange(count).astype(str), 8)), "").astype("S32")
    original = np.where(chance[1] > 0.2, np.arange(count), generator.integers(count, size=count))
    original[~readable] = -1
    matches = np.where(chance[2] > 0.1, 0, generator.integers(1, 3, size=count))
    candidate = (original == np.arange(count)) & (matches == 0)
    labels = np.where(candidate, generator.integers(50, size=count), -1)
    distances = np.where(candidate, generator.random(count), np.nan).astype(np.float32)
    weights = np.where(candidate & (chance[3] > 0.1), generator.random(count) + 0.1, 0.0)
    embedded = Embedded(np.zeros((count, 2)), np.zeros(0), hashes, np.full((count, 2), 9, np.int32), reason, [])
    clusters = Clusters([labels, np.arange(50) % 6], distances, np.zeros((50, 2), np.float32))
    none = np.empty(0, np.float32)
    return embedded, Copies(original, matches, np.empty((0, 2), np.int64), none, 0), clusters, weights


@pytest.mark.parametrize("odd", [False, True])
def test_every_row_says_what_became_of_its_image(tmp_path, odd):
    embedded, copies, clusters, weights = known(400)
    pool = Pool(Named(400, odd), "folder", 3)
    dropped = reasons_to_drop(embedded, copies, ROOTS, weights)
    columns = manifest_columns(pool, embedded, copies, clusters, weights, dropped)
    write_manifest(tmp_path / "manifest.parquet", columns, "", "folder")
    rows = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    names = [printable(name) for name in pool.names]
    for index, row in enumerate(rows):
        original = int(copies.original[index])
        if original < 0:
            reason = f"unreadable: {embedded.reasons[index].as_py()}"
        elif copies.matches[index]:
            reason = f"matches {ROOTS[copies.matches[index] - 1]}"
        elif original != index:
            reason = "duplicate"
        else:
            reason = "" if weights[index] else "not chosen"
        label = int(clusters.levels[0][index])
        assert row == {
            "path": names[index],
            "label": ("cat", "dog")[index % 2],
            "height": 9,
            "width": 9,
            "hash": embedded.hashes[index].decode(),
            "duplicate_of": None if original in (-1, index) else names[original],
            "dropped": reason,
            "cluster_1": label,
            "cluster_2": -1 if label < 0 else label % 6,
            "distance": None if label < 0 else float(clusters.distances[index]),
            "kept": weights[index] > 0,
            "weight": weights[index],
        }
    kinds, numbers = reasons(dropped)
    assert [kinds[number] for number in numbers] == [row["dropped"].split(":")[0] for row in rows]


def test_a_row_costs_less_than_250_bytes():
    """Of names of 40 letters with two levels of clusters, nothing of which is Python's objects."""
    count = 50_000
    embedded, copies, clusters, weights = known(count)
    pool = Pool(Named(count, odd=False), "folder", 3)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    dropped = reasons_to_drop(embedded, copies, ROOTS, weights)
    columns = manifest_columns(pool, embedded, copies, clusters, weights, dropped)
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert all(isinstance(column, pa.Array | np.ndarray) for column in columns.values())
    assert 40 * count < peak < 250 * count
