"""Several roots as one pool: data.root=[photos, scans.zip, s3://bucket/more]."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import yaml
from torch import Tensor

from dino.data.sources.columns import as_text
from dino.data.sources.source import Names, Source, below, digest_of, packed
from dino.data.sources.storage import files_of, is_pattern, is_remote, most_common_ending
from dino.errors import UserError


class Member(Protocol):
    """What is asked of a pool that becomes a part of another."""

    source: Source
    names: Names
    labels: Any
    weights: np.ndarray | None

    def content(self, index: int) -> bytes | Tensor: ...
    def column(self, name: str) -> pa.Array | None: ...
    def location(self, index: int) -> Path | None: ...


class SeveralSource(Source):
    """The images of all roots, one root after the other, named `<root's last part>/<name>`.

    There are labels where every root has some, and weights where one has: an image of another root comes once.
    """

    def __init__(self, roots: Sequence[str], pools: Sequence[Member]):
        self.pools = pools
        counts = [len(pool.names) for pool in pools]
        self.starts = np.cumsum([0, *counts])
        named = zip(_titles(roots), pools, strict=True)
        self.names = pa.concat_arrays([below(title, pool.names.packed()) for title, pool in named])
        if all(pool.labels is not None for pool in pools):
            self.labels = pa.concat_arrays([packed(pool.labels) for pool in pools]).dictionary_encode()
        if any(pool.weights is not None for pool in pools):
            self.weights = np.concatenate([np.ones(len(p.names)) if p.weights is None else p.weights for p in pools])
        self.shards = self._shards(counts)

    def _shards(self, counts: Sequence[int]) -> np.ndarray | None:
        parts, first = [], 0
        for pool, count in zip(self.pools, counts, strict=True):
            shards = getattr(pool, "shards", None)
            part = np.zeros(count, np.int32) if shards is None else shards
            parts.append(part + first)
            first = int(parts[-1].max()) + 1
        return np.concatenate(parts).astype(np.int32)

    def read(self, index: int) -> bytes | Tensor:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.pools[number].content(index - int(self.starts[number]))

    def column(self, name: str) -> pa.Array | None:
        """Of all roots, null where one has none of that name."""
        parts: list[pa.Array] = []
        for pool in self.pools:
            part = pool.column(name)
            parts.append(pa.nulls(len(pool.names), pa.large_string()) if part is None else as_text(part))
        return None if all(part.null_count == len(part) for part in parts) else pa.concat_arrays(parts)

    def columns(self) -> list[str]:
        return sorted({name for pool in self.pools for name in pool.source.columns()})

    def location(self, index: int) -> Path | None:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.pools[number].location(index - int(self.starts[number]))

    def stamp(self) -> str:
        return digest_of(pool.source.stamp() for pool in self.pools)


def _titles(roots: Sequence[str]) -> list[bytes]:
    """The last part of each root; with a number where several have the same."""
    titles = [os.path.basename(os.path.normpath(root)) or "root" for root in roots]
    counts, seen = Counter(titles), Counter[str]()
    numbered = []
    for title in titles:
        seen[title] += 1
        numbered.append((f"{title}-{seen[title]}" if counts[title] > 1 else title).encode("utf-8", "surrogatepass"))
    return numbered


def roots_of(root: str) -> list[str]:
    """The roots that `[a, b]`, a folder of zip archives or a pattern of them stands for; any other is its only one."""
    if (root.endswith(".zip") and is_pattern(root)) or (os.path.isdir(root) and most_common_ending(root) == ".zip"):
        return [file.path for file in files_of(root, (".zip",))] or [root]
    if not (root.startswith("[") and root.endswith("]")) or os.path.exists(root):
        return [root]
    try:
        roots = yaml.load(root, yaml.BaseLoader)  # in which everything is text: 010 is a name, too
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f'{root} is no list of roots: write [a, b], names with brackets in quotes: ["{{0..9}}.tar", b]'
        ) from error
    if not roots or not all(isinstance(part, str) and part for part in roots):
        raise UserError(f"{root} is no list of roots: write [a, b]")
    return [os.path.expanduser(part) for part in roots]


def as_root(roots: Sequence[str]) -> str:
    """Several roots as one text, which `roots_of` takes apart again."""
    return yaml.safe_dump(list(roots), default_flow_style=True, width=10**6, allow_unicode=True).strip()


def absolute(root: str) -> str:
    """A root, or each of several, from the top of the file system, so that it can be opened from anywhere."""
    parts = roots_of(root) if root.startswith("[") else [root]
    roots = [part if is_remote(part) or not part else os.path.abspath(os.path.expanduser(part)) for part in parts]
    return roots[0] if len(roots) == 1 else as_root(roots)
