"""Whether a run that goes on sees the images that it began with: by names and sizes, and where asked for by content."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

import pyarrow.compute as pc
from torch import Tensor
from tqdm import tqdm

from dino.data.formats import UnreadableImage
from dino.data.pool import Pool, fingerprint
from dino.distributed import cores


def facts(images: Pool, content: bool) -> dict[str, str]:
    """Digests by which a later start compares its images, wherever they lie then.

    Args:
        content: whether to read all images.

    Returns:
        `images`, see `fingerprint`; `names`, without the folders that all of them lie in, which an archive of a folder
        has and the folder has not; `sizes` and `times` of their files, where they are files; `content` if asked for.
    """
    digests = {"images": fingerprint(images), "names": _digest_of_names(images, _length_of_shared_folders(images))}
    stats = getattr(images.source, "stats", None)  # which a source may have: (N, 2) sizes and times
    if stats is not None:
        sizes, times = (stats() if images.indices is None else stats()[images.indices]).T
        digests |= {"sizes": _short(sizes.tobytes()), "times": _short(times.tobytes())}
    if content:
        digests["content"] = _content(images)
    return digests


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is other in a pool than it was, by the facts of both; nothing where they are the same.

    Times alone, which copies have of their own, are no difference.
    """
    differing = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    if ("names" if "names" in before else "images") in differing:
        return "files were added, removed or renamed, or roots come in another order"
    if "sizes" in differing:
        return "files of the same names have other sizes"
    return "files of the same names have other content" if "content" in differing else ""


def _digest_of_names(images: Pool, skipped: int) -> str:
    digest = hashlib.sha256()
    for name in images.names:
        digest.update(name[skipped:].encode("utf-8", "surrogateescape") + b"\0")
    if images.weights is not None:
        digest.update(images.weights.tobytes())
    return digest.hexdigest()[:16]


def _length_of_shared_folders(images: Pool) -> int:
    """Letters at the beginning of all names that are folders; what the first and the last in order share, all do."""
    extremes = pc.min_max(images.names.packed()).as_py()
    first, last = (extremes[which].decode("utf-8", "surrogatepass").split("/")[:-1] for which in ("min", "max"))
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return sum(len(folder) + 1 for folder, _ in shared)


def _content(images: Pool) -> str:
    """A digest of all files, or pixels, in order."""
    blocks = range(0, len(images.names), 1024)
    with ThreadPoolExecutor(cores()) as threads:
        digests = threads.map(lambda start: _content_of_block(images, start), blocks)
        bar = tqdm(digests, total=len(blocks), desc="checking content", unit=" × 1024 images", leave=False)
        return _short(b"".join(bar))


def _content_of_block(images: Pool, start: int) -> bytes:
    digest = hashlib.sha256()
    for index in range(start, min(start + 1024, len(images.names))):
        try:
            content = images.source.read(int(index if images.indices is None else images.indices[index]))
        except UnreadableImage:
            content = b"unreadable"
        content = content.numpy().tobytes() if isinstance(content, Tensor) else content
        digest.update(hashlib.sha256(content).digest())
    return digest.digest()


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
