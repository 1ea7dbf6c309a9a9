"""What reads files from strangers, with whole files to damage: used by the fuzzers here and by benchmarks/soak.py.

A target may give what it reads or raise `UserError`; everything else is a fault.
"""

import argparse
import contextlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

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
from dino.evaluation.features import Features
from dino.evaluation.features import _read as read_features
from dino.evaluation.features import _seal as seal_of
from dino.methods import METHODS
from dino.models import ViTSpec, load_backbone
from dino.models.registry import build
from dino.models.weights import describe

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI", "QOI", "DDS")
PREPROCESSING = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
KEY = "weights and images"
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


ARGUMENTS = {"num_heads": 1, "embed_dim": 64, "position_interpolation": "offset", "resize": 18, **PREPROCESSING}
HUGGING_FACE = {"hidden_act": "gelu", "num_attention_heads": 1, "architectures": ["Dinov2Model"], "image_size": 16}
PROCESSOR = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
PROCESSOR |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"num_heads": 1},
    "pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3},
}


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


def shard() -> bytes:
    """A tar archive as WebDataset has it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        for key, label in (("000", b"cat"), ("é" * 60, b"dog")):  # the second of a name that takes headers of its own
            for ending, content in (("png", encoded("PNG")), ("cls", label), ("json", b'{"caption": "a b", "n": 1}')):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def parquet_list() -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"path": ["a.png", "b.png"], "label": ["cat", "dog"], "weight": [1.0, 0.5], "tags": [["x"], None]})
    pq.write_table(table, buffer)
    return buffer.getvalue()


def parquet_images() -> bytes:
    buffer = io.BytesIO()
    image = [{"bytes": encoded("PNG"), "path": "a.png"}, {"bytes": encoded("JPEG"), "path": None}]
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": image, "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), buffer, row_group_size=1)
    return buffer.getvalue()


def features() -> bytes:
    buffer = io.BytesIO()
    entry = Features(np.zeros((2, 1, 4), np.float32), np.zeros((2, 4), np.float32), np.arange(2))
    np.savez(buffer, **entry._asdict(), seal=seal_of(entry, KEY))
    return buffer.getvalue()


def read_all(file: Path) -> None:
    """Every image of a pool, of a folder where it is one of the files."""
    pool = open_images(file)
    for index in range(min(5, len(pool.names))):
        pool.size(index)
        read_or_reason(pool, index)


def read_cached(file: Path) -> None:
    read_features(file, KEY)


def read_image(file: Path) -> None:
    read_all(file.parent)


def read_shard(file: Path) -> None:
    """What is in it is looked up anew each time."""
    with mock.patch.dict(os.environ, DINO_CACHE=str(file.parent / "cache")):
        read_all(file)


def read_columns(file: Path) -> None:
    """A list's images, and all that it says of them."""
    pool = open_images(file)
    for name in pool.source.columns():
        with contextlib.suppress(UserError):
            pool.column(name)
    read_all(file)


def read_facts(file: Path) -> None:
    """Weights of another project's, beside which facts lie."""
    weights = file.with_name("model.safetensors")
    weights.write_bytes(FOREIGN)
    load_backbone(weights)


def read_config(file: Path) -> None:
    assert METHODS  # settings are those of a method
    read(Config, str(file), [])


FOREIGN = weights()[1]


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
        "shards": Target("x.tar", [shard()], read_shard),
        "Parquet images": Target("x.parquet", [parquet_images()], read_columns),
        "Parquet lists": Target("x.parquet", [parquet_list()], read_columns),
        "CSV lists": Target("x.csv", [b'path,label,weight\na.png,cat,1\n"b.png",dog,0.5\n'], read_columns),
        "TSV lists": Target("x.tsv", ["image\tclass\ta b\na.png\té\t1\nb.png\tdog\t\n".encode()], read_columns),
        "text lists": Target("x.txt", [b"a.png\nb.png\n", b"cat/a.png\r\ndog/b.png"], read_columns),
        "arguments": Target("arguments.json", [json.dumps(ARGUMENTS).encode()], read_facts),
        "config.json": Target(
            "config.json", [json.dumps(facts).encode() for facts in (HUGGING_FACE, TIMM)], read_facts
        ),
        "processors": Target("preprocessor_config.json", [json.dumps(PROCESSOR).encode()], read_facts),
        "caches": Target("x.npz", [features()], read_cached),
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
