"""Curate a pool of images: embed, de-duplicate, cluster, rebalance; what is left is trained on with data.kind=manifest.

    dino curate data.root=path/to/images weights=dinov2_vits14 run.dir=runs/curated
    torchrun --nproc_per_node 8 train/curate.py data.root=path/to/images weights=dinov2_vits14 run.dir=runs/curated
    torchrun --nproc_per_node 8 train/pretrain.py data.root=runs/curated/manifest.parquet run.dir=runs/mine

    dino curate data.root=path/to/images weights=dinov2_vits14 run.dir=runs/look rebalance.method=none --report-only
    dino curate data.root=path/to/images weights=dinov2_vits14 run.dir=runs/unique rebalance.method=none --copy unique/

The run leaves RUN/manifest.parquet, a row for each image with what became of it and why, and report.html. Started again
by the same command, it goes on where it stopped; after a change of settings, with the first stage that they touch.
"""

from accelerate import PartialState

from dino.commands import common
from dino.config import read as configuration
from dino.config.recipes import recipe_and_settings
from dino.curation.curate import curate_by, sources
from dino.curation.kept import WAYS, check_target, write_kept
from dino.curation.settings import CurateConfig


def main() -> None:
    """Curate by the command line, and hand what is kept to other programs if asked to.

    Raises:
        UserError: settings that cannot work, a target that cannot be written to, or no image that can be used.
    """
    parser = common.settings_parser(__doc__, CurateConfig())
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--report-only", action="store_true", help="write report.html, and no manifest.parquet")
    output.add_argument("--copy", metavar="FOLDER", type=common.path_of, help="copy the images that are kept there")
    output.add_argument("--link", metavar="FOLDER", type=common.path_of, help="link to them from there (symlinks)")
    output.add_argument("--list", metavar="FILE", type=common.path_of, help="write their paths there, as lines (.txt)")
    arguments = parser.parse_intermixed_args()
    recipe, settings = recipe_and_settings(arguments.settings, arguments.config)
    config = configuration.read(CurateConfig, recipe, settings)
    ways = {way: getattr(arguments, way) for way in WAYS if getattr(arguments, way)}
    for way, target in ways.items():
        check_target(way, target, sources(config))
    curation = curate_by(config, arguments.report_only)
    processes = PartialState()
    dropped = [f"{count:,} {reason}" for reason, count in curation.dropped.items()]
    processes.print(", ".join([f"{curation.images:,} images: {curation.kept:,} kept", *dropped]))
    if not arguments.report_only:
        processes.print(f"{curation.manifest} and {curation.report}")
    elif curation.manifest.exists():
        processes.print(f"{curation.report}; {curation.manifest} is left as an earlier call wrote it")
    else:
        processes.print(str(curation.report))
    if processes.is_main_process:
        for way, target in ways.items():
            print(f"{target}: {write_kept(curation.manifest, way, target):,} images")
    processes.destroy_process_group()
