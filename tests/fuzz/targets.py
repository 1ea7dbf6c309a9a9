"""What reads files from strangers, with whole files to damage: used by the fuzzers here and by benchmarks/soak.py.

A target may give what it reads or raise `UserError`; everything else is a fault.
"""

import argparse
import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from dino.config.read import read
from dino.config.schema import Config
from dino.data import open_images, read_or_reason
from dino.errors import UserError
from dino.evaluation.features import _read as read_features
from dino.methods import METHODS
from dino.models import ViTSpec, load_backbone
from dino.models.registry import build
from dino.models.weights import describe

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI", "QOI", "DDS")
PREPROCESSING = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
CONFIG = b"""data: {root: images, channels: 3, cache: none}
views:
  global_scale: [0.4, 1.0]
  augment: {blur: 0.3}
model: {arch: vit_small, embed_dim: null, drop_path: 0.1}
objective: {name: dino}
optim: {lr: auto, warmup_steps: 10}
train:
  steps: 100
  phases: [{begin: 0.5, global_size: 96, local_size: 48}]
tracking: {name: "${oc.env:HOME} \\u00e9", backends: []}
"""


class Target(NamedTuple):
    """Something that reads a file: whole ones, and what is done with a damaged one of that name."""

    name: str
    wholes: list[bytes]
    use: Callable[[Path], object]

    def attempt(self, content: bytes, folder: Path) -> None:
        """Read a file of this content; raises whatever is a fault."""
        file = folder / self.name
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            self.use(file)


def encoded(format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format, **options)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    return buffer.getvalue()


def weights() -> tuple[bytes, bytes, bytes, bytes]:
    """A backbone of this project's, of another's, and both as torch.save writes them."""
    torch.manual_seed(0)
    backbone = build(ViTSpec(64, 1, 1, 8, 16))
    state, files = backbone.state_dict(), []
    for content in (
        state,
        {"teacher": {f"module.{name}": t for name, t in state.items()}, "args": argparse.Namespace()},
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.append(buffer.getvalue())
    return save(state, describe(backbone, PREPROCESSING, {})), save(state), files[0], files[1]


def manifest() -> bytes:
    table = pa.table({"path": ["a.png", "b.png"], "kept": [True, True], "weight": [1.0, 0.5]})
    buffer = io.BytesIO()
    facts = json.dumps({"root": ".", "kind": "folder", "draws": 2.0}).encode()
    pq.write_table(table.replace_schema_metadata({b"dino": facts}), buffer)
    return buffer.getvalue()


def archive(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name in ("cat/1.png", "dog/é.jpg"):
            file.writestr(name, encoded("PNG"))
    return buffer.getvalue()


def features() -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer, blocks=np.zeros((2, 1, 4), np.float32), patch_means=np.zeros((2, 4), np.float32), rows=np.arange(2)
    )
    return buffer.getvalue()


def read_all(file: Path) -> None:
    """Every image of a pool, of a folder where it is one of the files."""
    pool = open_images(file)
    for index in range(min(5, len(pool.names))):
        pool.size(index)
        read_or_reason(pool, index)


def read_image(file: Path) -> None:
    read_all(file.parent)


def read_config(file: Path) -> None:
    assert METHODS  # settings are those of a method
    read(Config, str(file), [])


def targets() -> dict[str, Target]:
    """By name."""
    own, foreign, plain, checkpoint = weights()
    images = [encoded(format) for format in FORMATS]
    images += [encoded("JPEG", progressive=True), encoded("PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")]
    archives = [
        archive(kind) for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    ]
    return {
        "images": Target("x.png", images, read_image),
        "arrays": Target("x.npy", [npy()], read_image),
        "config": Target("config.yaml", [CONFIG], read_config),
        "safetensors": Target("x.safetensors", [own, foreign], load_backbone),
        "torch.save": Target("x.pth", [plain, checkpoint], load_backbone),
        "manifests": Target("manifest.parquet", [manifest()], read_all),
        "archives": Target("x.zip", archives, read_all),
        "caches": Target("x.npz", [features()], read_features),
    }


def damaged(content: bytes, edits: list[tuple[int, float, bytes]]) -> bytes:
    """A file with some edits: which kind, where (a fraction of its length), and bytes to put there.

    Kinds: 0 a bit, 1 bytes in place of others, 2 bytes between others, 3 the end cut off, 4 a part cut out, 5 a part
    twice.
    """
    for kind, where, piece in edits:
        at = min(int(where * len(content)), max(0, len(content) - 1))
        if kind == 0 and content:
            content = content[:at] + bytes([content[at] ^ 1 << (len(piece) % 8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == 2:
            content = content[:at] + piece + content[at:]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            content = content[:at] + content[at + 16 * len(piece) :]
        else:
            content = content[: at + 32] + content[at:]
    return content
