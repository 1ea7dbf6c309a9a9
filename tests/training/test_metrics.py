"""metrics.jsonl, the verdict on stderr, and pictures: what is logged is what was measured, and is said once."""

import json

import pytest
import torch

from dino.run import RunDirectory
from dino.training import resume
from dino.training.metrics import Metrics

GOOD = {
    "health/entropy_ratio": 0.7,
    "health/kl_to_center": 1.0,
    "health/prototypes_in_use": 0.6,
    "health/rank_me": 12.0,
    "health/feature_std": 0.9,
}
UNIFORM = GOOD | {"health/entropy_ratio": 0.999, "health/kl_to_center": 0.0}


class Scripted:
    """Stands for health: at these steps, these indicators."""

    def __init__(self, measures: dict[int, dict[str, float]]):
        self.measures = measures

    def is_due(self, taken: int) -> bool:
        return taken in self.measures

    def measure(self, taken: int) -> dict[str, float]:
        return self.measures[taken]


@pytest.fixture
def start(accelerator, tiny, tmp_path):
    """Function that starts, or starts again, to log a run of 100 steps."""

    def build(start: int = 0) -> Metrics:
        config = tiny({"train.steps": 100})
        directory = RunDirectory(tmp_path / "run")
        resume.prepare(directory, config, start)
        return Metrics(accelerator, config, directory, width=16, start=start)

    return build


def lines(metrics: Metrics) -> list[dict]:
    return [json.loads(line) for line in metrics.directory.metrics.read_text().splitlines()]


def log(metrics: Metrics, step: int, health: Scripted) -> None:
    metrics.add({"loss/dino": torch.tensor(1.5)})
    metrics.log(step, step / 8, {"optim/lr": 0.1}, health)


def told(text: str) -> list[str]:
    """What was written between two states of the progress bar."""
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith("step ")]


def test_a_line_holds_the_means_of_the_steps_since_the_last(start):
    with start() as metrics:
        for values in ([1.0, 2.0, 6.0], [4.0]):
            for value in values:
                given = {"loss/dino": torch.tensor(value), "health/gradient_norm": torch.tensor(2 * value)}
                metrics.add(given)
                assert given["loss/dino"] == value
            metrics.log(len(values), 0.25, {"optim/lr": 0.1}, Scripted({}))
        first, second = lines(metrics)
    assert (first["step"], first["epoch"], first["optim/lr"]) == (3, 0.25, 0.1)
    assert (first["loss/dino"], first["health/gradient_norm"]) == (3.0, 6.0)
    assert (second["loss/dino"], second["health/gradient_norm"]) == (4.0, 8.0)


def test_indicators_are_logged_where_they_are_due_and_a_verdict_is_told_where_it_changes(start, capsys):
    measures = {20: GOOD, 30: GOOD, 40: UNIFORM, 50: UNIFORM, 60: UNIFORM, 70: GOOD, 80: GOOD}
    with start() as metrics:
        for step in (10, *measures, 90):
            log(metrics, step, Scripted(measures))
        by_step = {line["step"]: line for line in lines(metrics)}
    assert {step for step, line in by_step.items() if "health/verdict" in line} == measures.keys()
    assert by_step[30].items() >= GOOD.items()
    assert not GOOD.keys() & by_step[90].keys()
    text = capsys.readouterr()
    assert text.out == ""
    said = told(text.err)
    assert " to the end" in said.pop(1)  # what lies ahead, once the speed is known
    assert said[:2] == ["step 20: warming up", "step 30: healthy"]
    assert said[2].startswith("step 50: collapsed: uniform: ")
    assert "objective.teacher_temperature" in said[2]
    assert said[3:] == ["step 70: healthy"]


def test_a_run_that_goes_on_remembers_its_verdict(start, capsys):
    """Nothing is told again, and the measures before count."""
    measures = {20: GOOD, 30: UNIFORM, 40: UNIFORM, 50: UNIFORM}
    with start() as metrics:
        for step in (20, 30, 40):
            log(metrics, step, Scripted(measures))
    assert told(capsys.readouterr().err)[-1].startswith("step 40: collapsed: uniform")
    with start(40) as metrics:
        log(metrics, 50, Scripted(measures))
        assert lines(metrics)[-1]["health/verdict"] == "collapsed: uniform"
    assert told(capsys.readouterr().err) == []


def test_a_run_that_was_taken_back_forgets_what_came_after(start):
    measures = {20: GOOD, 30: UNIFORM, 40: UNIFORM, 50: GOOD}
    with start() as metrics:
        for step in (20, 30, 40):
            log(metrics, step, Scripted(measures))
    with start(20) as metrics:
        log(metrics, 50, Scripted(measures))
        assert [line["step"] for line in lines(metrics)] == [20, 50]
        assert lines(metrics)[-1]["health/verdict"] == "healthy"


def test_the_verdict_compares_with_the_weights_that_a_run_began_with(start):
    """Also when it goes on later."""
    with start() as metrics:
        metrics.begin(GOOD | {"health/knn": 0.9})
        for step in (20, 40):
            log(metrics, step, Scripted({step: GOOD | {"health/knn": 0.5}}))
    with start(40) as metrics:
        log(metrics, 60, Scripted({60: GOOD | {"health/knn": 0.5}}))
        verdicts = [line.get("health/verdict") for line in lines(metrics)]
    assert verdicts == [None, "warming up", "getting worse", "getting worse"]
