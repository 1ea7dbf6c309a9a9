"""Trackers: a failing one never takes the run along, a run directory is one run, what W&B has is not sent again."""

import io
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image

from dino.config.schema import TrackingConfig
from dino.errors import UserError
from dino.tracking import Table, Trackers, backends, log_evaluations, tracked_runs

LINE = {"loss/dino": 2.5, "health/verdict": "healthy"}


class Recorder:
    """A tracker of Accelerate's kind that keeps what it is told.

    Attributes:
        fails_at: name of the method that raises.
    """

    requires_logging_directory = False
    started: ClassVar[list["Recorder"]] = []
    fails_at = ""
    step, is_offline = 0, False  # that W&B would go on from

    def __init__(self, project: str, **options: object):
        self.project, self.options, self.lines, self.settings, self.images = project, options, [], None, {}
        self.run = SimpleNamespace(starting_step=type(self).step, offline=type(self).is_offline)
        self.active_run = SimpleNamespace(info=SimpleNamespace(run_id="run-of-mlflow"))

    def _happens(self, method: str) -> None:
        if method == type(self).fails_at:
            raise RuntimeError(f"{method} is broken\nand more")

    def start(self) -> None:
        self._happens("start")
        Recorder.started.append(self)

    def store_init_configuration(self, settings: dict) -> None:
        self.settings = settings

    def log(self, values: dict, step: int | None) -> None:
        self._happens("log")
        self.lines.append((step, values))

    def log_images(self, images: dict, step: int | None) -> None:
        self.images |= images

    def finish(self) -> None:
        self._happens("finish")


class Broken(Recorder):
    fails_at = "log"


@pytest.fixture
def opened(accelerator, tmp_path, monkeypatch):
    """Function that opens trackers by name to class; gives the Trackers and those that have begun."""
    monkeypatch.setenv("WANDB_MODE", "offline")  # nobody is asked for a key
    monkeypatch.setattr(Recorder, "started", [])

    def make(classes: dict[str, type], start: int = 0):
        monkeypatch.setattr(backends, "LOGGER_TYPE_TO_CLASS", classes)
        Recorder.started.clear()
        tracking = TrackingConfig(list(classes), "letters", "mine")
        trackers = Trackers(
            accelerator, tracking, tmp_path, {"optim.lr": 0.1, "model.arch": None}, "pre-training", start
        )
        return trackers, list(Recorder.started)

    return make


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_one_that_fails_is_given_up_and_the_other_goes_on(opened, moment, monkeypatch, caplog):
    monkeypatch.setattr(Broken, "fails_at", moment)
    trackers, begun = opened({"aim": Broken, "trackio": Recorder})
    whole = begun[-1]
    for step in (1, 2):
        trackers.log(LINE, step)
    trackers.end()
    assert whole.lines == [(1, LINE), (2, LINE)]
    assert [record.getMessage() for record in caplog.records] == [
        f"aim is given up, the run goes on without it: {moment} is broken"
    ]


def test_steps_and_pictures_that_wandb_has_are_not_sent_again(opened, monkeypatch):
    monkeypatch.setattr(Recorder, "step", 3)  # the next one that it takes
    trackers, (wandb, other) = opened({"wandb": Recorder, "trackio": Recorder}, start=1)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    for step in (2, 3):
        trackers.log(LINE, step)
        trackers.pictures({f"at {step}": buffer.getvalue()}, step)
    assert [step for step, _ in wandb.lines] == [3]
    assert [step for step, _ in other.lines] == [2, 3]
    assert list(wandb.images) == ["at 3"]
    (picture,) = wandb.images["at 3"]
    assert (picture.size, picture.getpixel((0, 0))) == ((4, 3), (255, 0, 0))
    assert not other.images


