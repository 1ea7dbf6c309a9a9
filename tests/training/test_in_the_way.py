"""What a run is going to write is looked at before it begins: it fails at once, not when hours have passed."""

import os
from pathlib import Path

import pytest
from test_best import SETTINGS

import dino
from dino.errors import UserError
from dino.report.run import Reporter
from dino.run import RunDirectory
from dino.training import resume

FILE_KINDS = {
    "folder": (Path.mkdir, "it is a folder"),
    "pipe": (os.mkfifo, "it is no ordinary file"),
    "link": (lambda path: path.symlink_to(path.parent.parent / "elsewhere"), "it is a link"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "it is a link"),
}
FOLDER_KINDS = {
    "file": (Path.touch, "it is no folder"),
    "pipe": (os.mkfifo, "it is no folder"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "it is a link to nothing"),
}
CASES = [(name, kind) for name in resume.FILES for kind in FILE_KINDS.values()]
CASES += [(name, kind) for name in resume.FOLDERS if name for kind in FOLDER_KINDS.values()]


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    (tmp_path / "elsewhere").write_text("somebody's")
    (tmp_path / "run" / "best").mkdir(parents=True)
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_of_the_wrong_kind_is_named_with_what_to_do(name, kind, directory):
    make, problem = kind
    path = directory.path / name
    if path.is_dir():
        path.rmdir()
    make(path)
    with pytest.raises(UserError) as caught:
        resume.refuse_what_is_in_the_way(directory)
    ways = "change that, move it elsewhere, or name another run.dir"
    assert str(caught.value) == f"{path} is in the way of the run, which writes there ({problem}): {ways}"


@pytest.mark.parametrize("name", ["metrics.jsonl", "backbone.safetensors", "best", "checkpoints", ""])
def test_what_may_not_be_written(name, directory, monkeypatch):
    """As `access` answers: tests may run as root, who may write anywhere."""
    path, access = directory.path / name, os.access
    if not path.exists():
        path.touch() if "." in name else path.mkdir()
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != path and access(asked, mode))
    with pytest.raises(UserError, match=rf"{path} is in the way .* \(it may not be written\)"):
        resume.refuse_what_is_in_the_way(directory)


def test_folders_may_lie_elsewhere(directory, tmp_path):
    (tmp_path / "large disk").mkdir()
    directory.checkpoints.symlink_to(tmp_path / "large disk")
    resume.refuse_what_is_in_the_way(directory)
    resume.refuse_what_is_in_the_way(RunDirectory(tmp_path / "new"))


def test_a_run_is_refused_before_its_first_step_and_writes_only_what_was_looked_at(
    fresh_accelerate, tmp_path, monkeypatch
):
    monkeypatch.setattr(Reporter, "write", lambda *_, **__: {})
    run, best = tmp_path / "run", tmp_path / "run" / "best"
    settings = SETTINGS | {"train.steps": 2, "train.keep_best": "loss/dino"}
    dino.train(run=run, **settings)
    checkpoints = run / "checkpoints"
    written = {path.relative_to(run).as_posix() for path in run.rglob("*") if checkpoints not in path.parents}
    assert written <= {*resume.FILES, *resume.FOLDERS}
    (best / "best.json").unlink()
    (best / "best.json").mkdir()
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"best\.json is in the way"):
        dino.train(run=run, **settings | {"train.steps": 4})
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("how", ["auto", "newest_whole"])
def test_a_result_without_checkpoints_is_not_replaced_by_a_run_that_begins_anew(how, directory):
    (directory.path / "backbone.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(UserError, match=r"no checkpoint to go on from: .* name another run\.dir or move it away"):
        resume.starting_point(directory, how)
