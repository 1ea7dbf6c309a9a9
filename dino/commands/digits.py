"""The demo's probe: what the pre-trained features are worth when only 10 digits of each class have a label.

    dino digits --run runs/demo

Prints a table and writes RUN/results.json and RUN/report.html. Raw pixels and the same network before training stand
beside the pre-trained one, on the same 20 choices of labelled digits.
"""

import json

import numpy as np
import torch

from dino.commands import common
from dino.data import open_images
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.evaluation.probes import few_shot
from dino.files import write_text
from dino.models import build_backbone, load_backbone
from dino.report.run import write_report
from dino.run import RunDirectory
from dino.tracking import Table, log_evaluations

PER_CLASS, SEEDS = 10, 20
COLUMNS = ["features", "1-NN", "logistic regression"]


def main() -> None:
    """Judge the demo's run, and write table and page into its directory.

    Raises:
        UserError: the directory holds no run of digits, or W&B cannot get what --wandb asks for.
    """
    parser = common.parser(__doc__, wandb={})
    parser.add_argument(
        "--run", type=common.path_of, required=True, help="run directory of a pre-training on data.kind=digits"
    )
    arguments = parser.parse_args()
    common.check_wandb(arguments.wandb, [str(arguments.run)])
    directory = RunDirectory(arguments.run)
    features, labels = features_of(directory)
    accuracies = {name: few_shot(values, labels, PER_CLASS, SEEDS) for name, values in features.items()}
    rows = [[name, str(of["knn"]), str(of["logistic"])] for name, of in accuracies.items()]
    caption = (
        f"{PER_CLASS} labelled digits per class, the other {len(labels) - 10 * PER_CLASS:,} are the test; "
        f"mean ± standard deviation over {SEEDS} draws. Pre-training saw all images, without labels."
    )
    figures = {
        name: {probe: {"mean": accuracy.mean, "std": accuracy.std} for probe, accuracy in of.items()}
        for name, of in accuracies.items()
    }
    results = {"caption": caption, "columns": COLUMNS, "rows": rows, "accuracy": figures}
    write_text(directory.results, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_report(directory)
    common.print_table([COLUMNS, *rows], caption)
    print(f"\n{directory.results}\n{directory.report}")
    if arguments.wandb is not None:
        means = {f"digits/{name}: {probe}": of[probe].mean for name, of in accuracies.items() for probe in of}
        settings = {"run": str(arguments.run), "labelled_per_class": PER_CLASS, "draws": SEEDS}
        tables = {"evaluation/digits": Table(COLUMNS, rows)}
        log_evaluations(common.accelerator(), arguments.wandb, settings, tables, {str(arguments.run): means})


def features_of(directory: RunDirectory) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features (N, D) by name, and labels (N,)."""
    trained = load_backbone(directory.path)
    config = directory.read_config()
    if config.data.kind != "digits":
        raise UserError(f"{directory.path} was trained on data.kind={config.data.kind}; this probe is for digits")
    torch.manual_seed(config.train.seed)
    untrained = build_backbone(config).eval()
    digits = open_images("", "digits")
    indices = range(len(digits.names))
    features = {"raw pixels": np.stack([digits.read(index).flatten().numpy() for index in indices]) / 255.0}
    for name, backbone in (("untrained ViT", untrained), ("pretrained ViT", trained)):
        features[name] = extract(backbone, digits, indices, trained.preprocess, title=name).class_tokens
    return features, np.array(digits.labels)
