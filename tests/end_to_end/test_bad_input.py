"""What is wrong with data, settings, disk or numbers ends a run with one message that names the fix and exit code 2."""

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
    return folder, [
        "data.kind=folder",
        f"data.root={folder}",
        "train.batch_size=15",
        "train.steps=3",
        f"run.dir={tmp_path / 'run'}",
    ]


CACHES = pytest.mark.parametrize("cache", [("data.cache=device",), ("data.cache=none", "data.workers=2")], ids=" ".join)


@CACHES
def test_few_unreadable_images_are_skipped_and_listed_with_the_reason(runs, mixed, tmp_path, cache):
    _, settings = mixed
    runs.finish(*settings, *cache, "data.max_unreadable=0.2")
    listed = dict(line.split("\t") for line in (tmp_path / "run" / "skipped.txt").read_text().splitlines())
    assert listed.keys() == {f"below/{name}" for name in BAD}
    for name, reason in BAD.items():
        assert reason in listed[f"below/{name}"]


@CACHES
def test_too_many_unreadable_images_end_the_run_until_they_are_mended(runs, mixed, tmp_path, cache):
    folder, settings = mixed
    settings = [*settings, *cache]
    message = error_of(runs.run(*settings))
    assert "data.max_unreadable=0.01" in message
    assert "of 45 images" in message
    assert any(f"below/{name}" in message and reason in message for name, reason in BAD.items())
    assert str(tmp_path / "run" / "skipped.txt") in message
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    for index, name in enumerate(BAD):
        shutil.copy(folder / f"image-{index:03d}.png", folder / "below" / name)
    runs.finish(*settings)  # as the message advises


def test_dry_run_lists_unreadable_images_of_any_name(runs, mixed, tmp_path):
    folder, settings = mixed
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("no image")
    done = runs.finish(*settings, "--dry-run", "data.max_unreadable=0.2", LC_ALL="C.UTF-8")
    assert "read 46 of 46 images, 6 unreadable" in done.stdout
    for name, reason in BAD.items():
        assert any(name in line and reason in line for line in done.stdout.splitlines())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def refused(runs, tmp_path_factory):
    """Starts that cannot work, by name: the finished process and what it left."""
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
    small = ["data.kind=folder", "train.batch_size=10", "train.steps=3"]
    commands = {
        "names": [
            "train.batchsize=3",
            "optim.learning_rate=1",
            "train.batch_size=many",
            "model.registers=1.5",
            "model.drop_path=high",
            "optim.decay_tokens=perhaps",
        ],
        "impossible": [
            "views.local_size=2",
            "views.global_size=10",
            "model.arch=vit_smal",
            "data.max_unreadable=2",
            "train.accumulation=3",
            "objective.student_temperature=0",
            "views.local_scale=[0.5,0.1]",
            "model.drop_path=1",
        ],
        "unbuildable": [
            "train.seed=-1",
            "model.num_heads=3",
            "model.depth=0",
            "optim.betas=[0.9]",
            "views.std=[0]",
            "optim.clip_grad=-1",
        ],
        "channels": ["views.mean=[0.5,0.5]"],
        "yaml": ["--config", folder / "bad.yaml"],
        "batch": ["train.batch_size=1800"],
        "empty": [*small, f"data.root={folder / 'empty'}"],
        "missing": [*small, f"data.root={folder / 'nowhere'}"],
        "broken": [*small, "data.cache=none", "data.workers=1", f"data.root={folder / 'broken'}"],
        "broken_cached": [*small, "data.cache=device", f"data.root={folder / 'broken'}"],
        "augmentation": ["views.augment={solarise: 0.2}"],
        "dry": [*small, "--dry-run", f"data.root={folder / 'bad'}"],
        "tracker": ["tracking.backends=[wandbb]"],
        "file": [f"run.dir={folder / 'file'}"],
        "below": [f"run.dir={folder / 'file' / 'run'}"],
    }
    done = runs.together(
        {name: ["train.steps=2", f"run.dir={folder / f'run-{name}'}", *rest] for name, rest in commands.items()}
    )
    return {name: (done[name], folder / f"run-{name}") for name in commands}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("names", ["unknown key 'train.batchsize'; did you mean 'train.batch_size'?"]),
        ("names", ["unknown key 'optim.learning_rate'"]),
        ("names", ["train.batch_size must be a whole number, got 'many'", "model.registers must be a whole number"]),
        ("names", ["model.drop_path must be a number, got 'high'", "optim.decay_tokens must be true or false"]),
        ("impossible", ["views.local_size=2 is smaller than one patch (model.patch_size=4)"]),
        ("impossible", ["views.global_size=10 is not divisible by model.patch_size=4: use 8 or 12"]),
        ("impossible", ["model.arch must be one of", "did you mean 'vit_small'?"]),
        ("impossible", ["data.max_unreadable", "objective.student_temperature", "views.local_scale", "drop_path"]),
        ("impossible", ["train.batch_size=32", "train.accumulation=3"]),
        ("unbuildable", ["train.seed", "model.num_heads", "model.depth", "optim.betas", "views.std", "clip_grad"]),
        ("channels", ["views.mean", "channel", "have 1"]),
        ("yaml", ["bad.yaml", "line"]),
        ("batch", ["train.batch_size=1800", "1797"]),
        ("empty", ["no image in", "empty", ".webp"]),
        ("missing", ["nowhere", "does not exist"]),
        ("broken", ["no image of 20 can be read", "no image of a format"]),
        ("broken_cached", ["no image of 20 can be read", "no image of a format"]),
        ("augmentation", ["views.augment", "'solarise'", "did you mean 'solarize'?"]),
        ("dry", ["data.max_unreadable", "cannot be read"]),
        ("tracker", ["unknown tracker 'wandbb'", "wandb"]),
        ("file", ["run.dir="]),
        ("below", ["run.dir=", "cannot be written"]),
    ],
)
def test_refused_with_a_message_that_names_the_fix(refused, name, said):
    done, _ = refused[name]
    message = error_of(done)
    for words in said:
        assert words in message


