"""The demo's readout: what the pre-trained features are worth when only 10 digits of each class have a label.

    python eval/digits.py --run runs/demo

Prints a table and writes RUN/results.json and RUN/report.html. Raw pixels and the same network before training stand
beside the pre-trained one, on the same 20 draws of the labelled digits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dino.data import open_images
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.evaluation.probes import few_shot
from dino.models import build_backbone, load_backbone
from dino.report.run import write_report
from dino.run import RunDirectory

PER_CLASS, DRAWS = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory of a pre-training on data.kind=digits")
    directory = RunDirectory(parser.parse_args().run)

    trained = load_backbone(directory.path)
    config = directory.read_config()
    if config.data.kind != "digits":
        raise UserError(f"{directory.path} was trained on data.kind={config.data.kind}; this readout is for digits")
    torch.manual_seed(config.train.seed)
    untrained = build_backbone(config).eval()
    digits = open_images("", "digits")
    labels, everything = np.array(digits.labels), range(len(digits.names))
    pixels = np.stack([digits.read(index).flatten().numpy() for index in everything]) / 255.0

    features = {
        "raw pixels": pixels,
        "untrained ViT": extract(untrained, digits, everything, trained.preprocess, title="untrained ViT").class_tokens,
        "pretrained ViT": extract(trained, digits, everything, trained.preprocess, title="pretrained ViT").class_tokens,
    }
    accuracies = {name: few_shot(values, labels, PER_CLASS, DRAWS) for name, values in features.items()}

    columns = ["features", "1-NN", "logistic regression"]
    rows = [[name, str(scores["knn"]), str(scores["logistic"])] for name, scores in accuracies.items()]
    caption = (
        f"{PER_CLASS} labelled digits per class, the other {len(labels) - 10 * PER_CLASS:,} are the test; "
        f"mean ± standard deviation over {DRAWS} draws. Pre-training saw all images, without labels."
    )
    scores = {
        name: {readout: {"mean": accuracy.mean, "std": accuracy.std} for readout, accuracy in values.items()}
        for name, values in accuracies.items()
    }
    results = {"caption": caption, "columns": columns, "rows": rows, "accuracy": scores}
    directory.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_report(directory)

    print(f"\n{caption}\n")
    for row in [columns, *rows]:
        print(f"  {row[0]:<16}{row[1]:>16}{row[2]:>22}")
    print(f"\n{directory.results}\n{directory.report}")
