"""Two real CPU processes, and micro-batches, give the curves of one process and one batch."""

import shutil
import signal

import pytest
from launching import backbone, checkpoint, checkpoints, copy_run, metrics, steps_logged

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every=4", "model.drop_path=0", "optim.lr=0.003")
CENTRE = (*SETTINGS, "objective.centering=center", "data.cache=device")
MUON = (*CENTRE, "optim.name=muon", "model.stem=conv")
SINKHORN = (*SETTINGS, "objective.centering=sinkhorn", "data.cache=none")


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory):
    """Finished runs by name: (run directory, process)."""
    folder = tmp_path_factory.mktemp("processes")
    commands = {
        "two_centre": CENTRE,
        "one_centre": CENTRE,
        "two_muon": MUON,
        "one_muon": MUON,
        "two_sinkhorn": SINKHORN,
        "one_sinkhorn": SINKHORN,
        "two_sinkhorn_accumulated": (*SINKHORN, "train.accumulation=2"),
        "one_centre_accumulated": (*CENTRE, "train.accumulation=4"),
        "two_random": (*CENTRE, "model.drop_path=0.2"),
    }
    commands = {name: (*settings, f"run.dir={folder / name}") for name, settings in commands.items()}
    launchers = {name: "two" for name in commands if name.startswith("two")}
    finished = runs.together(commands, **launchers)
    return {name: (folder / name, process) for name, process in finished.items()}


def assert_same_curves(run, reference, rtol=1e-4):
    assert steps_logged(run) == list(range(1, STEPS + 1))
    for line, wanted in zip(metrics(run), metrics(reference), strict=True):
        assert line["loss/dino"] == pytest.approx(wanted["loss/dino"], rel=rtol), f"step {line['step']}"
        assert line["health/gradient_norm"] == pytest.approx(wanted["health/gradient_norm"], rel=10 * rtol)


def test_the_curves_compared_here_move(done):
    """Otherwise equality would say nothing."""
    for name in ("one_centre", "one_muon", "one_sinkhorn"):
        losses = [line["loss/dino"] for line in metrics(done[name][0])]
        assert max(losses) - min(losses) > 100 * 1e-4 * max(losses)


@pytest.mark.parametrize("kind", ["centre", "muon", "sinkhorn"])
def test_two_processes_give_the_curve_of_one(done, kind):
    (two, process), (one, alone) = done[f"two_{kind}"], done[f"one_{kind}"]
    assert "32 = 2 process(es) × 1 micro-batch(es) × 16 images" in process.stdout  # there really were two
    assert "32 = 1 process(es) × 1 micro-batch(es) × 32 images" in alone.stdout
    assert_same_curves(two, one)


def test_what_two_processes_print_is_printed_once(done):
    assert done["two_centre"][1].stdout.count("global batch") == 1
    assert done["two_centre"][1].stdout.count("done: ") == 1


@pytest.mark.parametrize(
    ("name", "reference", "parts"),
    [
        ("one_centre_accumulated", "one_centre", "1 process(es) × 4 micro-batch(es) × 8 images"),
        ("two_sinkhorn_accumulated", "one_sinkhorn", "2 process(es) × 2 micro-batch(es) × 8 images"),
    ],
)
def test_micro_batches_give_the_curve_of_one_batch(done, name, reference, parts):
    run, process = done[name]
    assert parts in process.stdout
    assert_same_curves(run, done[reference][0])


def test_the_number_of_processes_may_change_when_a_run_is_resumed(runs, done, tmp_path):
    run = copy_run(done["two_centre"][0], tmp_path / "run", 4)
    alone = runs.finish(*CENTRE, f"run.dir={run}")
    assert "going on from step 4\n" in alone.stdout
    shutil.rmtree(checkpoint(run, 12))
    both = runs.finish(*CENTRE, f"run.dir={run}", launcher="two")
    assert "going on from step 8\n" in both.stdout
    assert "2 process(es)" in both.stdout
    assert_same_curves(run, done["one_centre"][0])


def test_two_processes_with_random_state_resume_bit_identical(runs, done, tmp_path):
    whole, _ = done["two_random"]
    run = copy_run(whole, tmp_path / "run", 8)
    runs.finish(*CENTRE, "model.drop_path=0.2", f"run.dir={run}", launcher="two")
    assert backbone(run) == backbone(whole)


def test_batch_that_processes_cannot_share_is_refused(runs, tmp_path):
    done = runs.run("train.batch_size=33", "train.steps=2", f"run.dir={tmp_path / 'run'}", launcher="torchrun")
    assert done.returncode != 0
    assert done.stderr.count("error: train.batch_size=33 cannot be shared equally by 2 process(es)") == 1
    assert "use 32 or 34" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_to_torchrun_leaves_a_checkpoint(runs, tmp_path):
    run = tmp_path / "run"
    process = runs.start("train.steps=2000", "train.checkpoint_every=1000", f"run.dir={run}", launcher="torchrun")
    process.wait_until(lambda: len(steps_logged(run)) >= 3)
    process.end(signal.SIGTERM)
    assert "asked to stop" in process.output.read_text()
    assert checkpoints(run) == [steps_logged(run)[-1]]


SECOND_CANNOT_WRITE = """
import errno, os
from dino.training import checkpoint
original = checkpoint._write

def write(path, content):
    if os.environ["RANK"] == "1" and "step-00000004" in str(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    original(path, content)

checkpoint._write = write
"""


def test_what_one_process_cannot_write_is_told_by_its_own_reason(runs, tmp_path):
    run = tmp_path / "run"
    command = ("train.steps=4", "train.checkpoint_every=2", f"run.dir={run}")
    failed = runs.run(*command, launcher="two", before=SECOND_CANNOT_WRITE)
    assert failed.returncode != 0
    assert failed.stderr.count("error: ") == 1
    assert "step 4 could not be written (Read-only file system); " in failed.stderr
    assert checkpoints(run) == [2]
    runs.finish(*command, launcher="two")
    assert checkpoints(run) == [2, 4]