def test_refused_before_anything_is_written(refused):
    for name, (_, run) in refused.items():
        assert not run.exists() or name.startswith("broken"), f"{name} left {list(run.iterdir())}"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_run_directory_that_cannot_be_written(runs, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in error_of(runs.run("train.steps=2", f"run.dir={tmp_path / 'run'}"))


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
        for name, tensor in load_file(path).items():
            assert tensor.isfinite().all(), f"{name} in {path}"


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
    runs.finish(*settings, "train.steps=4")
    before = contents(run)
    sizes = sorted(path.stat().st_size for path in run.glob("checkpoints/step-00000004/*"))
    assert all(small < large for small, large in pairwise(sizes[-2:]))
    message = error_of(runs.run(*settings, "train.steps=8", largest_file=sizes[-1] - 1))
    assert "checkpoint of step 6 could not be written" in message
    assert "step-00000004 is whole" in message
    assert "start the same command again" in message
    assert checkpoints(run) == [2, 4]
    after = contents(run)
    for name in before.keys() - {"config.yaml", "metrics.jsonl"}:
        assert after[name] == before[name], name
    assert {name for name in after if name.startswith("checkpoints")} <= before.keys(), "a part was left"
    done = runs.finish(*settings, "train.steps=8")
    assert "going on from step 4\n" in done.stdout
    assert checkpoints(run) == [4, 6, 8]


def test_disk_that_is_full_between_checkpoints(runs, tmp_path):
    settings = ["train.steps=40", "train.checkpoint_every=40", f"run.dir={tmp_path / 'run'}"]
    message = error_of(runs.run(*settings, largest_file=6000))
    assert "cannot be written" in message
    assert "start the same command again" in message


def test_precision_that_contradicts_the_launcher(runs, tmp_path):
    settings = ["train.steps=2", "train.precision=fp32", f"run.dir={tmp_path / 'run'}"]
    message = error_of(runs.run(*settings, ACCELERATE_MIXED_PRECISION="bf16"))
    assert "train.precision=fp32" in message
    assert "--mixed_precision bf16" in message
    assert not (tmp_path / "run").exists()


def test_bf16_trains_on_a_cpu(runs, tmp_path):
    commands = {
        kind: ["train.steps=3", f"train.precision={kind}", f"run.dir={tmp_path / kind}"] for kind in ("fp32", "bf16")
    }
    for kind, done in runs.together(commands).items():
        assert done.returncode == 0, done.stderr
        assert f"CPU, 1 threads, {kind}" in done.stdout
    first, wanted = losses(tmp_path / "bf16")[0], losses(tmp_path / "fp32")[0]
    assert first == pytest.approx(wanted, rel=0.02)
    assert first != wanted
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "backbone.safetensors").values()}
    assert kinds == {torch.float32}
