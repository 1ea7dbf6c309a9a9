"""Runs that begin with weights of an earlier one, or learn from it: to the end, interrupted, in parts, and refused."""

import json
import os
import shutil
import signal

import pytest
import torch
from launching import backbone, checkpoint, checkpoints, contents, copy_run, error_of, losses, metrics, steps_logged
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dino
from dino.training.metrics import Metrics

pytestmark = pytest.mark.slow

STEPS, FROZEN, BOUNDARY = 16, 4, 8
PATCHES = ("objective.ibot_weight=1",)
FIRST = (*PATCHES, "objective.ibot_head=separate", "objective.ibot_prototypes=48", "train.steps=6")
PHASED = (
    *PATCHES,
    *(f"train.steps={STEPS}", "train.checkpoint_every=4", "train.keep_checkpoints=4"),
    *(f"optim.freeze_backbone_steps={FROZEN}", "optim.lr=0.003", "data.cache=none"),
    "train.phases=[{begin: 0.5, global_size: 12, local_size: 8}]",
)
RANDOM = (*PHASED, "objective.koleo_weight=0.1", "model.drop_path_kind=subset", "model.drop_path=0.3")
STILL = (*PHASED, "model.drop_path=0")
DISTILLED = (*PATCHES, "train.steps=6", "train.checkpoint_every=2", "model.embed_dim=16", "model.drop_path=0")
KILLED_AT = """
import os, signal
from dino.training.metrics import Metrics
log = Metrics.log
def log_and_die(self, step, *rest):
    log(self, step, *rest)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.log = log_and_die
"""


@pytest.fixture(scope="module")
def first(runs, tmp_path_factory):
    """The run that others begin with, or learn from."""
    run = tmp_path_factory.mktemp("first") / "run"
    runs.finish(*FIRST, f"run.dir={run}")
    return run


@pytest.fixture(scope="module")
def done(runs, first, tmp_path_factory):
    """Finished runs by name: (run directory, process)."""
    folder = tmp_path_factory.mktemp("done")
    alone, rest = folder / "alone.safetensors", folder / "rest"
    shutil.copy(first / "backbone.safetensors", alone)
    copy_run(first, rest)
    commands = {
        "two": (*STILL, f"model.init={first}", "train.accumulation=2"),
        "one": (*STILL, f"model.init={first}"),
        "random": (*RANDOM, f"model.init={first}"),
        "two_of_run": (*DISTILLED, f"objective.distill={first}"),
        "of_run": (*DISTILLED, f"objective.distill={first}"),
        "of_file": (*DISTILLED, f"objective.distill={alone}"),
        "of_rest": (*DISTILLED, f"objective.distill={rest}"),
    }
    commands = {name: (*settings, f"run.dir={folder / name}") for name, settings in commands.items()}
    finished = runs.together(commands, two="torchrun", two_of_run="torchrun")
    return {name: (folder / name, process) for name, process in finished.items()}


def of(done, name):
    return done[name][0]


class TestContinued:
    @pytest.mark.parametrize("name", ["one", "two", "random"])
    def test_weights_are_looked_at_before_the_first_step(self, done, name):
        run = of(done, name)
        assert steps_logged(run) == list(range(STEPS + 1))
        line = metrics(run)[0]
        assert 0 < line["health/knn"] <= 1
        assert not any(key.startswith("loss/") for key in line)

    def test_every_loss_takes_part(self, done):
        for name in ("loss/dino", "loss/ibot", "loss/koleo"):
            values = [line[name] for line in metrics(of(done, "random"))[1:]]
            assert all(value == value and value != 0 for value in values)
            assert len(set(values)) == STEPS

    def test_begins_with_the_weights_and_leaves_them(self, first, done):
        """At first the backbone stands still, while new heads learn."""
        run = of(done, "one")
        start, end = (load_file(folder / "backbone.safetensors") for folder in (first, run))
        for network in ("student", "teacher"):
            frozen = load_file(checkpoint(run, FROZEN) / f"{network}.safetensors")
            assert [name for name in start if not torch.equal(frozen[f"backbone.{name}"], start[name])] == []
        assert start.keys() == end.keys()
        assert [name for name in start if torch.equal(start[name], end[name])] == []
        assert dino.load_backbone(run).preprocess.image_size == 12

    def test_interrupted_before_and_in_a_phase_it_ends_bit_identical(self, runs, first, done, tmp_path, monkeypatch):
        run = tmp_path / "run"
        command = [*RANDOM, f"model.init={first}", f"run.dir={run}"]
        log = Metrics.log

        def log_and_ask_to_stop(metrics, step, *rest):
            log(metrics, step, *rest)
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patched:
            patched.setattr(Metrics, "log", log_and_ask_to_stop)
            assert "asked to stop" in runs.finish(*command).stdout
        reached = checkpoints(run)[-1]
        assert 5 <= reached < BOUNDARY
        assert dino.load_backbone(run).preprocess.image_size == 8

        killed = runs.run(*command, "data.workers=1", before=KILLED_AT.format(step=15))
        assert killed.returncode == -9, killed.stderr
        assert f"going on from step {reached}\n" in killed.stdout
        assert checkpoints(run)[-1] == 12 > BOUNDARY
        assert backbone(run) != backbone(of(done, "random"))

        assert "going on from step 12\n" in runs.finish(*command).stdout
        assert backbone(run) == backbone(of(done, "random"))
        assert steps_logged(run) == list(range(STEPS + 1))

    def test_killed_before_its_first_checkpoint_it_begins_with_the_weights_again(self, runs, first, done, tmp_path):
        run = tmp_path / "run"
        command = [*RANDOM, f"model.init={first}", f"run.dir={run}"]
        assert runs.run(*command, before=KILLED_AT.format(step=2)).returncode == -9
        assert checkpoints(run) == []
        runs.finish(*command)
        assert backbone(run) == backbone(of(done, "random"))
        assert steps_logged(run) == list(range(STEPS + 1))

    def test_begun_elsewhere_from_a_checkpoint_it_ends_bit_identical(self, runs, first, done, tmp_path):
        """In a directory of its own; it says nothing of step 0."""
        run, resumed = tmp_path / "run", checkpoint(of(done, "random"), 12)
        runs.finish(*RANDOM, f"model.init={first}", f"train.resume={resumed}", f"run.dir={run}")
        assert backbone(run) == backbone(of(done, "random"))
        assert steps_logged(run) == [13, 14, 15, 16]

    def test_on_two_processes_in_parts_it_gives_the_same_backbone(self, first, done):
        """To a thousandth of the way from the first weights to the last ones."""
        assert "2 process(es) × 2 micro-batch(es) × 8 images" in done["two"][1].stdout
        runs = (first, of(done, "one"), of(done, "two"))
        start, end, of_two = (load_file(run / "backbone.safetensors") for run in runs)
        assert of_two.keys() == end.keys()
        for name in end:
            way, apart = (end[name] - start[name]).norm(), (of_two[name] - end[name]).norm()
            assert apart <= 1e-3 * way, f"{name}: {apart} of {way}"
        for line, reference in zip(metrics(of(done, "two"))[1:], metrics(of(done, "one"))[1:], strict=True):
            for name in ("loss/dino", "loss/ibot"):
                assert line[name] == pytest.approx(reference[name], rel=1e-4), f"{name} of step {line['step']}"


