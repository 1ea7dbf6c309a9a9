"""The W&B workspace of a run: every metric of its lines has a panel, and without a key nothing is lost."""

import json
import sys

import pytest

from dino.commands import dashboard
from dino.config.auto import PoolFacts, resolve
from dino.errors import UserError
from dino.run import RunDirectory
from dino.training.resume import prepare
from dino.training.settings import load


@pytest.fixture
def run(tmp_path):
    config = load(
        None, ["train.steps=20", "train.batch_size=10", "tracking.project=letters", f"run.dir={tmp_path}/run"]
    )
    config, _ = resolve(config, PoolFacts(200, 3, "folder"))
    prepare(RunDirectory(tmp_path / "run"), config, 0)
    return tmp_path / "run"


def called(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dino", *map(str, words)])
    dashboard.main()


def test_without_a_key_what_it_would_be_is_written_to_a_file(run, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "unavailable", lambda: "there is no key")
    called(monkeypatch, run)
    assert f"there is no key; what the workspace would be is in {run / 'dashboard.json'}" in capsys.readouterr().out
    wanted = json.loads((run / "dashboard.json").read_text(encoding="utf-8"))
    assert wanted["project"] == "letters"
    metrics = {panel["metric"] for panels in wanted["sections"].values() for panel in panels}
    assert {"loss/dino", "health/rank_me", "health/knn", "optim/lr", "pictures/attention"} <= metrics


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb-workspaces itself
def test_as_an_object_of_wandb_workspaces_it_has_the_same_sections(run):
    pytest.importorskip("wandb_workspaces")
    wanted = dashboard.specification(RunDirectory(run).read_config())
    made = dashboard.workspace(wanted, "me")
    assert (made.entity, made.project) == ("me", "letters")
    assert [section.name for section in made.sections] == list(wanted["sections"])
    assert [len(section.panels) for section in made.sections] == [len(panels) for panels in wanted["sections"].values()]


def test_where_there_is_no_run_that_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no run"):
        called(monkeypatch, tmp_path)
