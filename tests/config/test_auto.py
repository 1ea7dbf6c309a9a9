"""`auto` settings come out at the published values where something is published, each with its reason."""

import math

import pytest
import torch

from dino.config.auto import PoolFacts, keep_resolved, resolve
from dino.config.read import get, leaves
from dino.config.schema import AUTO, Config
from dino.errors import UserError
from dino.training.settings import load

IMAGENET = PoolFacts(images=1_281_167, channels=3, kind="folder", bytes=700_000_000_000)
OMNIGLOT = PoolFacts(images=19_280, channels=1, kind="omniglot")
FOLLOWS_LAUNCHER_OR_RUN = {"train.precision", "train.resume"}  # `auto` stays: it means something at every start
OF_THIS_MACHINE = ("data.workers", "train.cpu_threads")


def resolved(pool: PoolFacts, *settings: str) -> Config:
    return resolve(load(None, settings), pool)[0]


def keys_that_are(value: object, config: Config) -> set[str]:
    return {key for key in leaves(config) if get(config, key) == value}


PUBLISHED = {  # pool, settings, and what must come of them
    # The 300-epoch ViT-S/16 recipe at batch 1024 (reference/meta-systems.md §2a).
    "dino on imagenet": (
        IMAGENET,
        ("train.batch_size=1024", "train.epochs=300"),
        {
            "objective.prototypes": 65536,
            "objective.centering": "sinkhorn",
            "objective.teacher_momentum": pytest.approx(0.996, abs=1e-4),
            "objective.teacher_momentum_end": 1.0,
            "objective.teacher_temperature": 0.07,
            "objective.teacher_temperature_warmup": pytest.approx(30 * 1_281_167 / 1024, abs=1),
            "objective.freeze_last_layer_steps": pytest.approx(1_281_167 / 1024, abs=1),
            "train.steps": round(300 * 1_281_167 / 1024),
            "optim.lr": pytest.approx(1e-3 * 2**0.5, rel=1e-5),
            "optim.warmup_steps": pytest.approx(10 * 1_281_167 / 1024, abs=1),
            "views.mean": [0.485, 0.456, 0.406],
            "views.std": [0.229, 0.224, 0.225],
            "data.rebalance_every": 0,
        },
    ),
    # main_dino.py: 'we recommend setting a higher value with small batches: 0.9995 with batch size of 256'.
    "a small batch": (
        IMAGENET,
        ("train.batch_size=128",),
        {"optim.lr": pytest.approx(5e-4), "objective.teacher_momentum": pytest.approx(0.9995, abs=1e-4)},
    ),
    "batch 512": (IMAGENET, ("train.batch_size=512",), {"optim.lr": pytest.approx(1e-3)}),
    # facebookresearch/dino, README: 0.03 for a batch of 256, linear in it.
    "sgd": (IMAGENET, ("optim.name=sgd",), {"optim.lr": pytest.approx(0.03)}),
    "sgd at 4080": (IMAGENET, ("optim.name=sgd", "train.batch_size=4080"), {"optim.lr": pytest.approx(0.478125)}),
    "omniglot": (
        OMNIGLOT,
        ("train.batch_size=128", "train.epochs=50", "data.rebalance_every=auto"),
        {
            "data.kind": "omniglot",
            "data.channels": 1,
            "data.rebalance_every": 151,  # an epoch
            "objective.prototypes": 4096,
            "objective.centering": "sinkhorn",
            "objective.teacher_temperature": 0.04,
            "objective.teacher_momentum": pytest.approx(0.996, abs=1e-4),
            "objective.teacher_momentum_end": pytest.approx(0.996, abs=1e-4),
            "train.steps": round(50 * 19_280 / 128),
            "views.mean": [0.5],
            "views.std": [0.5],
        },
    ),
    # The best of the trials at 8 epochs (configs/README.md).
    "omniglot, a short run": (
        OMNIGLOT,
        ("train.batch_size=128", "train.epochs=8"),
        {"objective.prototypes": 4096, "objective.teacher_momentum": pytest.approx(0.99, abs=1e-3)},
    ),
    "giant": (IMAGENET, ("model.arch=vit_giant2",), {"model.ffn": "swiglu"}),
    "large": (IMAGENET, ("model.arch=vit_large",), {"model.ffn": "mlp"}),
    "five channels": (PoolFacts(1000, 5, "folder"), (), {"views.mean": [0.5] * 5, "views.std": [0.5] * 5}),
    "given and followed": (
        OMNIGLOT,
        ("train.steps=200", "objective.teacher_momentum=0.95", "objective.prototypes=77", "views.mean=[0.1]"),
        {
            "objective.teacher_momentum_end": 0.95,
            "objective.teacher_temperature_warmup": 20,
            "objective.prototypes": 77,
            "views.mean": [0.1],
            "train.steps": 200,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_those_published_or_given(name):
    pool, settings, values = PUBLISHED[name]
    config, reasons = resolve(load(None, settings), pool)
    assert {key: get(config, key) for key in values} == values
    given = {setting.split("=")[0] for setting in settings if not setting.endswith("=auto")}
    assert given.isdisjoint(reasons)


@pytest.mark.parametrize("images", [1, 2, 10, 1_797, 99_999, 100_000, 142_109_386])
@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_every_pool_gets_values_that_can_work(images, batch):
    if batch > images:
        return
    config = resolved(PoolFacts(images, 3, "folder"), f"train.batch_size={batch}")
    objective, tenth = config.objective, config.train.steps // 10
    assert 256 <= objective.prototypes <= 65536
    assert math.log2(objective.prototypes).is_integer()
    assert 0.9 <= objective.teacher_momentum < objective.teacher_momentum_end + 1e-12 <= 1 + 1e-12
    assert config.train.steps >= 1
    assert config.train.checkpoint_every >= 1
    warmups = (config.optim.warmup_steps, objective.teacher_temperature_warmup, objective.freeze_last_layer_steps)
    assert all(0 <= warmup <= tenth for warmup in warmups)


@pytest.mark.parametrize("steps", [100, 1000, 9_999, 10_000, 31_623, 99_999, 100_000, 500_000])
@pytest.mark.parametrize("images", [1_797, 19_280, 99_999, 100_000, 1_281_167])
def test_a_little_more_of_anything_changes_little(images, steps):
    """No data set and no run is small on one side of a line and large on the other."""
    here = resolved(PoolFacts(images, 3, "folder"), f"train.steps={steps}").objective
    more = PoolFacts(round(1.01 * images), 3, "folder")
    there = resolved(more, f"train.steps={round(1.01 * steps)}", "train.batch_size=259").objective
    assert there.centering == here.centering
    assert there.prototypes in (here.prototypes, 2 * here.prototypes)
    assert there.teacher_temperature == pytest.approx(here.teacher_temperature, abs=2e-4)
    memories = [1 / (1 - objective.teacher_momentum) for objective in (here, there)]
    assert memories[1] == pytest.approx(memories[0], rel=0.03)
    assert there.teacher_momentum_end == pytest.approx(here.teacher_momentum_end, abs=2e-4)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (5, 1), (500, 50), (100_000, 1000)])
def test_ten_checkpoints_a_run_but_never_over_1000_steps_apart(steps, every):
    assert resolved(IMAGENET, f"train.steps={steps}").train.checkpoint_every == every


@pytest.mark.parametrize("log_every", [1, 7, 10, 50, 300])
@pytest.mark.parametrize("steps", [1, 99, 1000, 3000, 100_000])
def test_health_is_looked_at_where_lines_are_written_a_hundred_times_a_run(log_every, steps):
    every = resolved(IMAGENET, f"train.steps={steps}", f"monitor.log_every={log_every}").monitor.health_every
    assert every % log_every == 0
    assert every == log_every or abs(every - min(100, steps / 100)) <= log_every / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
@pytest.mark.parametrize(
    ("decoded", "cache"), [(0, "device"), (2**30, "device"), (2**30 + 1, "none"), (700 * 2**30, "none")]
)
def test_images_stay_on_a_cpu_up_to_one_gibibyte(decoded, cache):
    config, reasons = resolve(Config(), PoolFacts(10_000, 3, "folder", decoded))
    assert config.data.cache == cache
    assert (config.data.workers == 0) == (cache == "device"), "nobody else is there to decode them"
    assert "MiB" in reasons["data.cache"]


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_processes_of_a_machine_share_its_cores_and_none_has_no_core(processes, monkeypatch):
    monkeypatch.setattr("dino.distributed.allowed_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    config = resolved(IMAGENET)
    assert config.train.cpu_threads == max(1, 16 // processes)
    assert config.data.workers >= 1


class TestResolving:
    def test_nothing_stays_auto_and_each_value_has_its_reason(self):
        config, reasons = resolve(Config(), IMAGENET)
        were_auto = keys_that_are(AUTO, Config()) - FOLLOWS_LAUNCHER_OR_RUN
        assert set(reasons) == were_auto | {"views.mean", "views.std"}
        assert all(reason.strip() for reason in reasons.values())
        assert keys_that_are(AUTO, config) == FOLLOWS_LAUNCHER_OR_RUN

    def test_resolving_again_changes_nothing_nor_is_the_config_given_changed(self):
        config = Config()
        once, _ = resolve(config, IMAGENET)
        assert config == Config()
        assert resolve(once, PoolFacts(images=5_000, channels=3, kind="zip")) == (once, {})

    @pytest.mark.parametrize("key", ["views.mean", "views.std"])
    def test_means_and_deviations_for_other_channels_are_refused(self, key):
        with pytest.raises(UserError, match=rf"{key}=.*these images have 1"):
            resolved(OMNIGLOT, f"{key}=[0.5, 0.5, 0.5]")

    def test_a_batch_larger_than_the_data_set_is_refused_with_both_numbers(self):
        with pytest.raises(UserError, match=r"train\.batch_size=256 .* 255 images: use at most 255"):
            resolved(PoolFacts(255, 3, "folder"))
        resolved(PoolFacts(256, 3, "folder"))


class TestResuming:
    """On resume, `auto` means what it meant at the first start, whatever the data and the machine are now."""

    def test_takes_over_what_was_resolved_except_what_is_of_this_machine(self):
        earlier = resolved(OMNIGLOT)
        earlier.train.cpu_threads, earlier.data.workers = 999, 998
        kept = keep_resolved(Config(), earlier)
        assert (kept.train.cpu_threads, kept.data.workers) == (AUTO, AUTO)
        config, _ = resolve(kept, PoolFacts(images=500_000, channels=1, kind="zip"))
        differing = {key for key in leaves(config) if get(config, key) != get(earlier, key)}
        assert differing == {*OF_THIS_MACHINE, "data.kind"}

    def test_what_is_given_now_counts(self):
        kept = keep_resolved(load(None, ["objective.prototypes=77", "train.steps=5"]), resolved(OMNIGLOT))
        assert (kept.objective.prototypes, kept.train.steps) == (77, 5)

    def test_more_epochs_are_more_steps(self):
        earlier = resolved(OMNIGLOT, "train.epochs=10")
        longer, _ = resolve(keep_resolved(load(None, ["train.epochs=20"]), earlier), OMNIGLOT)
        assert longer.train.steps == 2 * earlier.train.steps
        assert keep_resolved(load(None, ["train.epochs=10"]), earlier).train.steps == earlier.train.steps

    def test_neither_config_is_changed(self):
        config, earlier = Config(), resolved(OMNIGLOT)
        keep_resolved(config, earlier)
        assert (config, earlier) == (Config(), resolved(OMNIGLOT))
