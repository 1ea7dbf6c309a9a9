"""Curate a pool of images: embed, de-duplicate, cluster, rebalance; what is left is trained on with data.kind=manifest.

    dino curate data.root=path/to/images weights=dinov2_vits14 run.dir=runs/curated
    accelerate launch train/curate.py data.root=path/to/images weights=dinov2_vits14 run.dir=runs/curated
    accelerate launch train/pretrain.py data.root=runs/curated/manifest.parquet run.dir=runs/mine

The run leaves RUN/manifest.parquet, a row for each image with what became of it and why, and report.html. Started again
by the same command, it goes on where it stopped; after a change of settings, with the first stage that they touch.
"""

from accelerate import PartialState

from dino.commands import common
from dino.config import read as configuration
from dino.config.recipes import recipe_and_settings
from dino.curation.curate import curate_by
from dino.curation.settings import CurateConfig


def main() -> None:
    arguments = common.settings_parser(__doc__, CurateConfig()).parse_intermixed_args()
    recipe, settings = recipe_and_settings(arguments.settings, arguments.config)
    curation = curate_by(configuration.read(CurateConfig, recipe, settings))
    processes = PartialState()
    dropped = [f"{count:,} {reason}" for reason, count in curation.dropped.items()]
    processes.print(", ".join([f"{curation.images:,} images: {curation.kept:,} kept", *dropped]))
    processes.print(f"{curation.manifest} and {curation.report}")
    processes.destroy_process_group()