@pytest.mark.parametrize(("is_offline", "sent_again"), [(False, [3, 4]), (True, [])])
def test_wandb_gets_what_it_has_missed(opened, monkeypatch, is_offline, sent_again):
    """The first time all lines; later those that a killed start could not send, which offline it has in its file."""
    monkeypatch.setattr(Recorder, "is_offline", is_offline)
    lines = [{"step": step, "loss/dino": 0.5 * step} for step in (1, 2, 3, 4)]
    for at, expected in ((0, [1, 2, 3, 4]), (3, sent_again)):
        monkeypatch.setattr(Recorder, "step", at)
        trackers, (wandb, other) = opened({"wandb": Recorder, "trackio": Recorder})
        trackers.catch_up(lines)
        assert wandb.lines == [(step, {"loss/dino": 0.5 * step}) for step in expected]
        assert not other.lines


def test_a_directory_is_one_run_however_often_it_is_started(opened, tmp_path):
    names = ("wandb", "mlflow", "trackio", "tensorboard")
    _, first = opened(dict.fromkeys(names, Recorder))
    trackers, second = opened(dict.fromkeys(names, Recorder), start=40)
    wandb, mlflow, trackio, tensorboard = second
    assert wandb.options["id"] == first[0].options["id"] == (tmp_path / "wandb_id").read_text()
    assert (wandb.options["resume"], wandb.options["name"], wandb.options["dir"]) == ("allow", "mine", str(tmp_path))
    assert (first[1].options["run_id"], mlflow.options["run_id"]) == (None, "run-of-mlflow")
    assert mlflow.settings is None, "MLflow refuses settings that differ from those of the first start"
    assert (trackio.options["name"], trackio.options["resume"]) == ("mine", "allow")
    assert tensorboard.options["purge_step"] == 41
    assert "purge_step" not in first[3].options
    assert first[1].settings == trackio.settings == {"optim.lr": 0.1, "model.arch": "None"}
    trackers.log(LINE, 41)
    assert mlflow.lines == [(41, {"loss/dino": 2.5})], "it takes numbers only"


def test_in_a_sweep_the_run_is_the_agents(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial-1")
    _, (wandb,) = opened({"wandb": Recorder})
    assert not wandb.options.keys() & {"id", "name", "resume"}
    assert (tmp_path / "wandb_id").read_text() == "trial-1"


@pytest.mark.parametrize("is_offline", [False, True])
@pytest.mark.parametrize("is_there", [True, False])
def test_the_manifest_that_a_run_trains_on_is_its_input(opened, monkeypatch, tmp_path, caplog, is_there, is_offline):
    """By the curation's name in W&B; where W&B lacks it the run goes on, and offline W&B is not asked."""
    monkeypatch.setattr(Recorder, "is_offline", is_offline)
    curated = tmp_path / "curated"
    curated.mkdir()
    trackers, (wandb,) = opened({"wandb": Recorder})
    inputs = []

    def use_artifact(name: str) -> None:
        if not is_there:
            raise ValueError("not found")
        inputs.append(name)

    wandb.run.use_artifact = use_artifact
    trackers.uses("manifest", curated)  # of a curation that W&B was told nothing of
    (curated / "wandb_id").write_text("c0ffee", encoding="utf-8")
    trackers.uses("manifest", curated)
    assert inputs == (["manifest-c0ffee:latest"] if is_there and not is_offline else [])
    assert ("not found" in caplog.text) == (not is_there and not is_offline)
    trackers.log(LINE, 1)
    assert wandb.lines == [(1, LINE)]


def test_figures_for_the_runs_of_weights_need_such_runs(accelerator, tmp_path):
    for weights in (str(tmp_path), "dinov2_vits14"):
        with pytest.raises(UserError, match="--wandb PROJECT"):
            tracked_runs([weights])
    with pytest.raises(UserError, match="--wandb PROJECT"):
        log_evaluations(accelerator, "", {}, {"t": Table(["a"], [["b"]])}, {str(tmp_path): {"knn": 0.5}})
