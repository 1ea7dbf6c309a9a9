"""manifest.parquet: what curation decided on each image of a pool, and the pool that training draws by it."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dino.data.sources.columns import require_names, require_rows, without_views
from dino.data.sources.several import absolute
from dino.data.sources.source import BLOCK, Names
from dino.data.sources.storage import is_remote
from dino.errors import UserError
from dino.files import replacing, require_regular, shown

METADATA_KEY = b"dino"
BESIDE = '{"root": ".", "kind": "folder"}'
MOST_DRAWS = 1000  # of an image in an epoch, on average
COLUMNS = ["path", "kept", "weight"]


class Manifest(NamedTuple):
    """The part of a manifest that training needs."""

    root: str  # of the pool, as data.root and data.kind
    kind: str
    names: pa.Array  # (M,) of the images that are kept, as `printable` has them
    weights: np.ndarray  # (M,) above 0: how often each is visited in an epoch, on average


def printable(name: str) -> str:
    """As it stands in a manifest: bytes of a file name that are not UTF-8 are written as \\udcff."""
    return name.encode("utf-8", "backslashreplace").decode()


def printable_names(names: Names) -> pa.Array:
    """(N,) all of them as text in Arrow; those that are UTF-8 need not become Python's strings."""
    try:
        return names.packed().cast(pa.large_string())
    except pa.ArrowInvalid:
        blocks = range(0, len(names), BLOCK)
        texts = ([printable(name) for name in names[start : start + BLOCK]] for start in blocks)
        return pa.concat_arrays([pa.array(block, pa.large_string()) for block in texts])


def write_manifest(path: Path, columns: dict[str, Any], root: str, kind: str) -> None:
    """One row an image: `path`, `kept`, `weight` and whatever else is known, as arrays or lists.

    The pool's root is kept relative to the manifest where it lies below it, so that both can move together.
    """
    root = absolute(root) if root else ""
    if os.path.exists(root):
        pool, beside = Path(root).resolve(), path.resolve().parent
        root = pool.relative_to(beside).as_posix() if pool.is_relative_to(beside) else str(pool)
    samples = float(np.asarray(columns["weight"], dtype=np.float64)[np.asarray(columns["kept"], dtype=bool)].sum())
    facts = json.dumps({"root": root, "kind": kind, "draws": samples}, sort_keys=True).encode()
    table = pa.table(columns)
    # Without Arrow's own schema: how text is held here is no one else's concern, and readers get plain text.
    with replacing(path) as partial, _writer(partial, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: facts})


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """With a checksum of every page: a bit that flips in the weights would change what is drawn, and nothing else."""
    return pq.ParquetWriter(path, schema, store_schema=False, write_page_checksum=True)


def is_manifest(path: str) -> bool:
    """Whether a file has a manifest's columns; a .parquet file that cannot be read is taken for a damaged one."""
    if not path.endswith(".parquet") or not os.path.isfile(path):
        return False
    try:
        return {"path", "kept"} <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException, ValueError):  # ValueError: names that are not UTF-8
        return True


def read_manifest(path: str | Path) -> Manifest:
    """The images that are kept, with their weights.

    An epoch has as many samples as the weights added up to when the manifest was written. One that another program has
    written says neither that nor where its images are: it has a sample for each image kept, and lies beside them.
    Raises `UserError` for what is no manifest, or has weights that cannot be sampled by.
    """
    try:
        require_regular(Path(path))
        with pq.ParquetFile(path) as file:
            require_rows(file, os.path.getsize(path), path)
            schema = file.schema_arrow
        require_names(schema.names, path)
        if missing := set(COLUMNS) - set(schema.names):
            raise UserError(f"{path} is no manifest: it has no column {' and none '.join(sorted(missing))}")
        # Text that repeats stays packed, as in the file, until it is known that no name comes twice.
        packed = ["path"] if schema.field("path").type in (pa.string(), pa.large_string()) else []
        with pq.ParquetFile(path, read_dictionary=packed, page_checksum_verification=True) as file:
            table = without_views(file.read(columns=COLUMNS))
        table.validate(full=True)  # that text is UTF-8 is no more than said by a file
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a manifest: {shown(reason)}") from error
    try:
        facts = json.loads((table.schema.metadata or {}).get(METADATA_KEY, BESIDE))
        root, kind, samples = str(facts["root"]), str(facts["kind"]), float(facts.get("draws", 0))
        if not 0 <= samples < float("inf"):
            raise ValueError(f"{samples} draws")
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: what it says of its images is damaged: write it by train/curate.py") from error
    if not pa.types.is_boolean(table["kept"].type):
        raise UserError(f"{path}: kept must be true or false, got {table['kept'].type}")
    names, weights = _kept(table, path)
    if root and not (Path(root).is_absolute() or is_remote(root) or root.startswith("[")):
        root = str(Path(path).resolve().parent / root)
    samples = samples or len(weights)
    if samples > MOST_DRAWS * len(weights):
        raise UserError(f"{path}: an epoch would draw {samples:.3g} samples of {len(weights):,} images")
    return Manifest(root, kind, names, weights / weights.sum() * samples)


def _kept(table: pa.Table, path: str | Path) -> tuple[pa.Array, np.ndarray]:
    """Names and weights of the images that are kept with a weight above 0."""
    try:
        table = table.filter(table["kept"].fill_null(False))
        if len(pc.unique(table["path"])) < len(table):
            raise UserError(f"{path} names some images twice")
        names = table["path"].cast(pa.large_string()).combine_chunks()
        weights = table["weight"].to_numpy().astype(np.float64)
    except pa.ArrowException as error:
        raise UserError(f"{path}: paths must be text, got {table['path'].type}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: weights must be numbers, got {table['weight'].type}") from error
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        raise UserError(
            f"{path}: the weight of {len(wrong):,} kept image(s) is {weights[wrong[0]]}, for example of "
            f"{shown(str(names[wrong[0]]))}: weights are numbers from 0 on"
        )
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not np.isfinite(total):
        raise UserError(f"{path}: the weights, up to {weights.max():.3g}, add up to more than a number can be")
    above_zero = weights > 0
    if not above_zero.any():
        raise UserError(f"{path} keeps no image with a weight above 0")
    return names.filter(pa.array(above_zero)), weights[above_zero]


def rows_of(manifest: Manifest, names: pa.Array, path: str | Path) -> np.ndarray:
    """(M,) where the manifest's images are among a pool's (packed) names; any other name can reach no file."""
    rows = pc.index_in(manifest.names, value_set=printable_names(Names(names)))
    if rows.null_count:
        missing = manifest.names.filter(rows.is_null())
        raise UserError(
            f"{path}: {len(missing):,} of {len(rows):,} images are not in {manifest.root or manifest.kind}, "
            f"for example {shown(str(missing[0]))}: put them back, or curate what is there now"
        )
    if len(rows.unique()) < len(rows):
        raise UserError(f"{path} names some images twice")
    return rows.to_numpy().astype(np.int64)
