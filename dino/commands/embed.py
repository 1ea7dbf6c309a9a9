"""Embed a pool of images with any weights, for use elsewhere.

    dino embed --weights dinov2_vits14 --data path/to/images --out embeddings.parquet
    torchrun --nproc_per_node 8 eval/embed.py --weights runs/mine --data path/to/images --out tokens.npy --tokens both

A .parquet file has a row for each image: its path, its label where it has one, and its embedding. An .npy file
holds the matrix alone, and a .txt file beside it the paths in the same order. Images that cannot be read are left out
and named. `dino.embed` gives the same in Python.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino.commands import common
from dino.data.manifest import printable
from dino.errors import UserError
from dino.evaluation.embed import embed
from dino.files import replacing, shown, write_text


def main() -> None:
    """Embed a pool, and write the features to a table; of several processes the first writes.

    Raises:
        UserError: weights or images that cannot be read, or a file that cannot be written to.
    """
    parser = common.parser(
        __doc__,
        weights={},
        heads={},
        data={},
        kind={},
        labels={},
        precision={},
        out={"required": True, "help": "file.parquet or file.npy"},
    )
    parser.add_argument("--tokens", choices=["class", "patch", "both"], default="class", help="patch: their mean")
    arguments = parser.parse_args()
    if arguments.out.suffix not in (".parquet", ".npy"):
        raise UserError(f"--out {arguments.out} must end in .parquet or .npy")
    common.output_file(arguments.out)
    accelerator = common.accelerator()
    features = embed(
        arguments.weights,
        arguments.data,
        accelerator=accelerator,
        kind=arguments.kind,
        precision=arguments.precision,
        heads=arguments.heads,
        labels=arguments.labels,
    )
    if not accelerator.is_main_process:
        return
    if arguments.tokens == "both":
        values = np.concatenate([features.class_tokens, features.patch_means], axis=1)
    else:
        values = features.class_tokens if arguments.tokens == "class" else features.patch_means
    names = [printable(name) for name in features.names]
    if arguments.out.suffix == ".npy":
        write_npy(arguments.out, values, names)
    else:
        write_parquet(arguments.out, values, names, features.labels)
    left_out = f", {features.left_out} left out" if features.left_out else ""
    print(f"{arguments.out}: {values.shape[0]:,} × {values.shape[1]}{left_out}")


def write_npy(out: Path, values: np.ndarray, names: list[str]) -> None:
    """The matrix, and the paths beside it, a line each."""
    write_text(out.with_suffix(".txt"), "".join(shown(name) + "\n" for name in names))
    with replacing(out) as partial, partial.open("wb") as file:
        np.save(file, values)


def write_parquet(out: Path, values: np.ndarray, names: list[str], labels: list[str] | None) -> None:
    """Columns path, label where there are any, and embedding."""
    columns = {"path": pa.array(names)}
    if labels is not None:
        columns["label"] = pa.array([printable(label) for label in labels])
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    with replacing(out) as partial:
        pq.write_table(pa.table(columns), partial)
