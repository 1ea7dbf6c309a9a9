"""config.yaml changed by hand under a run that goes on: what is auto in the command would follow it unnoticed."""

import pytest
import yaml
from test_best import SETTINGS

import dino
from dino.errors import UserError
from dino.report.run import Reporter
from dino.run import whole_checkpoints

COMMAND = {key: value for key, value in SETTINGS.items() if key != "optim.lr"}


@pytest.fixture
def run(fresh_accelerate, tmp_path, monkeypatch):
    """A run of two steps, whose learning rate is auto."""
    monkeypatch.setattr(Reporter, "write", lambda *_, **__: {})
    return dino.train(run=tmp_path / "run", **COMMAND | {"train.steps": 2}).path


def edit(run, key: str, value) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    group, name = key.split(".")
    assert config[group][name] != value
    config[group][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_is_refused_by_what_the_checkpoint_knows(run, tmp_path):
    whole = (run / "config.yaml").read_text()
    for key, value in (("optim.lr", 0.5), ("objective.teacher_temperature", 0.5), ("views.mean", [0.1])):
        edit(run, key, value)
        with pytest.raises(UserError, match=rf"config\.yaml was edited, or .*\n  {key}: "):
            dino.train(run=run, **COMMAND | {"train.steps": 3})
        (run / "config.yaml").write_text(whole)
    edit(run, "train.keep_checkpoints", 1)  # no part of what is learned
    assert dino.train(run=run, **COMMAND | {"train.steps": 3}).config.train.steps == 3


def test_another_run_may_begin_with_its_checkpoint_and_other_settings(run, tmp_path):
    newest = whole_checkpoints(run / "checkpoints")[-1]
    branch = COMMAND | {"train.steps": 3, "train.resume": str(newest), "optim.lr": 0.001}
    assert [line["step"] for line in dino.train(run=tmp_path / "branch", **branch).metrics] == [3]
