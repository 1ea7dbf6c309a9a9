"""From which of Omniglot's 30 alphabets does a character come? Frozen features, logistic regression on top.

    python eval/omniglot.py --weights runs/omniglot --data images_background.zip --out runs/omniglot

Writes results.json and chart.png to --out and prints the table; with a run directory as --out, its report.html shows
the table too. Raw pixels and an untrained network of each architecture stand beside the weights.
"""

import argparse
import json
from pathlib import Path

import torch

from dino import cli, load_backbone
from dino.data import open_images
from dino.evaluation import omniglot
from dino.evaluation.pictures import bars
from dino.evaluation.readout import LogisticResult
from dino.models import Backbone, ResNet, VisionTransformer
from dino.training.reporting import write_report
from dino.training.run_directory import RunDirectory

COLUMNS = ["features", "input", "accuracy", "kept drawings", "converged"]


def main() -> None:
    arguments = parse()
    images = open_images(arguments.data, "omniglot")
    if warning := omniglot.check_drawings(images.names):
        print(f"warning: {warning}")
    backbones = {name: load_backbone(name) for name in arguments.weights}
    data = omniglot.article_data(images)

    rows = [["chance", "–", f"{100 * data.chance:.1f} %", "–", "–"]]
    accuracy: dict[str, LogisticResult] = {}

    def judge(name: str, size: int, features) -> None:
        result = omniglot.read_out(data, features)
        accuracy[name] = result
        converged = "yes" if result.converged else "not in 100 iterations"
        kept = f"{100 * result.correct[data.left_out].mean():.1f} %"
        rows.append([name, f"{size}×{size}", f"{100 * result.accuracy:.1f} %", kept, converged])
        print("  ".join(rows[-1]))

    judge("raw pixels", omniglot.RAW_SIZE, omniglot.raw_pixels(data))
    untrained = set()
    for name, backbone in backbones.items():
        if backbone.spec not in untrained:
            untrained.add(backbone.spec)
            blank = random_like(backbone)
            label = "untrained " + ("ResNet" if isinstance(blank, ResNet) else "ViT")
            label += f" {len(untrained)}" if len(untrained) > 1 else ""
            judge(label, omniglot.input_size(blank), omniglot.features(data, blank, label))
        judge(name, omniglot.input_size(backbone), omniglot.features(data, backbone, name))

    caption = (
        f"Article protocol: {len(data.indices):,} drawings of {len(set(data.labels))} alphabets (a seeded "
        f"reconstruction of the published subset), {len(data.train):,} to learn from and {len(data.test):,} to test, "
        "one split. Weights pre-trained on all of Omniglot have seen the test images, without labels: transductive. "
        "Kept drawings: those of the test images that data.kind=omniglot_train keeps out of pre-training, by drawers "
        "15–20 or of a fifth of the characters."
    )
    save(arguments.out, caption, rows, accuracy)
    print(f"\n{caption}\n")
    for row in [COLUMNS, *rows]:
        print(f"  {row[0]:<32}{row[1]:>9}{row[2]:>10}{row[3]:>15}  {row[4]}")
    print(f"\n{arguments.out / 'results.json'}\n{arguments.out / 'chart.png'}")


def random_like(backbone: Backbone) -> Backbone:
    """The same architecture as it was before training."""
    torch.manual_seed(backbone.description["training"]["seed"])
    if isinstance(backbone, ResNet):
        blank: Backbone = ResNet(backbone.spec)
    else:
        blank = VisionTransformer(backbone.spec, initialisation=backbone.description["training"]["initialisation"])
    blank.preprocess = backbone.preprocess
    return blank.eval()


def save(out: Path, caption: str, rows: list[list[str]], accuracy: dict[str, LogisticResult]) -> None:
    """results.json, chart.png and, if `out` is a run directory, its report."""
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "protocol": "article",
        "caption": caption,
        "columns": COLUMNS,
        "rows": rows,
        "accuracy": {
            name: {"accuracy": result.accuracy, "converged": result.converged} for name, result in accuracy.items()
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    levels = [(name, 100 * result.accuracy, 0.0) for name, result in accuracy.items()]
    chart = bars(levels, "Omniglot: which of 30 alphabets? (article protocol)", omniglot.PUBLISHED)
    (out / "chart.png").write_bytes(chart)
    directory = RunDirectory(out)
    if directory.config.exists():
        write_report(directory)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="W", help="run directories or backbone.safetensors"
    )
    parser.add_argument("--data", required=True, help="Omniglot's images_background, as a folder or zip archive")
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json and chart.png")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
