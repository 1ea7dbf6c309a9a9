"""Sharded runs: the curves of whole ones, checkpoints for any number of processes, the same bytes when resumed."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from launching import REPOSITORY, backbone, checkpoint, checkpoints, copy_run, error_of, metrics, steps_logged

import dino
from dino.seal import Damaged, verified

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = (
    *(f"train.steps={STEPS}", "train.checkpoint_every=4", "model.drop_path=0", "model.registers=2"),
    "optim.lr=0.001",  # at 0.003 rounding decides, on some processors, which of two neighbours is KoLeo's nearest
    *("optim.clip_scope=module", "objective.centering=sinkhorn", "objective.ibot_weight=1"),
    *("objective.ibot_head=separate", "objective.koleo_weight=0.1", "objective.koleo_scope=all"),
)
SHARDED = (*SETTINGS, "train.fsdp=true")
LOSSES = ("loss/dino", "loss/ibot", "loss/koleo")


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory):
    """Finished runs by name: (run directory, process)."""
    folder = tmp_path_factory.mktemp("sharded")
    commands = {
        "alone": SETTINGS,
        "sharded": SHARDED,
        "recomputed": (*SHARDED, "train.activation_checkpointing=true"),
        "random": (*SHARDED, "model.drop_path=0.3", "model.drop_path_kind=subset"),
    }
    commands = {name: (*settings, f"run.dir={folder / name}") for name, settings in commands.items()}
    finished = runs.together(commands, page=True, sharded="two", recomputed="two", random="two")
    return {name: (folder / name, process) for name, process in finished.items()}


def assert_same_curves(run, reference):
    assert steps_logged(run) == list(range(1, STEPS + 1))
    for line, wanted in zip(metrics(run), metrics(reference), strict=True):
        for name in LOSSES:
            assert line[name] == pytest.approx(wanted[name], rel=1e-3), f"{name} of step {line['step']}"


def test_the_curves_compared_here_move(done):
    for name in LOSSES:
        values = [line[name] for line in metrics(done["alone"][0])]
        assert max(values) - min(values) > 10 * 1e-3 * max(values)


@pytest.mark.parametrize("name", ["sharded", "recomputed"])
def test_a_sharded_run_gives_the_curves_of_one_process(done, name):
    assert "sharded over 2 processes" in done[name][1].stdout
    assert "sharded" not in done["alone"][1].stdout.split("checkpoints")[0]
    assert_same_curves(done[name][0], done["alone"][0])


def test_two_processes_then_one_then_two(runs, done, tmp_path):
    run = copy_run(done["sharded"][0], tmp_path / "run", 4)
    alone = runs.finish(*SHARDED, "train.time_limit=1000", f"run.dir={run}")
    assert "going on from step 4\n" in alone.stdout
    assert "1 process(es)" in alone.stdout
    assert "sharded over" not in alone.stdout
    run = copy_run(run, tmp_path / "again", 8)
    both = runs.finish(*SHARDED, f"run.dir={run}", launcher="two")
    assert "going on from step 8\n" in both.stdout
    assert "sharded over 2 processes" in both.stdout
    assert_same_curves(run, done["alone"][0])


def test_a_sharded_run_resumes_bit_identically(runs, done, tmp_path):
    whole, _ = done["random"]
    run = copy_run(whole, tmp_path / "run", 8)
    settings = (*SHARDED, "model.drop_path=0.3", "model.drop_path_kind=subset")
    runs.finish(*settings, f"run.dir={run}", launcher="two")
    assert checkpoints(run) == [8, 12]
    assert backbone(run) == backbone(whole)
    names = ("student", "teacher", "optimizer")
    files = [[(checkpoint(path, 12) / f"{name}.safetensors").read_bytes() for name in names] for path in (run, whole)]
    assert files[0] == files[1]


def test_its_checkpoints_are_sealed(done, tmp_path):
    run = copy_run(done["sharded"][0], tmp_path / "run", 8)
    assert verified(checkpoint(run, 8))["step"] == 8
    damaged = checkpoint(run, 8) / "teacher.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(Damaged, match=r"teacher\.safetensors has changed since it was written"):
        verified(checkpoint(run, 8))


def test_its_backbone_is_whole_and_its_page_written(done):
    sharded, alone = done["sharded"][0], done["alone"][0]
    assert dino.load_backbone(sharded).state_dict().keys() == dino.load_backbone(alone).state_dict().keys()
    pictures = [(run / "report.html").read_text().count("<img") for run in (sharded, alone)]
    assert pictures[0] == pictures[1] > 0


def test_fp16_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused = runs.run(*SHARDED, "train.precision=fp16", f"run.dir={tmp_path / 'run'}")
    assert "train.fsdp cannot watch fp16 gradients for overflow" in error_of(refused)


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("eight_gpus", 8), ("nodes", 64)])
def test_launch_files_are_accelerates(name, processes):
    settings = load_config_from_file(str(REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"))
    assert (settings.mixed_precision, settings.num_processes, settings.use_cpu) == ("bf16", processes, False)
