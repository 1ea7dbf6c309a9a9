"""From which of Omniglot's 30 alphabets does a character come? Frozen features, logistic regression on top.

    dino omniglot --weights runs/omniglot dinov2_vits14 --data images_background.zip --out runs/omniglot
    dino omniglot --published --out runs/published

Writes results.json, chart.png and, with the standard protocol, confusion.png to --out, and prints the tables. What an
earlier call has left there stays in the tables; with a run directory as --out, its report.html shows them too. Chance,
raw pixels and an untrained network of each architecture stand beside the weights. The second command measures the
released weights for which figures were published, and shows both.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dino.commands import common
from dino.data import fingerprint, open_images
from dino.data.sources.omniglot import download
from dino.errors import UserError
from dino.evaluation import omniglot
from dino.files import read_json, write_bytes, write_text
from dino.models import Backbone, load_backbone, random_like
from dino.report.charts import bars, confusion_matrix
from dino.report.run import write_report
from dino.run import RunDirectory
from dino.tracking import Table, log_evaluations

Results = dict[str, Any]


class Protocol(NamedTuple):
    """One way of asking.

    Attributes:
        judge: the drawings, a backbone (None: raw pixels) and a title to what is kept in results.json.
        table: all results to rows of text, the first of them the heading.
        chart: title of the bars.
        bar: what `judge` gives to accuracy and spread.
        caption: how the figures came about.
    """

    judge: Callable[[omniglot.Drawings, Backbone | None, str], Results]
    table: Callable[[Results], list[list[str]]]
    chart: str
    bar: Callable[[Results], tuple[float, float]]
    caption: str


def main() -> None:
    """Judge each of the weights and its baselines by the protocols asked for, and write tables and pictures.

    Raises:
        UserError: weights or drawings that cannot be read, or --out holds something else's results.
    """
    arguments = parse()
    common.check_wandb(arguments.wandb, arguments.weights)
    images = open_images(str(arguments.data or download()), "omniglot")
    if warning := omniglot.check_drawings(images.names):
        print(f"warning: {warning}")
    candidates = with_baselines(arguments.weights, arguments.heads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = omniglot.drawings(images)
    results = earlier_results(arguments.out, fingerprint(images))
    results |= {"chance": data.chance, "count": len(data.indices)}
    for protocol in PROTOCOLS if arguments.protocol == "all" else [arguments.protocol]:
        for name, backbone in candidates.items():
            is_baseline = backbone is None or name.startswith("untrained")
            if is_baseline and name in results[protocol]:
                continue  # an earlier call has measured it
            outcome = PROTOCOLS[protocol].judge(data, None if backbone is None else backbone.to(device), name)
            results[protocol][name] = outcome
            print(f"{protocol}: {name}: {PROTOCOLS[protocol].bar(outcome)[0]}")
            save(arguments.out, results)
    show(arguments.out, results)
    if arguments.wandb is not None:
        send(arguments, results)


def parse() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        weights={"nargs": "+", "default": [], "required": False, "help": "released names, run directories or files"},
        heads={},
        data={
            "required": False,
            "help": "Omniglot's images_background, folder or zip archive; else downloaded",
        },
        out={"required": True, "help": "folder for results.json and pictures"},
        wandb={},
    )
    parser.add_argument("--published", action="store_true", help=f"also {', '.join(omniglot.PUBLISHED)}")
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "all"], default="article")
    arguments = parser.parse_args()
    if arguments.published:
        arguments.weights += [name for name in omniglot.PUBLISHED if name not in arguments.weights]
    if not arguments.weights:
        parser.error("name weights with --weights, or take the published ones with --published")
    return arguments


def with_baselines(weights: list[str], heads: int | None) -> dict[str, Backbone | None]:
    """Raw pixels, and each of the weights after an untrained network like it."""
    backbones = {Path(name).name: load_backbone(name, heads) for name in weights}
    if len(backbones) < len(set(weights)):
        raise UserError("several weights end in the same name, by which the tables call them: rename one")
    candidates: dict[str, Backbone | None] = {"raw pixels": None}
    for name, backbone in backbones.items():
        candidates.setdefault(f"untrained {backbone.title}", random_like(backbone))
        candidates[name] = backbone
    return candidates


def earlier_results(out: Path, data: str) -> Results:
    """What earlier calls measured on the same images."""
    fresh: Results = {"data": data, **{protocol: {} for protocol in PROTOCOLS}}
    file = out / "results.json"
    if not file.exists():
        return fresh
    earlier = read_json(file, fix := "move it away, and measure again")
    if not isinstance(earlier, dict) or (earlier.get("data") == data and not fresh.keys() <= earlier.keys()):
        raise UserError(f"{file} holds no results of this command: {fix}")
    return {key: earlier[key] for key in fresh} if earlier.get("data") == data else fresh


def save(out: Path, results: Results) -> None:
    """results.json with everything, and the first protocol's table as the run's report shows it."""
    out.mkdir(parents=True, exist_ok=True)
    protocol = next(PROTOCOLS[name] for name in PROTOCOLS if results[name])
    columns, *rows = protocol.table(results)
    table = {"caption": protocol.caption.format_map(results), "columns": columns, "rows": rows}
    write_text(out / "results.json", json.dumps({**results, **table}, indent=1, ensure_ascii=False) + "\n")


def show(out: Path, results: Results) -> None:
    """Print the tables, draw the pictures, and renew the report if `out` is a run directory."""
    charts: dict[str, list[tuple[str, float, float]]] = {}
    for name, protocol in PROTOCOLS.items():
        if results[name]:
            charts[protocol.chart] = []
            for title, outcome in results[name].items():
                accuracy, spread = protocol.bar(outcome)
                charts[protocol.chart].append((title, 100 * accuracy, 100 * spread))
            common.print_table(protocol.table(results), protocol.caption.format_map(results))
    levels = {}
    for name, level in omniglot.PUBLISHED.items():
        is_measured = name in results["article"]
        levels[f"{name}, published" if is_measured else f"{name}, published, not measured here"] = level
    levels["chance"] = round(100 * results["chance"], 1)
    write_bytes(out / "chart.png", bars(charts, "Which of 30 alphabets? Accuracy, %", levels))
    if standard := results["standard"]:
        best = max(standard, key=lambda name: standard[name]["logistic"]["random"][0])
        counts = np.array(standard[best]["confusion"])
        write_bytes(out / "confusion.png", confusion_matrix(counts, list(standard[best]["per_alphabet"]), best))
    directory = RunDirectory(out)
    if directory.config.exists():
        write_report(directory)
    print(f"\n{out / 'results.json'}\n{out / 'chart.png'}")


def send(arguments: argparse.Namespace, results: Results) -> None:
    """Tables, and each of the weights' accuracies by protocol, to W&B."""
    measured = {name: protocol for name, protocol in PROTOCOLS.items() if results[name]}
    tables, figures = {}, {}
    for name, protocol in measured.items():
        columns, *rows = protocol.table(results)
        tables[f"evaluation/omniglot_{name}"] = Table(columns, rows)
    for weights in arguments.weights:
        title = Path(weights).name
        of_one = {name: protocol.bar(results[name][title])[0] for name, protocol in measured.items()}
        figures[weights] = {f"omniglot/{name}": accuracy for name, accuracy in of_one.items()}
    settings = {key: str(value) for key, value in vars(arguments).items()}
    log_evaluations(common.accelerator(), arguments.wandb, settings, tables, figures)


