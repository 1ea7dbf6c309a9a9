"""Small folders, archives and sources for the tests of this folder."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.data import Pool, UnreadableImage
from dino.data.sources.source import packed


def png(number: int) -> bytes:
    """A PNG of noise that only `number` gives."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, names: Sequence[str]) -> Path:
    """A folder in which the file of that name holds `png` of its place in the list."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


class NoiseSource:
    """Images of noise of the sizes asked for; those in `unreadable` cannot be read. `reads` lists what was asked."""

    labels = weights = shards = None

    def __init__(self, sizes: Sequence[tuple[int, int]], channels: int = 3, unreadable: Sequence[int] = ()):
        generator = torch.Generator().manual_seed(0)
        shapes = [(channels, *size) for size in sizes]
        self.pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
        self.names = packed(str(index) for index in range(len(sizes)))
        self.unreadable, self.reads = unreadable, []

    def read(self, index: int) -> Tensor:
        self.reads.append(index)
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]

    def stamp(self) -> str:
        return "noise"


def noise_pool(sizes: Sequence[tuple[int, int]], channels: int = 3, unreadable: Sequence[int] = ()) -> Pool:
    return Pool(NoiseSource(sizes, channels, unreadable), "noise", channels)
