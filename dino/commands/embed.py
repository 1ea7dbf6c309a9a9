"""Embed a pool of images with any weights, for use elsewhere.

    python eval/embed.py --weights dinov2_vits14 --data path/to/images --out embeddings.parquet
    accelerate launch eval/embed.py --weights runs/mine --data path/to/images --out embeddings.npy --tokens both

A .parquet file has a row for each image: its path, its label where folders give one, and its embedding. An .npy file
holds the matrix alone, and a .txt file beside it the paths in the same order. Images that cannot be read are left out
and named.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino.commands import common
from dino.data import open_images
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.models import load_backbone


def main() -> None:
    arguments = parse()
    if arguments.out.suffix not in (".parquet", ".npy"):
        raise UserError(f"--out {arguments.out} must end in .parquet or .npy")
    common.output_file(arguments.out)
    accelerator = common.accelerator()
    backbone = load_backbone(arguments.weights).to(accelerator.device)
    images = open_images(arguments.data, arguments.kind, backbone.spec.in_chans)
    found = extract(
        backbone, images, range(len(images.names)), backbone.preprocess, title="embedding", accelerator=accelerator
    )
    if not len(found.rows):
        raise UserError(f"no image of {len(images.names)} in {arguments.data} can be read")
    values = {"class": found.class_tokens, "patch": found.patch_means, "both": found.both}[arguments.tokens]
    if accelerator.is_main_process:
        names = [images.names[row] for row in found.rows]
        labels = None if images.labels is None else [images.labels[row] for row in found.rows]
        save(arguments.out, values, names, labels)
        left_out = len(images.names) - len(names)
        print(f"{arguments.out}: {values.shape[0]:,} × {values.shape[1]}" + (f", {left_out} left out" * bool(left_out)))


def save(out: Path, values: np.ndarray, names: list[str], labels: list[str] | None) -> None:
    """Write the file beside its place first, so that a partial one is never seen."""
    names = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    partial = out.with_name(f".{out.name}.partial")
    if out.suffix == ".npy":
        with partial.open("wb") as file:
            np.save(file, values)
        out.with_suffix(".txt").write_text("".join(name.replace("\n", "\\n") + "\n" for name in names))
    else:
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        columns = {"path": pa.array(names), **({"label": pa.array(labels)} if labels else {}), "embedding": embeddings}
        pq.write_table(pa.table(columns), partial)
    partial.replace(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="W", help="released name, run directory or file")
    parser.add_argument("--data", required=True, help="folder or zip archive of images")
    parser.add_argument("--kind", default="auto", help="as data.kind")
    parser.add_argument("--out", type=Path, required=True, help="file.parquet or file.npy")
    parser.add_argument("--tokens", choices=["class", "patch", "both"], default="class", help="patch: their mean")
    return parser.parse_args()
