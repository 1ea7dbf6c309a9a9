"""Health of real runs: what has collapsed is told while it trains, and looking at a run does not change it."""

import re

import pytest
from launching import backbone, losses, metrics

from dino.report import run as reporting

pytestmark = pytest.mark.slow

CENTRE = ("train.steps=300", "model.weight_init=fan_in", "objective.centering=center", "monitor.log_every=10")
COLLAPSES = {  # state: (settings, words of the published remedy)
    "collapsed: uniform": (
        ("objective.teacher_temperature=0.5", "objective.teacher_temperature_start=0.5"),
        "a lower objective.teacher_temperature",
    ),
    "collapsed: constant": (("objective.center_momentum=1.0", "optim.lr=0.003"), "objective.centering=sinkhorn"),
}
DEMO = ("--config", "configs/demo.yaml", "train.epochs=6", "train.cpu_threads=1")


@pytest.fixture(scope="module")
def watched(runs, tmp_path_factory):
    """Run directories and what the runs wrote to stderr, by the state that they end in."""
    folder, finished = tmp_path_factory.mktemp("health"), {}
    for state, (settings, _) in COLLAPSES.items():
        run = folder / state.replace(": ", "-")
        finished[state] = run, runs.finish(*CENTRE, *settings, f"run.dir={run}", page=True).stderr
    run = folder / "healthy"
    finished["healthy"] = run, runs.finish(*DEMO, f"run.dir={run}", settings=(), page=True).stderr
    return finished


@pytest.mark.parametrize("state", COLLAPSES)
def test_a_collapse_is_told_once_with_its_remedy(watched, state):
    run, errors = watched[state]
    told = [line for line in errors.replace("\r", "\n").splitlines() if re.match(rf"step \d+: {state}: ", line)]
    assert len(told) == 1, errors
    assert COLLAPSES[state][1] in told[0]
    step = int(re.match(r"step (\d+)", told[0])[1])
    verdicts = {line["step"]: line["health/verdict"] for line in metrics(run) if "health/verdict" in line}
    assert step <= 200, "the user is told well before the end"
    assert {verdict for at, verdict in verdicts.items() if at >= step} == {state}
    assert state not in {verdict for at, verdict in verdicts.items() if at < step}
    page = (run / "report.html").read_text()
    assert f">{state}<" in page
    assert COLLAPSES[state][1] in page


def test_a_run_that_learns_is_healthy_throughout(watched):
    run, errors = watched["healthy"]
    assert not re.search("collapsed|stuck|getting worse|few prototypes", errors)
    verdicts = [line["health/verdict"] for line in metrics(run) if "health/verdict" in line]
    assert set(verdicts) == {"warming up", "healthy"}
    assert verdicts[-1] == "healthy"
    assert ">healthy<" in (run / "report.html").read_text()
    last = metrics(run)[-1]
    assert last["health/knn"] > 0.5  # of ten digits: it has learned something, and so the verdict means something


KINDS = {
    "vit": ("model.drop_path=0.2", "objective.centering=center"),
    "resnet": ("model.arch=resnet18", "views.global_size=32", "views.local_size=16", "train.batch_size=8"),
    "workers": ("model.drop_path=0.2", "data.cache=none", "data.workers=1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_a_run_changes_no_bit_of_it(runs, tmp_path, monkeypatch, kind):
    """Health and the report at every step, against neither: class tokens, BatchNorm's statistics, random states."""
    monkeypatch.setattr(reporting, "SOONEST", 0)
    monkeypatch.setattr(reporting, "RARELY", 0)
    settings = ("train.steps=8", *KINDS[kind])
    watched, alone, written = tmp_path / "watched", tmp_path / "alone", []
    write = reporting.page.write
    monkeypatch.setattr(reporting.page, "write", lambda *parts: written.append(write(*parts)))
    runs.finish("monitor.health_every=1", f"run.dir={watched}", *settings, page=True)
    assert len(written) == 9  # and one at the end
    runs.finish("monitor.health_every=0", f"run.dir={alone}", *settings)
    assert all("health/entropy_ratio" in line for line in metrics(watched))
    assert not any("health/entropy_ratio" in line for line in metrics(alone))
    assert backbone(watched) == backbone(alone)
    assert losses(watched) == losses(alone)
