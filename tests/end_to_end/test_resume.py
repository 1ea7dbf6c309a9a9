"""A run that is killed, stopped, or started again with other settings: the end is that of an uninterrupted run, or no
byte of it is changed."""

import os
import random
import signal
from pathlib import Path

import pytest
import yaml
from launching import (
    LONGEST,
    backbone,
    checkpoint,
    checkpoints,
    contents,
    copy_run,
    error_of,
    losses,
    metrics,
    steps_logged,
    wait_for,
    write_images,
)

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every=7", "model.drop_path=0.2")
CENTRE = (*SETTINGS, "objective.centering=center", "data.cache=device")
SINKHORN = (*SETTINGS, "objective.centering=sinkhorn", "train.cpu_threads=2", "data.cache=none")
STOPS_AT_ONCE = "train.time_limit=0.0001"


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Run directories of uninterrupted runs, by centring; one has its images on the device, one decodes them anew."""
    folder = tmp_path_factory.mktemp("whole")
    runs.finish(*CENTRE, f"run.dir={folder / 'centre'}")
    runs.finish(*SINKHORN, f"run.dir={folder / 'sinkhorn'}")
    assert checkpoints(folder / "centre") == [49, 56, 60]
    return {name: folder / name for name in ("centre", "sinkhorn")}


def partial(folder):
    """What is being written in a folder at this moment."""
    return {path.name for path in folder.glob(".*.partial")}


@pytest.mark.parametrize(("name", "settings", "workers"), [("centre", CENTRE, 0), ("sinkhorn", SINKHORN, 2)])
def test_killed_at_any_moment_the_same_command_ends_bit_identical(runs, whole, tmp_path, name, settings, workers):
    """Three times: at any step, in the midst of a checkpoint, in the midst of another file."""
    run = tmp_path / "run"
    command = [*settings, f"data.workers={workers}", f"run.dir={run}"]
    moment = random.randrange(1, 25)
    print(f"killed once step {moment} is logged")
    remains = set()  # of the first kill, if it came in the midst of a checkpoint
    for is_time in (
        lambda: len(steps_logged(run)) >= moment,
        lambda: bool(partial(run / "checkpoints") - remains),
        lambda: bool(partial(run)) and max(checkpoints(run), default=0) > 21,
    ):
        process = runs.start(*command)
        process.wait_until(is_time)
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        remains.update(partial(run / "checkpoints"))
    runs.finish(*command)
    assert backbone(run) == backbone(whole[name])
    assert steps_logged(run) == list(range(1, STEPS + 1))
    assert checkpoints(run) == [49, 56, 60]
    assert not partial(run)
    assert not list((run / "checkpoints").glob(".*"))


def test_stopped_by_signals_and_time_limit_it_goes_on_bit_identical(runs, whole, tmp_path):
    run = tmp_path / "run"
    command = [*SINKHORN, f"run.dir={run}"]

    process = runs.start(*command, "data.workers=2", launcher="python")
    process.wait_until(lambda: len(steps_logged(run)) >= 3)
    reached = len(steps_logged(run))
    assert process.end(signal.SIGTERM) == 0
    assert checkpoints(run)[-1] == steps_logged(run)[-1]
    assert checkpoints(run)[-1] <= reached + 10, "no checkpoint at once"
    assert "asked to stop" in process.output.read_text()
    assert (run / "backbone.safetensors").exists()

    stopped = checkpoints(run)[-1]
    process = runs.start(*command, "data.workers=2", launcher="python")
    process.wait_until(lambda: steps_logged(run)[-1] >= stopped + 3)
    assert process.end(signal.SIGINT, everybody=True) == 0, process.errors.read_text()  # Ctrl-C reaches workers too
    assert checkpoints(run)[-1] == steps_logged(run)[-1]
    assert f"going on from step {stopped}\n" in process.output.read_text()

    stopped = checkpoints(run)[-1]
    assert "time limit" in runs.finish(*command, STOPS_AT_ONCE).stdout
    assert checkpoints(run)[-1] == stopped + 1

    runs.finish(*command, "train.keep_checkpoints=2")
    assert backbone(run) == backbone(whole["sinkhorn"])
    assert steps_logged(run) == list(range(1, STEPS + 1))
    assert checkpoints(run) == [56, 60]


def test_sigterm_to_all_processes_of_the_run_leaves_a_checkpoint(runs, tmp_path):
    """Slurm and service managers signal the whole group: a worker that dies first must not take the run along."""
    run = tmp_path / "run"
    process = runs.start(
        *SINKHORN, "data.workers=2", "train.checkpoint_every=1000", f"run.dir={run}", launcher="python"
    )
    process.wait_until(lambda: len(steps_logged(run)) >= 3)
    assert process.end(signal.SIGTERM, everybody=True) == 0, process.errors.read_text()
    assert checkpoints(run) == [steps_logged(run)[-1]]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker processes by Linux's /proc")
def test_worker_killed_by_the_system_ends_the_run(runs, tmp_path):
    """As it happens when memory runs out: the run fails, and does not wait for its other workers for ever."""
    run = tmp_path / "run"
    process = runs.start(*SINKHORN, "train.steps=5000", "data.workers=2", f"run.dir={run}", launcher="python")
    process.wait_until(lambda: bool(checkpoints(run)))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if "pretrain.py" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    assert process.wait(LONGEST) not in (0, 2)
    assert "worker" in process.errors.read_text()
    assert checkpoints(run)


def test_sigterm_to_the_launcher_ends_the_run_with_a_checkpoint(runs, tmp_path):
    run = tmp_path / "run"
    process = runs.start(*CENTRE, "train.checkpoint_every=1000", f"run.dir={run}", launcher="accelerate")
    process.wait_until(lambda: len(steps_logged(run)) >= 3)
    assert process.end(signal.SIGTERM) != 0  # the launcher is gone, the run is not yet
    wait_for(lambda: "asked to stop" in process.output.read_text(), process.errors)
    assert checkpoints(run) == [steps_logged(run)[-1]]
    assert checkpoints(run)[0] < STEPS


def test_killed_before_the_config_was_written(runs, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".config.yaml.partial").write_text("data:\n  ro")
    runs.finish("train.steps=2", f"run.dir={run}")
    assert steps_logged(run) == [1, 2]


@pytest.fixture
def copy(whole, tmp_path):
    """Function that copies a whole run with only the checkpoints of `steps`."""

    def make(*steps: int, name: str = "centre"):
        return copy_run(whole[name], tmp_path / name, *steps)

    return make


def test_killed_after_the_last_checkpoint_the_backbone_is_still_written(runs, whole, copy):
    run = copy(56, 60)
    (run / "backbone.safetensors").unlink()
    runs.finish(*CENTRE, f"run.dir={run}", page=True)
    assert backbone(run) == backbone(whole["centre"])
    assert (run / "report.html").exists()


def test_damaged_checkpoint_is_named_and_passed_over_only_when_asked(runs, whole, copy):
    run = copy(49, 56, 60)
    for step in (56, 60):
        damaged = checkpoint(run, step) / "optimizer.safetensors"
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    before = contents(run)
    message = error_of(runs.run(*CENTRE, f"run.dir={run}"))
    assert f"{checkpoint(run, 60)} is damaged: optimizer.safetensors has changed" in message
    assert contents(run) == before
    done = runs.finish(*CENTRE, "train.resume=newest_whole", f"run.dir={run}")
    assert "going on from step 49\n" in done.stdout
    assert backbone(run) == backbone(whole["centre"])
    assert untimed(run) == untimed(whole["centre"]), "what the monitor has seen is part of the state"


def untimed(run):
    """The lines of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in metrics(run)]


