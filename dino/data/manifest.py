"""manifest.parquet: what curation decided on each image of a pool, and the pool that training draws by it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino.errors import UserError

METADATA_KEY = b"dino"
BESIDE = '{"root": ".", "kind": "folder"}'


class Manifest(NamedTuple):
    """The part of a manifest that training needs.

    Attributes:
        root, kind: of the pool, as data.root and data.kind.
        names: (M,) of the images that are kept.
        weights: (M,) above 0: how often each is drawn in an epoch, on average.
    """

    root: str
    kind: str
    names: list[str]
    weights: np.ndarray


def printable(name: str) -> str:
    """As it stands in a manifest: bytes of a file name that are not UTF-8 are written as \\xff."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_manifest(path: Path, columns: dict[str, Any], root: str, kind: str) -> None:
    """One row an image, written aside and renamed.

    Args:
        columns: `path`, `kept`, `weight` and whatever else is known.
        root, kind: of the pool; kept relative to the manifest where the pool lies below it.
    """
    place = Path(root).expanduser().resolve() if root else None
    try:
        written = place.relative_to(path.resolve().parent).as_posix() if place else ""
    except ValueError:
        written = str(place)
    draws = float(np.asarray(columns["weight"], dtype=np.float64)[np.asarray(columns["kept"], dtype=bool)].sum())
    facts = json.dumps({"root": written, "kind": kind, "draws": draws}, sort_keys=True).encode()
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: facts})
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    partial.replace(path)


def read_manifest(path: Path) -> Manifest:
    """The images that are kept, with their weights.

    An epoch has as many draws as the weights added up to when the manifest was written. One that another program has
    written says neither that nor where its images are: it has a draw for each image that is kept, and lies beside them.

    Raises:
        UserError: no manifest, or weights that cannot be drawn by.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a manifest: {str(error).splitlines()[0]}") from error
    if missing := {"path", "kept", "weight"} - set(table.column_names):
        raise UserError(f"{path} is no manifest: it has no column {' and none '.join(sorted(missing))}")
    try:
        facts = json.loads((table.schema.metadata or {}).get(METADATA_KEY, BESIDE))
        root, kind, draws = str(facts["root"]), str(facts["kind"]), float(facts.get("draws", 0))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: what it says of its images is damaged: write it by train/curate.py") from error
    if not pa.types.is_boolean(table["kept"].type):
        raise UserError(f"{path}: kept must be true or false, got {table['kept'].type}")
    kept = table.filter(table["kept"].fill_null(False))
    names = kept["path"].to_pylist()
    try:
        weights = kept["weight"].to_numpy().astype(np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: weights must be numbers, got {table['weight'].type}") from error
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        raise UserError(
            f"{path}: the weight of {len(wrong):,} kept image(s) is {weights[wrong[0]]}, for example of "
            f"{names[wrong[0]]}: weights are numbers from 0 on"
        )
    drawn = np.flatnonzero(weights > 0)
    if not len(drawn):
        raise UserError(f"{path} keeps no image with a weight above 0")
    if root and not Path(root).is_absolute():
        root = str(path.resolve().parent / root)
    weights = weights[drawn]
    return Manifest(root, kind, [names[index] for index in drawn], weights * ((draws or len(drawn)) / weights.sum()))


def places_of(manifest: Manifest, names: Sequence[str], path: Path) -> list[int]:
    """Where the manifest's images are in the pool; a name that is not one of the pool's can reach no file.

    Raises:
        UserError: some are not there, or twice in the manifest.
    """
    places = {printable(name): index for index, name in enumerate(names)}
    missing = [name for name in manifest.names if name not in places]
    if missing:
        raise UserError(
            f"{path}: {len(missing):,} of {len(manifest.names):,} images are not in {manifest.root or manifest.kind}, "
            f"for example {missing[0]}: put them back, or curate what is there now"
        )
    if len(set(manifest.names)) < len(manifest.names):
        raise UserError(f"{path} names some images twice")
    return [places[name] for name in manifest.names]
