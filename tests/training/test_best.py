"""RUN/best holds the backbone of the moment at which a metric was best, also where a run stopped in between."""

import json
import shutil

import pytest
import torch
from builders import differing, weights
from safetensors.torch import load_file

import dino
from dino.errors import UserError
from dino.report.run import Reporter
from dino.run import RunDirectory, whole_checkpoints
from dino.training.best import Best
from dino.training.settings import load

SETTINGS = {
    "data.kind": "digits",
    "data.workers": 0,
    "views.preset": "line_art",
    "views.global_size": 8,
    "views.local_crops": 0,
    "model.arch": "vit_tiny",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "objective.prototypes": 16,
    "objective.head_hidden": 16,
    "objective.head_bottleneck": 8,
    "optim.lr": 0.05,
    "train.batch_size": 64,
    "train.steps": 9,
    "train.cpu_threads": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 9,
    "monitor.log_every": 1,
    "monitor.health_every": 3,
}


@pytest.fixture
def train(fresh_accelerate, tmp_path, monkeypatch):
    """Function that runs to the end and gives the run and best.json."""
    monkeypatch.setattr(Reporter, "write", lambda *_, **__: {})

    def to_the_end(name: str, metric: str, **more) -> tuple[dino.Run, dict]:
        run = dino.train(run=tmp_path / name, **SETTINGS | {"train.keep_best": metric} | more)
        return run, json.loads((tmp_path / name / "best" / "best.json").read_text())

    return to_the_end


@pytest.mark.parametrize(("metric", "best"), [("loss/dino", min), ("health/knn", max), ("health/gradient_norm", max)])
def test_what_is_kept_is_the_backbone_of_the_best_line(metric, best, train, tmp_path):
    run, record = train("run", metric)
    values = {line["step"]: line[metric] for line in run.metrics if metric in line}
    assert len(values) == (3 if metric == "health/knn" else 9)
    value = best(values.values())
    assert record == {"metric": metric, "value": value, "step": next(s for s, v in values.items() if v == value)}
    kept = dino.load_backbone(tmp_path / "run" / "best")
    assert kept.description["training"]["steps"] == record["step"]
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{record['step']:08d}" / "teacher.safetensors")
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, saved[f"backbone.{name}"])


def test_a_run_that_was_killed_ends_with_the_same(train, tmp_path):
    """With what it kept before the kill, and where the checkpoint that it goes on from is older than that."""
    _, record = train("whole", "loss/dino")
    assert record["step"] > 1
    for step in (record["step"] - 1, record["step"]):
        copy = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole", copy)
        for checkpoint in whole_checkpoints(copy / "checkpoints")[step:]:
            shutil.rmtree(checkpoint)
        if step < record["step"]:
            (copy / "best" / "best.json").write_text('{"metric": "loss/dino", "value": 99.0, "step": 1}')
        assert train(copy.name, "loss/dino")[1] == record
        ends = [weights(dino.load_backbone(folder / "best")) for folder in (tmp_path / "whole", copy)]
        assert differing(*ends) == set()


@pytest.mark.parametrize("metric", ["health/kNN", "health/neighbour_agreement", "loss/ibot"])
def test_a_metric_that_the_run_has_not_is_told_with_those_that_it_has(metric, train):
    """Digits have labels: neighbours are asked for the class."""
    with pytest.raises(UserError, match=rf"train\.keep_best={metric}: .*, health/knn, .*loss/dino$"):
        train("run", metric)


def test_what_is_no_measure_of_a_backbone_is_refused():
    with pytest.raises(UserError, match=r"train\.keep_best=time/data_wait is no metric to be best at"):
        load(None, ["train.keep_best=time/data_wait"])


def test_values_count_by_their_direction_and_metric(tmp_path):
    (tmp_path / "best").mkdir()
    directory = RunDirectory(tmp_path)
    loss = Best(directory, "loss/dino")
    assert loss.is_beaten_by({"step": 1, "loss/dino": 3.0}, [])
    loss.record({"step": 1, "loss/dino": 3.0})
    again = Best(directory, "loss/dino")
    assert [again.is_beaten_by({"loss/dino": value}, []) for value in (2.0, 3.0, 4.0)] == [True, False, False]
    knn = Best(directory, "health/knn")  # what was best at something else does not count
    assert not knn.is_beaten_by({"loss/dino": 3.0}, ["health/knn"]), "it is not due"
    assert knn.is_beaten_by({"health/knn": 0.0}, ["health/knn"])
    assert not Best(directory, None).is_beaten_by({"loss/dino": 3.0}, [])
