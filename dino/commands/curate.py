"""Curate a pool of images: embed, de-duplicate, cluster, rebalance; what is left is trained on with data.kind=manifest.

    dino curate data.root=path/to/images weights=dinov2_vits14 run.dir=runs/curated
    accelerate launch train/curate.py data.root=path/to/images weights=dinov2_vits14 run.dir=runs/curated
    accelerate launch train/pretrain.py data.root=runs/curated/manifest.parquet run.dir=runs/mine

The run leaves RUN/manifest.parquet, a row for each image with what became of it and why, and report.html. Started again
by the same command, it goes on where it stopped; after a change of settings, with the first stage that they touch.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dino.commands import common
from dino.config import read as configuration
from dino.config.describe import describe
from dino.curation import settings
from dino.curation.pipeline import Curation
from dino.data import open_images
from dino.data.manifest import read_manifest, write_manifest
from dino.errors import UserError
from dino.models import load_backbone
from dino.report.curation import write as write_report


def main() -> None:
    arguments = parse()
    config = configuration.read(settings.CurateConfig, arguments.config, arguments.settings)
    settings.check(config)
    accelerator = common.accelerator()
    backbone = load_backbone(config.weights).to(accelerator.device)
    images = open_images(config.data.root, config.data.kind, backbone.spec.in_chans)
    directory = Path(config.run.dir)
    refuse_other_directories(directory, config)
    common.set_cpu_threads(config.run.cpu_threads)
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(configuration.dump(config))
    accelerator.wait_for_everyone()

    curation = Curation(config, images, backbone, directory, accelerator)
    columns = curation.run()
    if accelerator.is_main_process:
        write_manifest(directory / "manifest.parquet", columns, config.data.root, images.kind)
        write_report(curation, columns)
        reasons = np.array([reason.split(":")[0] for reason in columns["dropped"]])
        print(f"{len(images.names):,} images: {int(np.sum(columns['kept'])):,} kept", end="")
        for reason, count in zip(*np.unique(reasons[reasons != ""], return_counts=True), strict=True):
            print(f", {count:,} {reason}", end="")
        print(f"\n{directory / 'manifest.parquet'} and {directory / 'report.html'}")
    accelerator.end_training()


def refuse_other_directories(directory: Path, config: settings.CurateConfig) -> None:
    """A run directory is empty or a curation's, and the pool lies elsewhere."""
    place = directory.resolve()
    for root in sources(config):
        pool = Path(root).expanduser().resolve()
        if place.is_relative_to(pool) or pool.is_relative_to(place):
            raise UserError(f"run.dir={directory} and the images of {root} lie in each other: name a run.dir elsewhere")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file: name a directory")
    if any(directory.iterdir()):
        try:
            configuration.read(settings.CurateConfig, str(directory / "config.yaml"), [])
        except UserError as error:
            raise UserError(
                f"run.dir={directory} is not empty and holds no curation: name another directory"
            ) from error


def sources(config: settings.CurateConfig) -> Iterator[str]:
    """Where images come from: the pool, and the pools that its manifest was made of; test sets and seeds."""
    yield from config.duplicates.against
    if config.rebalance.seeds:
        yield config.rebalance.seeds
    root, known = config.data.root, set[str]()
    while root and root not in known:
        yield root
        known.add(root)
        root = read_manifest(Path(root)).root if root.endswith(".parquet") else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings, in YAML as groups and keys or as key=value:\n" + describe(settings.CurateConfig()),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, for example configs/curate.yaml")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that take precedence over the file's"
    )
    return parser.parse_intermixed_args()
