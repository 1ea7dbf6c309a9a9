"""`auto` settings come out at the published values where something is published, each with its reason."""

import math

import pytest
import torch

from dino.config import auto
from dino.config.auto import PoolFacts, keep_resolved, resolve
from dino.config.read import assign, get, leaves
from dino.config.schema import AUTO, Config
from dino.errors import UserError

IMAGENET = PoolFacts(images=1_281_167, channels=3, kind="folder", bytes=700_000_000_000)
OMNIGLOT = PoolFacts(images=19_280, channels=1, kind="omniglot")
FOLLOWS_LAUNCHER_OR_RUN = {"train.precision", "train.resume"}  # `auto` stays: it means something at every start


def with_settings(**values) -> Config:
    config = Config()
    for key, value in values.items():
        assign(config, key.replace("__", "."), value)
    return config


class TestPublished:
    def test_dino_on_imagenet(self):
        """The 300-epoch ViT-S/16 recipe at batch 1024 (reference/meta-systems.md §2a)."""
        config, _ = resolve(with_settings(train__batch_size=1024, train__epochs=300.0), IMAGENET)
        assert config.objective.prototypes == 65536
        assert config.objective.centering == "centre"
        assert config.objective.teacher_momentum == pytest.approx(0.996, abs=1e-4)
        assert config.objective.teacher_momentum_end == 1.0
        assert config.objective.teacher_temperature == 0.07
        assert config.train.steps == round(300 * 1_281_167 / 1024)
        assert config.objective.teacher_temperature_warmup == pytest.approx(30 / 300 * config.train.steps, abs=1)
        assert config.optim.warmup_steps == pytest.approx(10 * 1_281_167 / 1024, abs=1)
        assert config.objective.freeze_last_layer_steps == pytest.approx(1_281_167 / 1024, abs=1)
        assert (config.views.mean, config.views.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def test_learning_rate_of_sgd_is_dinos_for_resnet50(self):
        """facebookresearch/dino, README: 0.03 for a batch of 256, linear in it."""
        for batch, rate in ((256, 0.03), (512, 0.06), (4080, 0.478125)):
            found = resolve(with_settings(optim__name="sgd", train__batch_size=batch), IMAGENET)[0].optim.lr
            assert found == pytest.approx(rate)

    def test_learning_rate_is_dinos_at_batch_512_and_grows_with_the_root(self):
        rates = {
            batch: resolve(with_settings(train__batch_size=batch), IMAGENET)[0].optim.lr for batch in (128, 512, 2048)
        }
        assert rates == {128: pytest.approx(5e-4), 512: pytest.approx(1e-3), 2048: pytest.approx(2e-3)}

    def test_momentum_advised_for_small_batches(self):
        """main_dino.py: 'we recommend setting a higher value with small batches: 0.9995 with batch size of 256'."""
        small = resolve(with_settings(train__batch_size=128), IMAGENET)[0].objective.teacher_momentum
        assert small == pytest.approx(0.9995, abs=1e-4)

    def test_omniglot(self):
        config, _ = resolve(with_settings(train__batch_size=128, train__epochs=50.0), OMNIGLOT)
        assert config.data.kind == "omniglot"
        assert config.data.channels == 1
        assert config.objective.prototypes == 1024
        assert config.objective.centering == "sinkhorn"
        assert config.objective.teacher_temperature == 0.04
        assert config.objective.teacher_momentum == pytest.approx(1 - 5 * 128 / 19_280, abs=1e-6)
        assert config.objective.teacher_momentum_end == config.objective.teacher_momentum
        assert config.train.steps == round(50 * 19_280 / 128)
        assert (config.views.mean, config.views.std) == ([0.5], [0.5])

    @pytest.mark.parametrize(("arch", "ffn"), [("vit_giant2", "swiglu"), ("vit_large", "mlp"), ("resnet50", "mlp")])
    def test_feed_forward_layer(self, arch, ffn):
        assert resolve(with_settings(model__arch=arch), IMAGENET)[0].model.ffn == ffn


class TestRange:
    @pytest.mark.parametrize("images", [1, 2, 10, 1_797, 99_999, 100_000, 142_109_386])
    @pytest.mark.parametrize("batch", [1, 64, 4096])
    def test_every_pool_gets_values_that_can_work(self, images, batch):
        if batch > images:
            return
        config, _ = resolve(with_settings(train__batch_size=batch), PoolFacts(images, 3, "folder"))
        prototypes = config.objective.prototypes
        assert isinstance(prototypes, int)
        assert 256 <= prototypes <= 65536
        assert math.log2(prototypes).is_integer()
        assert 0.9 <= config.objective.teacher_momentum < config.objective.teacher_momentum_end + 1e-12 <= 1 + 1e-12
        assert config.train.steps >= 1
        assert config.train.checkpoint_every >= 1
        for warmup in (
            config.optim.warmup_steps,
            config.objective.teacher_temperature_warmup,
            config.objective.freeze_last_layer_steps,
        ):
            assert 0 <= warmup <= config.train.steps // 10

    def test_rebalancing_once_an_epoch_if_at_all(self):
        assert (
            resolve(with_settings(data__rebalance_every=AUTO, train__batch_size=128), OMNIGLOT)[0].data.rebalance_every
            == 151
        )
        assert resolve(Config(), OMNIGLOT)[0].data.rebalance_every == 0

    def test_unusual_numbers_of_channels(self):
        config, _ = resolve(Config(), PoolFacts(1000, 5, "folder"))
        assert (config.views.mean, config.views.std) == ([0.5] * 5, [0.5] * 5)

    def test_ten_checkpoints_a_run_but_never_over_1000_steps_apart(self):
        for steps, every in [(1, 1), (5, 1), (500, 50), (100_000, 1000)]:
            assert resolve(with_settings(train__steps=steps), IMAGENET)[0].train.checkpoint_every == every

    @pytest.mark.parametrize("log_every", [1, 7, 10, 50, 300])
    @pytest.mark.parametrize("steps", [1, 99, 1000, 3000, 100_000])
    def test_health_is_looked_at_where_lines_are_written_a_hundred_times_a_run(self, log_every, steps):
        every = resolve(with_settings(train__steps=steps, monitor__log_every=log_every), IMAGENET)[
            0
        ].monitor.health_every
        assert every % log_every == 0
        assert every == log_every or abs(every - min(100, steps / 100)) <= log_every / 2

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
    @pytest.mark.parametrize(
        ("decoded", "cache"), [(0, "device"), (2**30, "device"), (2**30 + 1, "none"), (700 * 2**30, "none")]
    )
    def test_images_stay_on_a_cpu_up_to_one_gibibyte(self, decoded, cache):
        pool = PoolFacts(10_000, 3, "folder", decoded)
        config, reasons = resolve(Config(), pool)
        assert config.data.cache == cache
        assert (config.data.workers == 0) == (cache == "device"), "nobody else is there to decode them"
        assert "MiB" in reasons["data.cache"]

    @pytest.mark.parametrize("processes", [1, 2, 8, 64])
    def test_threads_share_the_cores_and_are_never_none(self, processes, monkeypatch):
        monkeypatch.setattr(auto.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
        config, _ = resolve(Config(), IMAGENET, processes)
        assert config.train.cpu_threads == max(1, 16 // processes)
        assert config.data.workers >= 1


class TestResolving:
    def test_nothing_stays_auto_and_each_value_has_its_reason(self):
        config, reasons = resolve(Config(), IMAGENET)
        was_auto = {key for key, _ in leaves() if get(Config(), key) == AUTO} - FOLLOWS_LAUNCHER_OR_RUN
        assert set(reasons) == was_auto | {"views.mean", "views.std"}
        assert all(reason.strip() for reason in reasons.values())
        assert {key for key, _ in leaves() if get(config, key) == AUTO} == FOLLOWS_LAUNCHER_OR_RUN

    def test_values_given_are_kept(self):
        given = with_settings(objective__prototypes=77, optim__lr=0.5, views__mean=[0.1, 0.2, 0.3], train__steps=12)
        config, reasons = resolve(given, IMAGENET)
        for key in ("objective.prototypes", "optim.lr", "views.mean", "train.steps"):
            assert get(config, key) == get(given, key)
            assert key not in reasons

    def test_later_rules_follow_what_was_given(self):
        config, _ = resolve(with_settings(train__steps=200, objective__momentum=0.95), OMNIGLOT)
        assert config.objective.teacher_momentum_end == 0.95
        assert config.objective.teacher_temperature_warmup == 20

    def test_the_config_given_is_not_changed(self):
        config = Config()
        resolve(config, IMAGENET)
        assert config == Config()

    def test_resolving_again_changes_nothing(self):
        once, _ = resolve(Config(), IMAGENET)
        twice, reasons = resolve(once, PoolFacts(images=5_000, channels=3, kind="zip"))
        assert twice == once
        assert reasons == {}

    @pytest.mark.parametrize("key", ["views.mean", "views.std"])
    def test_means_and_deviations_for_other_channels_are_refused(self, key):
        config = Config()
        assign(config, key, [0.5, 0.5, 0.5])
        with pytest.raises(UserError, match=rf"{key}=.*these images have 1"):
            resolve(config, OMNIGLOT)

    def test_a_batch_larger_than_the_data_set_is_refused_with_both_numbers(self):
        with pytest.raises(UserError, match=r"train\.batch_size=256 .* 255 images: use at most 255"):
            resolve(Config(), PoolFacts(255, 3, "folder"))
        resolve(Config(), PoolFacts(256, 3, "folder"))


class TestResuming:
    """On resume, `auto` means what it meant at the first start, whatever the data and the machine are now."""

    def earlier(self, **values) -> Config:
        return resolve(with_settings(**values), OMNIGLOT)[0]

    def test_takes_over_what_was_resolved(self):
        earlier = self.earlier()
        config, _ = resolve(keep_resolved(Config(), earlier), PoolFacts(images=500_000, channels=1, kind="zip"))
        for key, _ in leaves():
            if not key.startswith(("data.workers", "train.cpu_threads")):
                assert get(config, key) == get(earlier, key), key

    def test_what_is_given_now_counts(self):
        kept = keep_resolved(with_settings(objective__prototypes=77, train__steps=5), self.earlier())
        assert kept.objective.prototypes == 77
        assert kept.train.steps == 5

    def test_threads_and_workers_are_those_of_this_machine(self):
        earlier = self.earlier()
        earlier.train.cpu_threads, earlier.data.workers = 999, 998
        kept = keep_resolved(Config(), earlier)
        assert (kept.train.cpu_threads, kept.data.workers) == (AUTO, AUTO)

    def test_more_epochs_are_more_steps(self):
        earlier = self.earlier(train__epochs=10.0)
        longer, _ = resolve(keep_resolved(with_settings(train__epochs=20.0), earlier), OMNIGLOT)
        assert longer.train.steps == 2 * earlier.train.steps
        assert keep_resolved(with_settings(train__epochs=10.0), earlier).train.steps == earlier.train.steps

    def test_neither_config_is_changed(self):
        config, earlier = Config(), self.earlier()
        keep_resolved(config, earlier)
        assert config == Config()
        assert earlier == self.earlier()
