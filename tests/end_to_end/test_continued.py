"""Runs that begin with weights of an earlier one, or learn from it: to the end, interrupted, in parts, and refused."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from launching import (
    backbone,
    checkpoint,
    checkpoints,
    contents,
    copy_run,
    error_of,
    losses,
    metrics,
    steps_logged,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dino

pytestmark = pytest.mark.slow

STEPS, FROZEN, BOUNDARY = 16, 4, 8
PATCHES = ("objective.ibot_weight=1",)
FIRST = (*PATCHES, "objective.ibot_head=separate", "objective.ibot_prototypes=48", "train.steps=6")
PHASED = (
    *PATCHES,
    f"train.steps={STEPS}",
    "train.checkpoint_every=4",
    "train.keep_checkpoints=4",
    f"optim.freeze_backbone_steps={FROZEN}",
    "train.phases=[{begin: 0.5, global_size: 12, local_size: 8}]",
    "data.cache=none",
    "optim.lr=0.003",
)
RANDOM = (*PHASED, "objective.koleo_weight=0.1", "model.drop_path_kind=subset", "model.drop_path=0.3")
STILL = (*PHASED, "model.drop_path=0")
DISTILLED = (*PATCHES, "train.steps=6", "train.checkpoint_every=2", "model.embed_dim=16", "model.drop_path=0")
WITHOUT_REPORT = """
from dino.report.run import Reporter
Reporter.write = lambda *_, **__: {}
"""  # which takes a third of so short a run
AT_STEP = """
import os, signal
from dino.training.metrics import Metrics
log = Metrics.log
def log_and_send(self, step, *rest):
    log(self, step, *rest)
    if step == {step}:
        os.kill(os.getpid(), signal.{name})
