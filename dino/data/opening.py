"""From what the user names to a pool of images."""

import difflib
import logging
import os
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from dino.config.schema import DataConfig
from dino.data.decode import LIMITS
from dino.data.formats import Limits
from dino.data.labels import labels_by
from dino.data.levels import AS_BYTES, Levels
from dino.data.manifest import is_manifest, read_manifest, rows_of
from dino.data.pool import Pool, Transform
from dino.data.sources import SOURCES, DatasetSource, MapStyle
from dino.data.sources.several import SeveralSource, as_root, roots_of
from dino.data.sources.source import FileSource, LeftOut
from dino.data.sources.storage import is_pattern, is_remote, other_files_with_images, storage_of
from dino.distributed import rank_and_size
from dino.errors import UserError
from dino.files import shown

logger = logging.getLogger(__name__)


def open_images(
    root: str | os.PathLike | MapStyle,
    kind: str = "auto",
    channels: int | str = "auto",
    transform: Transform | None = None,
    limits: Limits = LIMITS,
    levels: Levels = AS_BYTES,
    labels: str | None = None,
    labelled_only: bool = False,
) -> Pool:
    """Open a pool of images.

    Args:
        root: a folder, an archive, a list, a manifest or whatever else docs/data.md tells of; several of them as a
            list, also as text, `[a, b]`; or a data set of the caller's own (see `MapStyle`).
        kind: a name of `SOURCES`, `manifest`, or `auto`: by what root is.
        channels: of the images given back; `auto`: 1 for Omniglot and digits, else 3.
        transform: (C, H, W) to (C, H, W) of the same type, done to every image that is read: cropping, resizing. What
            it gives must not differ from time to time, or no run can be repeated; augmentation is what views are for.
        limits: on an image's pixels, and on a file's bytes.
        levels: how many grey levels are kept.
        labels: where each image's class stands; see `labels_by`; None: where the source finds it.
        labelled_only: leave out what has no label, instead of refusing it.

    Raises:
        UserError: nothing there, no image in it, or no such labels.
    """
    pool = _opened(root, kind, channels, transform, limits, ())
    pool.levels = levels
    return pool if labels is None else _labelled(pool, labels, labelled_only)


def pool_of(data: DataConfig, source: Any = None, transform: Transform | None = None) -> Pool:
    """The images that a run's settings describe; `source` instead of `data.root`, where it is not None."""
    return open_images(
        data.root if source is None else source,
        data.kind,
        data.channels,
        transform,
        Limits(data.max_pixels, data.max_bytes),
        Levels(data.bits, None if data.range is None else (data.range[0], data.range[1])),
        data.labels,
    )


def _labelled(pool: Pool, wanted: str, labelled_only: bool) -> Pool:
    """The pool with other labels."""
    labels = labels_by(wanted, pool.source)
    has_label = labels.is_valid().to_numpy(zero_copy_only=False)
    has_label = has_label if pool.indices is None else has_label[pool.indices]
    rows, without = np.flatnonzero(has_label), np.flatnonzero(~has_label)
    pool.source.labels = pa.DictionaryArray.from_arrays(labels.indices.fill_null(0), labels.dictionary)
    if not len(without):
        return pool.subset(np.arange(len(rows)), pool.kind, pool.weights)
    missing = f"labels={shown(wanted)}: {len(without):,} of {len(has_label):,} images have none, for example "
    missing += shown(pool.names[int(without[0])])
    if not labelled_only:
        raise UserError(f"{missing}: write them down, or leave the labels out")
    if not len(rows):
        raise UserError(missing)
    _say_once(f"{missing}: they are left out")
    return pool.subset(rows, pool.kind, None if pool.weights is None else pool.weights[rows])


