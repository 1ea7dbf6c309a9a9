"""What is wrong with data, settings, disk or numbers ends a run with one message that names the fix and exit code 2."""

import json
import os
import shutil
from itertools import pairwise

import pytest
import torch
from launching import checkpoints, contents, error_of, losses, metrics, write_images
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

GOOD = 40
BAD = {  # file name: a part of the reason
    "truncated.jpg": "truncated",
    "text.png": "no image of a format",
    "empty.png": "empty",
    "dot.png": "1×1 pixels",
    "moving.webp": "animated",
}


def write_bad_images(folder):
    picture = write_images(folder, 1, size=64, suffix=".jpg")[0]
    content = picture.read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    picture.unlink()
    (folder / "text.png").write_text("no image at all\n")
    (folder / "empty.png").touch()
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], duration=100)


@pytest.fixture
def mixed(tmp_path):
    """A folder of good images with five bad ones below it, and the settings to train on it for one epoch."""
    folder = tmp_path / "images"
    write_images(folder, GOOD)
    write_bad_images(folder / "below")
    data = ("data.kind=folder", f"data.root={folder}", "train.batch_size=15", "train.steps=3")
    return folder, [*data, f"run.dir={tmp_path / 'run'}"]


CACHES = pytest.mark.parametrize("cache", [("data.cache=device",), ("data.cache=none", "data.workers=2")], ids=" ".join)


