"""Pre-train a vision backbone with DINO on a folder of unlabelled images.

    dino train data.root=path/to/images run.dir=runs/mine
    dino train omniglot_cpu data.root=omniglot.zip train.epochs=5
    torchrun --nproc_per_node 8 train/pretrain.py data.root=path/to/images

The run leaves RUN/backbone.safetensors, metrics.jsonl, report.html and checkpoints. Started again by the same command,
it goes on where it stopped. On a machine without GPU, where nothing but the images is named, it measures what fits into
an hour and proposes that.
"""

import json
import sys

from dino.commands import common
from dino.config.describe import json_schema
from dino.config.recipes import recipe_and_settings
from dino.config.schema import Config, method_settings
from dino.methods import METHODS
from dino.training.proposal import is_first_run, propose
from dino.training.settings import load
from dino.training.train import run_training


def main() -> None:
    """Train by the command line, or say what a run would need, or what fits on a machine without GPU.

    Raises:
        UserError: settings that cannot work, no image that can be used, or, as the proposal, nothing but images named.
    """
    blank = Config(objective=method_settings(method_name(sys.argv)))
    parser = common.settings_parser(__doc__, blank)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what the run needs, write nothing"
    )
    parser.add_argument("--help-json", action="store_true", help="print the settings as a JSON schema")
    arguments = parser.parse_intermixed_args()
    if arguments.help_json:
        print(json.dumps(json_schema(blank), indent=1, ensure_ascii=False))
        return
    recipe, settings = recipe_and_settings(arguments.settings, arguments.config)
    config = load(recipe, settings)
    if recipe is None and is_first_run(config, [word.partition("=")[0] for word in settings]):
        raise propose(config)
    run_training(config, dry_run=arguments.dry_run)


def method_name(arguments: list[str]) -> str:
    """The method whose settings `--help` is to show."""
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("objective.name=")]
    return names[-1] if names and names[-1] in METHODS else "dino"