@pytest.mark.parametrize("name", ["two", "two_of_run"])
def test_reports_are_written(done, name):
    assert (of(done, name) / "report.html").stat().st_size > 10_000


class TestDistilled:
    @pytest.mark.parametrize("name", ["of_run", "of_file"])
    def test_leaves_a_backbone_of_its_own_shape(self, done, name):
        run = of(done, name)
        assert steps_logged(run) == list(range(1, 7))
        assert all(value > 0 for value in losses(run))
        model = dino.load_backbone(run)
        images = torch.randint(0, 256, (3, 1, 20, 28), dtype=torch.uint8)
        with torch.inference_mode():
            features = model.forward_features(model.preprocess(images))
        assert features["x_norm_clstoken"].shape == (3, 16)
        assert features["x_norm_patchtokens"].shape == (3, 4, 16)
        assert features["x_norm_clstoken"].isfinite().all()
        with safe_open(run / "backbone.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["dino"])["training"]["steps"] == 6

    def test_heads_of_the_run_make_a_difference(self, done):
        assert backbone(of(done, "of_run")) != backbone(of(done, "of_file"))
        assert "objective.ibot_prototypes = 48  (of objective.distill=" in done["of_run"][1].stdout
        assert "objective.ibot_prototypes" not in done["of_file"][1].stdout

    def test_a_run_without_checkpoints_is_as_good_as_its_backbone(self, done):
        assert backbone(of(done, "of_rest")) == backbone(of(done, "of_file"))

    def test_two_processes_give_the_curve_of_one(self, done):
        assert losses(of(done, "two_of_run")) == pytest.approx(losses(of(done, "of_run")), rel=1e-4)

    def test_resumed_it_ends_bit_identical_and_with_another_teacher_of_the_same_name_it_is_refused(
        self, runs, done, tmp_path
    ):
        """Also with prototypes that are drawn anew."""
        whole = of(done, "of_file")
        run, file = copy_run(whole, tmp_path / "run", 2), tmp_path / "alone.safetensors"
        shutil.copy(whole.parent / "alone.safetensors", file)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace(f"{whole.parent / 'alone.safetensors'}", str(file)))
        command = [*DISTILLED, f"objective.distill={file}"]
        assert "going on from step 2\n" in runs.finish(*command, f"run.dir={run}").stdout
        assert backbone(run) == backbone(whole)

        with safe_open(file, framework="pt") as opened:
            facts, tensors = opened.metadata(), {name: opened.get_tensor(name) + 0.01 for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata=facts)
        again = copy_run(whole, tmp_path / "again", 2)
        (again / "config.yaml").write_text((run / "config.yaml").read_text())
        assert "is not what" in error_of(runs.run(*command, f"run.dir={again}"))


REFUSED = {  # settings that cannot work, {} being the first run, and what is said of them
    "init": (["model.init=dinov2_vits15"], ["no weights at 'dinov2_vits15' (did you mean dinov2_vits14?)"]),
    "patch_size": (
        ["model.init={}", "model.patch_size=2"],
        ["model.patch_size=2, but model.init=", "has 4: leave model.patch_size out"],
    ),
    "phases": (
        ["train.phases=[{begin: 0.8, global_size: 12, local_size: 8}, {begin: 0.5, global_size: 8}]"],
        ["train.phases must begin one after the other, between 0 and 1, got [0.8, 0.5]"],
    ),
    "frozen teacher": (
        ["objective.distill={}", "objective.prototypes=32"],
        ["objective.prototypes=32, but objective.distill=", "has 64: leave objective.prototypes out"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message_that_names_the_fix(runs, first, tmp_path, name):
    settings, said = REFUSED[name]
    before, run = contents(first), tmp_path / "run"
    command = [setting.replace("={}", f"={first}") for setting in settings]
    message = error_of(runs.run("train.steps=2", f"run.dir={run}", *command))
    assert [part for part in said if part not in message] == []
    assert not run.exists()
    assert contents(first) == before
