"""From which of Omniglot's 30 alphabets does a character come? Frozen features, logistic regression on top.

    python eval/omniglot.py --weights runs/omniglot dinov2_vits14 --data images_background.zip --out runs/omniglot
    python eval/omniglot.py --published --out runs/published

Writes results.json, chart.png and, with the standard protocol, confusion.png to --out, and prints the tables. What an
earlier call has left there stays in the tables; with a run directory as --out, its report.html shows them too. Chance,
raw pixels and an untrained network of each architecture stand beside the weights. The second command measures the
released weights for which figures were published, and shows both.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino.data import fingerprint, open_images
from dino.data.sources.omniglot import download
from dino.errors import UserError
from dino.evaluation import omniglot
from dino.models import Backbone, load_backbone, random_like
from dino.report.pictures import bars, confusion_matrix
from dino.report.run import write_report
from dino.run import RunDirectory

ARTICLE_COLUMNS = ["features", "input", "accuracy", "at convergence", "antialiased", "kept drawings"]
ARTICLE = (
    "Article protocol: {count:,} drawings (a seeded reconstruction of the published subset), class tokens, one 70/30 "
    "split, scikit-learn's LogisticRegression() as it comes; * it stopped at its 100 iterations, before convergence. "
    "Weights pre-trained on all of Omniglot have seen the test images, without labels: transductive. Kept drawings: "
    "the test images that data.kind=omniglot_train keeps out of pre-training, by drawers 15–20 or of a fifth of the "
    "characters."
)
STANDARD = (
    "Standard protocol: own preprocessing, class token and mean patch token, standardised; logistic regression with "
    f"its C chosen inside the training part; mean ± standard deviation over {omniglot.SEEDS} seeds. By drawer: tested "
    "on drawers who are new; by character: on characters that are; labels: per alphabet."
)


def main() -> None:
    arguments = parse()
    images = open_images(str(arguments.data or download()), "omniglot")
    if warning := omniglot.check_drawings(images.names):
        print(f"warning: {warning}")
    backbones = {Path(name).name: load_backbone(name) for name in arguments.weights}
    if len(backbones) < len(set(arguments.weights)):
        raise UserError("several weights end in the same name, by which the tables call them: rename one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = omniglot.drawings(images)
    results = earlier_results(arguments.out, fingerprint(images))
    results |= {"chance": data.chance, "count": len(data.indices)}
    protocols = ["article", "standard"] if arguments.protocol == "all" else [arguments.protocol]

    todo: list[tuple[str, Backbone | None]] = [("raw pixels", None)]
    for name, trained in backbones.items():
        todo += [(f"untrained {trained.title}", random_like(trained)), (name, trained)]
    for protocol in protocols:
        judge = omniglot.article if protocol == "article" else omniglot.standard
        for name, backbone in todo:
            if name in results[protocol] and (backbone is None or name.startswith("untrained")):
                continue  # a baseline that an earlier call has measured
            found = judge(data, backbone.to(device) if backbone is not None else None, name)
            results[protocol][name] = found
            print(f"{protocol}: {name}: {found['accuracy'] if protocol == 'article' else found['logistic']['random']}")
            save(arguments.out, results)
    show(arguments.out, results)


def earlier_results(out: Path, data: str) -> dict[str, Any]:
    """What earlier calls measured on the same images."""
    fresh: dict[str, Any] = {"data": data, "article": {}, "standard": {}}
    file = out / "results.json"
    if not file.exists():
        return fresh
    found = json.loads(file.read_text())
    return {key: found[key] for key in fresh} if found.get("data") == data else fresh


def save(out: Path, results: dict[str, Any]) -> None:
    """results.json with everything, and the first protocol's table as the run's report shows it."""
    out.mkdir(parents=True, exist_ok=True)
    protocol = "article" if results["article"] else "standard"
    columns, rows = table(results, protocol)
    shown = {"caption": caption(results, protocol), "columns": columns, "rows": rows}
    (out / "results.json").write_text(json.dumps({**results, **shown}, indent=1, ensure_ascii=False) + "\n")


def caption(results: dict[str, Any], protocol: str) -> str:
    """How a protocol's figures came about."""
    return ARTICLE.format(count=results["count"]) if protocol == "article" else STANDARD


def table(results: dict[str, Any], protocol: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows as text."""

    def percent(value: float | None, mark: str = "") -> str:
        return "–" if value is None else f"{100 * value:.1f}{mark} %"

    if protocol == "article":
        rows = [["chance", "–", percent(results["chance"]), "–", "–", "–"]]
        for name, found in results["article"].items():
            accuracy = percent(found["accuracy"], "" if found["has_converged"] else "*")
            others = [percent(found[key]) for key in ("converged", "antialiased", "kept")]
            rows.append([name, found["input"], accuracy, *others])
        return ARTICLE_COLUMNS, rows
    kinds = {"logistic": "", "knn": ", k-NN"}
    names = list(next(iter(results["standard"].values()))["logistic"])
    rows = [["chance", percent(results["chance"]), *["–"] * (len(names) - 1)]]
    for name, found in results["standard"].items():
        for kind, suffix in kinds.items():
            rows.append([name + suffix, *(f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in found[kind].values())])
    return ["features", *names], rows


def show(out: Path, results: dict[str, Any]) -> None:
    """Print the tables, draw the pictures, and renew the report if `out` is a run directory."""
    charts = {}
    if article := results["article"]:
        charts["article protocol"] = [(name, 100 * found["accuracy"], 0.0) for name, found in article.items()]
    if standard := results["standard"]:
        charts["standard protocol, random split"] = [
            (name, *(100 * value for value in found["logistic"]["random"])) for name, found in standard.items()
        ]
        best = max(standard, key=lambda name: standard[name]["logistic"]["random"][0])
        counts = np.array(standard[best]["confusion"])
        (out / "confusion.png").write_bytes(confusion_matrix(counts, list(standard[best]["per_alphabet"]), best))
    levels = {
        f"{name}, published" + ", not measured here" * (name not in article): level
        for name, level in omniglot.PUBLISHED.items()
    }
    levels["chance"] = round(100 * results["chance"], 1)
    chart = bars(charts, "Which of 30 alphabets? Accuracy, %", levels)
    (out / "chart.png").write_bytes(chart)
    for protocol in ("article", "standard"):
        if results[protocol]:
            columns, rows = table(results, protocol)
            widths = [max(len(row[i]) for row in [columns, *rows]) + 2 for i in range(len(columns))]
            print(f"\n{caption(results, protocol)}\n")
            for row in [columns, *rows]:
                print(
                    "  "
                    + row[0].ljust(widths[0])
                    + "".join(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
                )
    directory = RunDirectory(out)
    if directory.config.exists():
        write_report(directory)
    print(f"\n{out / 'results.json'}\n{out / 'chart.png'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="W", help="released names, run directories or files"
    )
    parser.add_argument("--published", action="store_true", help=f"also {', '.join(omniglot.PUBLISHED)}")
    parser.add_argument(
        "--data", help="Omniglot's images_background, as a folder or zip archive; else it is downloaded"
    )
    parser.add_argument("--protocol", choices=["article", "standard", "all"], default="article")
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json and pictures")
    arguments = parser.parse_args()
    if arguments.published:
        arguments.weights += [name for name in omniglot.PUBLISHED if name not in arguments.weights]
    if not arguments.weights:
        parser.error("name weights with --weights, or take the published ones with --published")
    return arguments