Metrics.log = log_and_send
"""


@pytest.fixture(scope="module")
def first(runs, tmp_path_factory):
    """The run that others begin with, or learn from."""
    run = tmp_path_factory.mktemp("first") / "run"
    runs.finish(*FIRST, f"run.dir={run}", before=WITHOUT_REPORT)
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

    def finish(name):
        options = {"launcher": "torchrun"} if name.startswith("two") else {}
        if name in ("one", "random", "of_file", "of_rest"):
            options = {"before": WITHOUT_REPORT}
        return folder / name, runs.run(*commands[name], **options)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(finish, commands), strict=True))


def of(done, name):
    """The directory of a run that succeeded."""
    run, process = done[name]
    assert process.returncode == 0, process.stderr
    return run


@pytest.fixture(scope="module")
def elsewhere(runs, first, done, tmp_path_factory):
    """Begun in a directory of its own from a checkpoint in the midst of another run."""
    run = tmp_path_factory.mktemp("elsewhere") / "run"
    found = checkpoint(of(done, "random"), 12)
    command = [*RANDOM, f"model.init={first}", f"train.resume={found}", f"run.dir={run}"]
    runs.finish(*command, before=WITHOUT_REPORT)
    return run


class TestContinued:
    @pytest.mark.parametrize("name", ["one", "two", "random"])
    def test_weights_are_looked_at_before_the_first_step(self, done, name):
        run = of(done, name)
        assert steps_logged(run) == list(range(STEPS + 1))
        line = metrics(run)[0]
        assert 0 < line["health/knn"] <= 1
        assert not any(key.startswith("loss/") for key in line)

    def test_every_loss_takes_part(self, done):
        lines = metrics(of(done, "random"))[1:]
        for name in ("loss/dino", "loss/ibot", "loss/koleo"):
            values = [line[name] for line in lines]
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

    def test_interrupted_before_and_in_a_phase_it_ends_bit_identical(self, runs, first, done, tmp_path):
        run = tmp_path / "run"
        command = [*RANDOM, f"model.init={first}", f"run.dir={run}"]

        stopped = runs.run(*command, before=WITHOUT_REPORT + AT_STEP.format(step=5, name="SIGTERM"))
        assert stopped.returncode == 0, stopped.stderr
        reached = checkpoints(run)[-1]
        assert 5 <= reached < BOUNDARY
        assert dino.load_backbone(run).preprocess.image_size == 8

        killed = runs.run(*command, "data.workers=1", before=AT_STEP.format(step=15, name="SIGKILL"))
        assert killed.returncode == -9, killed.stderr
        assert f"going on from step {reached}\n" in killed.stdout
        assert checkpoints(run)[-1] == 12 > BOUNDARY
        assert backbone(run) != backbone(of(done, "random"))

        finished = runs.finish(*command, before=WITHOUT_REPORT)
        assert "going on from step 12\n" in finished.stdout
        assert backbone(run) == backbone(of(done, "random"))
        assert steps_logged(run) == list(range(STEPS + 1))

    def test_killed_before_its_first_checkpoint_it_begins_with_the_weights_again(self, runs, first, done, tmp_path):
        run = tmp_path / "run"
        command = [*RANDOM, f"model.init={first}", f"run.dir={run}"]
        assert runs.run(*command, before=AT_STEP.format(step=2, name="SIGKILL")).returncode == -9
        assert checkpoints(run) == []
        runs.finish(*command, before=WITHOUT_REPORT)
        assert backbone(run) == backbone(of(done, "random"))
        assert steps_logged(run) == list(range(STEPS + 1))

    def test_begun_elsewhere_from_a_checkpoint_it_ends_bit_identical(self, done, elsewhere):
        assert backbone(elsewhere) == backbone(of(done, "random"))

    def test_begun_elsewhere_it_says_nothing_of_step_0(self, elsewhere):
        assert steps_logged(elsewhere) == [13, 14, 15, 16]

    def test_on_two_processes_in_parts_it_gives_the_same_backbone(self, first, done):
        """To a thousandth of the way from the first weights to the last ones."""
        two, one = of(done, "two"), of(done, "one")
        assert "2 process(es) × 2 micro-batch(es) × 8 images" in done["two"][1].stdout
        start, end, found = (load_file(run / "backbone.safetensors") for run in (first, one, two))
        assert found.keys() == end.keys()
        for name in end:
            way, apart = (end[name] - start[name]).norm(), (found[name] - end[name]).norm()
            assert apart <= 1e-3 * way, f"{name}: {apart} of {way}"
        for line, wanted in zip(metrics(two)[1:], metrics(one)[1:], strict=True):
            for name in ("loss/dino", "loss/ibot"):
                assert line[name] == pytest.approx(wanted[name], rel=1e-4), f"{name} of step {line['step']}"


@pytest.mark.parametrize("name", ["two", "of_run"])
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

    def test_resumed_it_ends_bit_identical(self, runs, done, tmp_path):
        """Also with prototypes that are drawn anew."""
        whole = of(done, "of_file")
        run = copy_run(whole, tmp_path / "run", 2)
        command = [*DISTILLED, f"objective.distill={whole.parent / 'alone.safetensors'}", f"run.dir={run}"]
        again = runs.finish(*command, before=WITHOUT_REPORT)
        assert "going on from step 2\n" in again.stdout
        assert backbone(run) == backbone(whole)

    def test_resumed_with_another_teacher_of_the_same_name_it_is_refused(self, runs, done, tmp_path):
        whole = of(done, "of_file")
        run, file = copy_run(whole, tmp_path / "run", 2), whole.parent / "alone.safetensors"
        content = file.read_bytes()
        with safe_open(file, framework="pt") as opened:
            facts, tensors = opened.metadata(), {name: opened.get_tensor(name) + 0.01 for name in opened.keys()}  # noqa: SIM118
        try:
            save_file(tensors, file, metadata=facts)
            refused = runs.run(*DISTILLED, f"objective.distill={file}", f"run.dir={run}")
            assert "is not what" in error_of(refused)
        finally:
            file.write_bytes(content)

    def test_two_processes_give_the_curve_of_one(self, done):
        assert losses(of(done, "two_of_run")) == pytest.approx(losses(of(done, "of_run")), rel=1e-4)


@pytest.fixture(scope="module")
def refused(runs, first, tmp_path_factory):
    """Starts that cannot work, by name: the finished process and where it would have run."""
    folder = tmp_path_factory.mktemp("refused")
    before = contents(first)
    commands = {
        "init": ["model.init=dinov2_vits15"],
        "patch_size": [f"model.init={first}", "model.patch_size=2"],
        "phases": ["train.phases=[{begin: 0.8, global_size: 12, local_size: 8}, {begin: 0.5, global_size: 8}]"],
        "guide": [f"objective.distill={first}", "objective.prototypes=32"],
    }
    done = runs.together(
        {name: ["train.steps=2", f"run.dir={folder / name}", *rest] for name, rest in commands.items()}
    )
    assert contents(first) == before
    return {name: (done[name], folder / name) for name in commands}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("init", ["no weights at 'dinov2_vits15' (did you mean dinov2_vits14?)"]),
        ("patch_size", ["model.patch_size=2, but model.init=", "has 4: leave model.patch_size out"]),
        ("phases", ["train.phases must begin one after the other, between 0 and 1, got [0.8, 0.5]"]),
        ("guide", ["objective.prototypes=32, but objective.distill=", "has 64: leave objective.prototypes out"]),
    ],
)
def test_refused_with_a_message_that_names_the_fix(refused, name, said):
    process, run = refused[name]
    message = error_of(process)
    for words in said:
        assert words in message
    assert not run.exists()