@pytest.mark.parametrize(("name", "settings", "cache"), [("centre", CENTRE, "none"), ("sinkhorn", SINKHORN, "device")])
def test_images_may_move_to_the_device_or_away_from_it(runs, whole, copy, name, settings, cache):
    """As on a machine with another amount of memory: the same views, up to rounding."""
    run = copy(56, name=name)
    done = runs.finish(*settings, f"data.cache={cache}", f"run.dir={run}")
    assert "going on from step 56\n" in done.stdout
    assert losses(run) == pytest.approx(losses(whole[name]), rel=1e-2)


def test_a_run_of_an_earlier_version_ends_bit_identical(runs, whole, copy):
    """Its config has the names of that time, and says nothing of what is new."""
    run = copy(56)
    config = yaml.safe_load((run / "config.yaml").read_text())
    objective = config["objective"]
    for old, new in (("momentum", "teacher_momentum"), ("mask_share", "mask_fraction")):
        objective[old] = objective.pop(new)
    objective["momentum_end"] = objective.pop("teacher_momentum_end")
    config["optim"]["freeze_last_layer_steps"] = objective.pop("freeze_last_layer_steps")
    config["model"]["initialisation"] = config["model"].pop("weight_init")
    config["train"]["shard"] = config["train"].pop("fsdp")
    config["train"]["checkpoint_blocks"] = config["train"].pop("activation_checkpointing")
    config["views"]["backend"], objective["centering"] = "device", "centre"
    del objective["name"], config["views"]["augment"], config["model"]["positions"], config["model"]["stem"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    done = runs.finish("--config", run / "config.yaml", f"run.dir={run}", settings=())
    assert "going on from step 56\n" in done.stdout
    assert "objective.momentum is called objective.teacher_momentum now" in done.stderr
    assert backbone(run) == backbone(whole["centre"])


def test_more_steps_may_be_asked_for(runs, copy):
    run = copy(60)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6')  # as a kill leaves it
    runs.finish(*CENTRE, "train.steps=63", f"run.dir={run}")
    assert steps_logged(run) == list(range(1, 64))
    assert checkpoints(run) == [60, 63]


def test_fewer_steps_than_taken_change_no_weight(runs, whole, copy):
    run = copy(60)
    done = runs.run(*CENTRE, "train.steps=50", f"run.dir={run}")
    assert done.returncode in (0, 2)
    assert backbone(run) == backbone(whole["centre"])
    assert checkpoints(run) == [60]


def test_path_of_a_checkpoint_begins_a_new_directory(runs, whole, tmp_path):
    run = tmp_path / "run"
    command = [*CENTRE, f"train.resume={checkpoint(whole['centre'], 49)}", f"run.dir={run}"]
    runs.finish(*command, STOPS_AT_ONCE)
    assert checkpoints(run) == [50]
    done = runs.finish(*command)
    assert "going on from step 50\n" in done.stdout, "the same command must go on where it stopped"
    assert backbone(run) == backbone(whole["centre"])
    assert steps_logged(run) == list(range(50, STEPS + 1))


def test_path_of_an_earlier_checkpoint_takes_the_run_back(runs, whole, copy):
    run = copy(49, 56, 60)
    runs.finish(*CENTRE, f"train.resume={checkpoint(run, 49)}", STOPS_AT_ONCE, f"run.dir={run}")
    assert steps_logged(run)[-1] == 50
    assert 50 in checkpoints(run)
    done = runs.finish(*CENTRE, f"run.dir={run}")
    assert "going on from step 50\n" in done.stdout, "checkpoints of the steps taken back must not be gone on from"
    assert backbone(run) == backbone(whole["centre"])
    assert steps_logged(run) == list(range(1, STEPS + 1))


REFUSED = {  # settings besides CENTRE, {} being a copy of the whole run, and what is said
    "other": (
        ["optim.lr=0.02", "train.batch_size=16", "model.drop_path=0", "run.dir={}"],
        ["optim.lr", "0.02", "train.batch_size", "32", "16", "model.drop_path", "0.2", "resume", "run.dir"],
    ),
    "never": (
        ["train.resume=never", "run.dir={}"],
        ["train.resume=never", "train.resume=auto", "another directory"],
    ),
    "no checkpoint": (["train.resume={}", "run.dir={}/../new"], ["train.resume=", "no checkpoint", "step-"]),
    "no run": (["run.dir={}/checkpoints"], ["not empty", "another directory"]),
    "narrower": (
        ["model.embed_dim=16", "train.resume={}/checkpoints/step-00000060", "run.dir={}/../new"],
        ["does not fit", "step-00000060"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_both_ways_on_and_nothing_changed(runs, copy, name):
    settings, said = REFUSED[name]
    run = copy(60)
    before = contents(run.parent)
    message = error_of(runs.run(*CENTRE, *(setting.replace("{}", str(run)) for setting in settings)))
    assert [part for part in said if part not in message] == []
    assert contents(run.parent) == before


def test_other_images_are_refused_and_nothing_changed(runs, tmp_path):
    write_images(tmp_path / "images", 24)
    data = ["data.kind=folder", f"data.root={tmp_path / 'images'}", "train.batch_size=8", f"run.dir={tmp_path / 'run'}"]
    runs.finish(*data, "train.steps=4")
    (tmp_path / "images" / "image-007.png").unlink()
    before = contents(tmp_path)
    message = error_of(runs.run(*data, "train.steps=6"))
    assert [part for part in ("images", "removed", "another run.dir") if part not in message] == []
    assert contents(tmp_path) == before


LATER = {"health/rank_me", "health/feature_std", "health/knn"}


def test_metrics_hold_the_same_names_at_every_step(whole):
    lines = metrics(whole["sinkhorn"])
    # Rank and neighbours need a few tokens first; everything else is there from the first line on.
    assert len({tuple(name for name in line if name not in LATER) for line in lines}) == 1
    assert lines[-1].keys() >= LATER
    assert {"step", "epoch", "loss/dino", "optim/lr", "teacher/momentum", "time/images_per_second"} <= lines[0].keys()