@CACHES
def test_few_unreadable_images_are_skipped_and_listed_with_the_reason(runs, mixed, tmp_path, cache):
    runs.finish(*mixed[1], *cache, "data.max_unreadable=0.2")
    listed = map(json.loads, (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    reasons = {entry["name"]: entry["reason"] for entry in listed}
    assert reasons.keys() == {f"below/{name}" for name in BAD}
    assert [name for name in BAD if BAD[name] not in reasons[f"below/{name}"]] == []


@CACHES
def test_too_many_unreadable_images_end_the_run_until_they_are_mended(runs, mixed, tmp_path, cache):
    folder, settings = mixed
    message = error_of(runs.run(*settings, *cache))
    assert "data.max_unreadable=0.01" in message
    assert "of 45 images" in message
    assert any(f"below/{name}" in message and reason in message for name, reason in BAD.items())
    assert str(tmp_path / "run" / "skipped.jsonl") in message
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    for index, name in enumerate(BAD):
        shutil.copy(folder / f"image-{index:03d}.png", folder / "below" / name)
    runs.finish(*settings, *cache)  # as the message advises


def test_dry_run_lists_unreadable_images_of_any_name(runs, mixed, tmp_path):
    folder, settings = mixed
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("no image")
    done = runs.finish(*settings, "--dry-run", "data.max_unreadable=0.2", launcher="python", LC_ALL="C.UTF-8")
    assert "read 46 of 46 images, 6 unreadable" in done.stdout
    for name, reason in BAD.items():
        assert any(name in line and reason in line for line in done.stdout.splitlines())
    assert not (tmp_path / "run").exists()


IMPOSSIBLE = (
    *("views.local_size=2", "views.global_size=10", "views.local_scale=[0.5,0.1]"),
    *("model.drop_path=1", "train.accumulation=3", "objective.student_temperature=0", "data.max_unreadable=2"),
)
SMALL = ("data.kind=folder", "train.batch_size=10", "train.steps=3")
REFUSED = {  # a start that cannot work, and what is said of it; {} is a folder that `folder` fills
    "names": (
        ("train.batchsize=3", "optim.learning_rate=1", "train.batch_size=many", "optim.decay_tokens=perhaps"),
        (
            *("4 settings cannot be used", "unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
            *("unknown key 'optim.learning_rate'", "train.batch_size must be a whole number, got 'many'"),
            "optim.decay_tokens must be true or false",
        ),
    ),
    "impossible": (
        IMPOSSIBLE,
        (
            "views.local_size=2 is smaller than one patch (model.patch_size=4)",
            "views.global_size=10 is not divisible by model.patch_size=4: use 8 or 12",
            *("train.batch_size=32", "train.accumulation=3"),
            *("data.max_unreadable", "objective.student_temperature", "views.local_scale", "drop_path"),
        ),
    ),
    "arch": (("model.arch=vit_smal",), ("model.arch must be one of", "did you mean 'vit_small'?")),
    "channels": (("views.mean=[0.5,0.5]",), ("views.mean", "channel", "have 1")),
    "yaml": (("--config", "{}/bad.yaml"), ("bad.yaml", "line")),
    "batch": (("train.batch_size=1800",), ("train.batch_size=1800", "1797")),
    "empty": ((*SMALL, "data.root={}/empty"), ("no image in", "empty", ".webp")),
    "missing": ((*SMALL, "data.root={}/nowhere"), ("nowhere", "does not exist")),
    "broken": (
        (*SMALL, "data.cache=none", "data.workers=1", "data.root={}/broken"),
        ("no image of 20 can be read", "no image of a format"),
    ),
    "broken_cached": (
        (*SMALL, "data.cache=device", "data.root={}/broken"),
        ("no image of 20 can be read", "no image of a format"),
    ),
    "dry": ((*SMALL, "--dry-run", "data.root={}/bad"), ("data.max_unreadable", "cannot be read")),
    "tracker": (("tracking.backends=[wandbb]",), ("unknown tracker 'wandbb'", "wandb")),
    "file": (("run.dir={}/file",), ("run.dir=",)),
    "below": (("run.dir={}/file/run",), ("in the way of the run", "name another run.dir")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    (folder / "empty").mkdir()
    (folder / "empty" / "readme.txt").write_text("no image here")
    (folder / "broken").mkdir()
    for index in range(20):
        (folder / "broken" / f"{index}.png").write_text("no image")
    write_images(folder / "bad", GOOD)
    write_bad_images(folder / "bad")
    (folder / "file").write_text("mine")
    (folder / "bad.yaml").write_text("train:\n  steps: [3\n")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message_that_names_the_fix_before_anything_is_written(runs, folder, name):
    words, said = REFUSED[name]
    run = folder / f"run-{name}"
    message = error_of(
        runs.run("train.steps=2", f"run.dir={run}", *(word.replace("{}", str(folder)) for word in words))
    )
    assert [part for part in said if part not in message] == []
    assert not run.exists() or name.startswith("broken")


BREAKS = ("optim.lr=1e30", "optim.clip_grad=0", "optim.warmup_steps=0", "objective.freeze_last_layer_steps=0")


def test_broken_loss_ends_the_run_and_reaches_no_checkpoint(runs, tmp_path):
    run = tmp_path / "run"
    settings = ("train.steps=30", "train.checkpoint_every=1", "data.cache=none", "data.workers=2", f"run.dir={run}")
    message = error_of(runs.run(*BREAKS, *settings))
    last = checkpoints(run)[-1]
    assert f"at step {last + 1} " in message
    assert "optim.lr" in message
    listed = (run / "broken_batch.txt").read_text().split()
    assert len(set(listed)) == 32
    assert listed[0] in message
    assert losses(run) == pytest.approx(losses(run))  # a NaN is not equal to itself
    assert [line["step"] for line in metrics(run)] == list(range(1, last + 1))
    for path in [run / "backbone.safetensors", *run.glob("checkpoints/*/*er.safetensors")]:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_broken_loss_counts_also_where_the_run_is_asked_to_stop(runs, tmp_path):
    """Between two log points nobody has looked at the loss yet: the checkpoint of a stop must not hide it."""
    run = tmp_path / "run"
    rare = ("train.steps=100000", "train.checkpoint_every=100000", "monitor.log_every=100000")
    message = error_of(runs.run(*BREAKS, *rare, "train.time_limit=0.02", f"run.dir={run}"))
    assert "is NaN or infinite at step" in message
    assert checkpoints(run) == []


def test_full_disk_leaves_the_checkpoint_before_whole(runs, tmp_path):
    run = tmp_path / "run"
    settings = ["train.checkpoint_every=2", "monitor.log_every=2", f"run.dir={run}"]
    runs.finish(*settings, "train.steps=4", page=True)
    before = contents(run)
    sizes = sorted(path.stat().st_size for path in run.glob("checkpoints/step-00000004/*"))
    assert all(small < large for small, large in pairwise(sizes[-2:]))
    message = error_of(runs.run(*settings, "train.steps=8", largest_file=sizes[-1] - 1))
    for part in ("checkpoint of step 6 could not be written", "step-00000004 is whole", "start the same command again"):
        assert part in message
    assert checkpoints(run) == [2, 4]
    after = contents(run)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"config.yaml", "metrics.jsonl"}
    assert {name for name in after if name.startswith("checkpoints")} <= before.keys(), "a part was left"
    assert "going on from step 4\n" in runs.finish(*settings, "train.steps=8").stdout
    assert checkpoints(run) == [4, 6, 8]


def test_disk_that_is_full_between_checkpoints(runs, tmp_path):
    settings = ["train.steps=40", "train.checkpoint_every=40", f"run.dir={tmp_path / 'run'}"]
    message = error_of(runs.run(*settings, largest_file=6000))
    assert "cannot be written" in message
    assert "start the same command again" in message


def test_bf16_trains_on_a_cpu(runs, tmp_path):
    for kind in ("fp32", "bf16"):
        done = runs.finish("train.steps=3", f"train.precision={kind}", f"run.dir={tmp_path / kind}")
        assert f"CPU, 1 threads, {kind}" in done.stdout
    first, reference = losses(tmp_path / "bf16")[0], losses(tmp_path / "fp32")[0]
    assert first == pytest.approx(reference, rel=0.02)
    assert first != reference
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "backbone.safetensors").values()}
    assert kinds == {torch.float32}
