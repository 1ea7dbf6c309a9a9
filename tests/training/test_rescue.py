"""A run whose directory is taken from under it ends at once, and its state is saved where there is room for it."""

import os
import shutil
import tempfile

import pytest
from test_best import SETTINGS

import dino
from dino.errors import UserError
from dino.report.run import Reporter
from dino.training.metrics import Metrics

STEPS = {"train.steps": 8, "train.checkpoint_every": 4}


@pytest.fixture
def train(fresh_accelerate, tmp_path, monkeypatch):
    monkeypatch.setattr(Reporter, "write", lambda *_, **__: {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return lambda run: dino.train(run=run, **SETTINGS | STEPS)


@pytest.fixture
def after_six_steps(monkeypatch):
    """Function that has something done once the line of step 6 is written."""

    def arrange(happens):
        log = Metrics.log

        def log_and_then(self, step, *parts):
            line = log(self, step, *parts)
            if step == 6:
                happens()
            return line

        monkeypatch.setattr(Metrics, "log", log_and_then)

    return arrange


def read_only(run, monkeypatch):
    """As `access` answers for a file system that was mounted anew; tests may run as root, who may write anywhere."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: run not in (path, path.parent) and allowed(path, mode))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "beside"), [("removed", True), ("renamed", False), ("read-only", True), ("files instead", True)]
)
def test_it_is_said_and_the_state_saved_elsewhere(kind, beside, train, after_six_steps, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", train(tmp_path / "whole").path
    with monkeypatch.context() as patched:
        ways = {
            "removed": lambda: shutil.rmtree(run),
            "renamed": lambda: run.rename(tmp_path / "renamed"),
            "files instead": lambda: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
            "read-only": lambda: read_only(run, patched),
        }
        after_six_steps(ways[kind])
        if not beside:
            (tmp_path / "run-rescued-7").write_text("in the way")
        place = (tmp_path if beside else tmp_path / "temporary") / "run-rescued-7"
        with pytest.raises(UserError, match=rf"removed or.*after step 7 is saved in {place}; .*run\.dir={place}"):
            train(run)
    monkeypatch.undo()
    monkeypatch.setattr(Reporter, "write", lambda *_, **__: {})
    assert not (run / "checkpoints" / "step-00000007").exists()
    assert kind in ("read-only", "files instead") or not run.exists(), "nothing is put where a run was taken away"
    assert (train(place).path / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()


def test_where_there_is_no_room_it_says_so(train, after_six_steps, tmp_path):
    after_six_steps(lambda: shutil.rmtree(tmp_path / "run"))
    for folder in (tmp_path, tmp_path / "temporary"):
        (folder / "run-rescued-7").write_text("in the way")
    with pytest.raises(UserError, match=r"saved neither as .*/run-rescued-7 nor as .*/temporary/run-rescued-7"):
        train(tmp_path / "run")