def _opened(
    root: Any,
    kind: str,
    channels: int | str,
    transform: Transform | None,
    limits: Limits,
    manifests: tuple[str, ...],
) -> Pool:
    """As `open_images`, with labels as the source has them.

    Args:
        manifests: by which it was come here; none of them is opened again.
    """
    if isinstance(root, list | tuple) and all(isinstance(part, str | os.PathLike) for part in root):
        root = as_root([os.fspath(part) for part in root])
    if not isinstance(root, str | os.PathLike):
        dataset = DatasetSource(root, channels)
        return Pool(dataset, "dataset", dataset.channels, transform=transform)
    root = os.path.expanduser(os.fspath(root))
    roots = [root] if kind == "folder" and os.path.isdir(root) else roots_of(root)  # else of its zip archives
    if len(roots) > 1 or roots[0] != root:
        kind = "auto" if kind == "several" else kind
        pools = [_opened(part, kind, channels, None, limits, manifests) for part in roots]
        if len({pool.channels for pool in pools}) > 1:
            raise UserError(f"{root}: images of 1 and of 3 channels: say which to make of them with data.channels")
        _tell_of_others(root, ".zip")
        return Pool(SeveralSource(roots, pools), "several", pools[0].channels, transform=transform, limits=limits)
    if kind == "manifest" or (kind == "auto" and is_manifest(root)):
        _require_root(root)
        if os.path.realpath(root) in manifests:
            raise UserError(f"{root} is a manifest that leads to itself: curate its images anew")
        manifest, manifests = read_manifest(root), (*manifests, os.path.realpath(root))
        pool = _opened(manifest.root, manifest.kind, channels, transform, limits, manifests)
        return pool.subset(rows_of(manifest, pool.names.packed(), root), "manifest", manifest.weights)
    kind = _kind_of(root, kind)
    opener = SOURCES[kind]
    if opener.fixed and channels not in ("auto", opener.channels):
        raise UserError(f"data.channels={channels}: data.kind={kind} has {opener.channels} channel(s)")
    source = opener.open(root)
    if kind in ("tar", "parquet"):
        _tell_of_others(root, f".{kind}")
    if isinstance(source, FileSource):
        source.max_bytes = limits.bytes
        if source.left_out.counts:
            _say_once(f"left out of {shown(root)}: {source.left_out}")
    channels = opener.channels if channels == "auto" else int(channels)
    pool = Pool(source, kind, channels, transform=transform, limits=limits)
    return pool if opener.subset is None else pool.subset(opener.subset(source), kind)


def _tell_of_others(root: str, ending: str) -> None:
    """Say which images and archives a folder on this machine holds besides those by which it is read."""
    if not os.path.isdir(root):
        return
    others = LeftOut()
    for name in other_files_with_images(root, ending):
        others.note_file(name)
    if others.counts:
        _say_once(
            f"{shown(root)} is read by its {ending} files; left out: {others}. Move these to a folder of their own"
        )


@cache
def _say_once(text: str) -> None:
    if rank_and_size()[0] == 0:
        logger.warning(text)


def _require_root(root: str) -> None:
    if not root:
        raise UserError("no images given: name a folder or a zip archive with data.root=…")
    if not (os.path.exists(root) or is_remote(root) or is_pattern(root)):
        raise UserError(f"{shown(root)} does not exist")


def _kind_of(root: str, kind: str) -> str:
    """The name in `SOURCES` by which a root is to be opened; raises `UserError` where none fits."""
    if kind == "dataset":
        raise UserError("data.kind=dataset is a data set handed in from Python, which no data.root leads to")
    if kind == "several":
        raise UserError(f"data.kind=several, but {root} is one: leave it auto")
    kinds = ("auto", *SOURCES, "several", "manifest")
    if kind not in kinds:
        kind = shown(kind[:100])
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no kind of data is called {kind}: choose of {', '.join(kinds)}{hint}")
    if kind != "auto" and SOURCES[kind].accepts(root):
        return kind
    for name, candidate in SOURCES.items():
        if candidate.noun and candidate.accepts(root):
            if kind == "auto":
                return name
            raise UserError(f"data.kind={kind}, but {root} is {candidate.noun}: use data.kind={name}, or leave it auto")
    _require_root(root)
    if is_remote(root):
        storage_of(root)
    raise UserError(f"{root} is neither {' nor '.join(kind.noun for kind in SOURCES.values() if kind.noun)}")
