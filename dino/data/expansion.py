"""How large compressed parts of a file become, for libraries that expand them as far as they go."""

import lzma
import zlib
from collections.abc import Iterator

from dino.data.formats import BYTES, Limits, UnreadableImage

MOST_GROWTH = {"deflate": 1032, "lzma": 10_000, "packbits": 64}  # each of them, at most
PIECE = 1 << 10  # compressed bytes at a time, which become 10 MB at most


def require_honest(parts: list[memoryview], compression: str, limits: Limits) -> None:
    """Raise `UnreadableImage` for compressed parts that become larger, together, than decoding an image may.

    Args:
        compression: of `MOST_GROWTH`.
    """
    most, expanded = BYTES * limits.pixels, 0
    if sum(map(len, parts)) * MOST_GROWTH[compression] <= most:
        return
    for part in parts:
        for size in _packbits_sizes(part) if compression == "packbits" else _sizes(part, compression):
            expanded += size
            if expanded > most:
                raise UnreadableImage(f"a part of it expands to more than {most:,} bytes, which no image may take")


def _sizes(part: memoryview, compression: str) -> Iterator[int]:
    expander = zlib.decompressobj() if compression == "deflate" else lzma.LZMADecompressor()
    for start in range(0, len(part), PIECE):
        if not expander.eof:
            yield len(expander.decompress(part[start : start + PIECE]))


def _packbits_sizes(part: memoryview) -> Iterator[int]:
    at = 0
    while at < len(part):
        count = part[at]
        yield count + 1 if count < 128 else 257 - count
        at += count + 2 if count < 128 else 2
