"""A W&B workspace for a run's project: losses, health, pictures, speed and schedules in sections, made anew from code.

    dino dashboard runs/mine
    dino dashboard runs/mine --entity my-team

It needs a key of W&B and pip install "dino-pretrain[dashboard]". Without either, what the workspace would be is written
to RUN/dashboard.json.
"""

import json
from typing import Any

from dino.commands.common import Parser, path_of
from dino.config.schema import Config
from dino.errors import UserError
from dino.files import write_text
from dino.methods import METHODS
from dino.monitor.indicators import INDICATORS
from dino.report.run import RATES, SPEED
from dino.run import RunDirectory

PICTURES = ("crops", "attention", "pca", "neighbours")


def main() -> None:
    """Save a run's workspace to W&B and print its address, or write what it would be to a file.

    Raises:
        UserError: the directory holds no run.
    """
    parser = Parser(__doc__)
    parser.add_argument("run", type=path_of, metavar="RUN", help="run directory of a pre-training")
    parser.add_argument("--entity", help="user or team of W&B; default: the key's own")
    arguments = parser.parse_args()
    directory = RunDirectory(arguments.run)
    if not directory.config.is_file():
        raise UserError(f"{directory.path} holds no run: name the run.dir of a pre-training")
    wanted = specification(directory.read_config())
    if reason := unavailable():
        file = directory.path / "dashboard.json"
        write_text(file, json.dumps(wanted, indent=1) + "\n")
        print(f"{reason}; what the workspace would be is in {file}")
        return
    print(save(wanted, arguments.entity))


def specification(config: Config) -> dict[str, Any]:
    """Project, name, and sections of panels by the names of the metrics."""
    method = METHODS[config.objective.name]
    sections: dict[str, dict[str, str]] = {
        "Losses": {name: curve.title for name, curve in method.watched(config).items()},
        "Health": {indicator.name: indicator.title for indicator in INDICATORS},
        "Pictures": {f"pictures/{name}": name for name in PICTURES},
        "Speed": SPEED,
        "Schedules": RATES | {name: name.replace("/", " ") for name in method.make_schedules(config)},
    }
    panels = {
        title: [{"metric": metric, "title": of_panel} for metric, of_panel in of_section.items()]
        for title, of_section in sections.items()
    }
    return {"project": config.tracking.project, "name": f"pre-training: {config.objective.name}", "sections": panels}


def unavailable() -> str:
    """Why no workspace can be saved; empty where one can."""
    import wandb

    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError:
        return 'wandb-workspaces is needed to save it: pip install "dino-pretrain[dashboard]"'
    return "" if wandb.api.api_key else "there is no key of W&B: run `wandb login`, or set WANDB_API_KEY"


def workspace(wanted: dict[str, Any], entity: str) -> Any:
    """A specification as an object of wandb-workspaces."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for title, panels in wanted["sections"].items():
        if title == "Pictures":
            shown = [reports.MediaBrowser(media_keys=[panel["metric"]], title=panel["title"]) for panel in panels]
        else:
            shown = [reports.LinePlot(x="Step", y=[panel["metric"]], title=panel["title"]) for panel in panels]
        sections.append(workspaces.Section(name=title, panels=shown, is_open=title != "Schedules"))
    return workspaces.Workspace(entity=entity, project=wanted["project"], name=wanted["name"], sections=sections)


def save(wanted: dict[str, Any], entity: str | None) -> str:
    """Save the workspace as a new view; gives its address.

    Raises:
        UserError: W&B refuses, or cannot be reached.
    """
    import wandb

    try:
        made = workspace(wanted, entity or wandb.Api().default_entity or "")
        made.save()
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"the workspace could not be saved: {str(error).splitlines()[0]}") from error
    return made.url