def percent(value: float | None, mark: str = "") -> str:
    """A fraction as per cent; a dash for what there is not."""
    return "–" if value is None else f"{100 * value:.1f}{mark} %"


def article_table(results: Results) -> list[list[str]]:
    """A row for each set of features."""
    rows = [["features", "input", "accuracy", "at convergence", "antialiased", "kept drawings"]]
    rows.append(["chance", "–", percent(results["chance"]), "–", "–", "–"])
    for name, outcome in results["article"].items():
        accuracy = percent(outcome["accuracy"], "" if outcome["has_converged"] else "*")
        more = [percent(outcome[key]) for key in ("converged", "antialiased", "kept")]
        rows.append([name, outcome["input"], accuracy, *more])
    return rows


def standard_table(results: Results) -> list[list[str]]:
    """Two rows for each set of features: logistic regression and nearest neighbours."""
    first = next(iter(results["standard"].values()))
    rows = [["features", *first["logistic"]]]
    rows.append(["chance", percent(results["chance"]), *["–"] * (len(first["logistic"]) - 1)])
    for name, outcome in results["standard"].items():
        for title, probe in ((name, "logistic"), (f"{name}, k-NN", "knn")):
            rows.append([title, *(f"{100 * mean:.1f} ± {100 * std:.1f}" for mean, std in outcome[probe].values())])
    return rows


def article_bar(outcome: Results) -> tuple[float, float]:
    """One split, so no spread."""
    return outcome["accuracy"], 0.0


def standard_bar(outcome: Results) -> tuple[float, float]:
    """Of the random split."""
    accuracy, spread = outcome["logistic"]["random"]
    return accuracy, spread


PROTOCOLS = {
    "article": Protocol(
        omniglot.article,
        article_table,
        "article protocol",
        article_bar,
        "Article protocol: {count:,} drawings (a seeded reconstruction of the published subset), class tokens, one "
        "70/30 split, scikit-learn's LogisticRegression() as it comes; * it stopped at its 100 iterations, before "
        "convergence. Weights pre-trained on all of Omniglot have seen the test images, without labels: transductive. "
        "Kept drawings: the test images that data.kind=omniglot_train keeps out of pre-training, by drawers 15–20 or "
        "of a fifth of the characters.",
    ),
    "standard": Protocol(
        omniglot.standard,
        standard_table,
        "standard protocol, random split",
        standard_bar,
        "Standard protocol: own preprocessing, class token and mean patch token, standardised; logistic regression "
        f"with its C chosen inside the training part; mean ± standard deviation over {omniglot.SEEDS} seeds. By "
        "drawer: tested on drawers who are new; by character: on characters that are; labels: per alphabet.",
    ),
}
