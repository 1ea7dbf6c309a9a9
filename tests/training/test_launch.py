"""Precision follows the launcher, contradictions are refused, and a batch is shared equally or not at all."""

from types import SimpleNamespace

import pytest
import torch

from dino import precision
from dino.config.schema import Config, TrainConfig
from dino.errors import UserError
from dino.methods.network import Network
from dino.models import ResNet, ResNetSpec
from dino.training.launch import (
    choose_precision,
    place,
    precision_of,
    process_state_kept,
    seed_process,
    set_process_state,
    start,
)

TABLE = [  # asked for, launcher, accelerator, precision
    ("auto", None, False, "fp32"),
    ("auto", None, True, "bf16"),
    ("auto", "no", False, "fp32"),
    ("auto", "no", True, "bf16"),
    ("auto", "bf16", False, "bf16"),
    ("auto", "fp16", True, "fp16"),
    ("fp32", None, True, "fp32"),
    ("fp32", "no", False, "fp32"),
    ("bf16", None, False, "bf16"),
    ("bf16", "no", True, "bf16"),
    ("bf16", "bf16", True, "bf16"),
    ("fp16", None, True, "fp16"),
    ("fp16", "fp16", True, "fp16"),
    ("fastest", None, False, "fp32"),  # of a processor without units for bf16, as conftest has it
    ("fastest", "bf16", False, "bf16"),
    ("fastest", "fp16", True, "fp16"),
]
BOTH = r"train\.precision={}.*--mixed_precision {}"
REFUSED = [
    *[(asked, launched, BOTH.format(asked, launched)) for asked in ("fp32", "bf16") for launched in ("fp16", "fp8")],
    ("fp16", "bf16", BOTH.format("fp16", "bf16")),
    *[(asked, launched, "fp16 needs a GPU") for asked, launched in (("fp16", None), ("fp16", "no"), ("auto", "fp16"))],
]


@pytest.mark.parametrize(("asked", "launcher", "has_accelerator", "expected"), TABLE)
def test_precision(asked, launcher, has_accelerator, expected):
    assert choose_precision(asked, launcher, has_accelerator) == expected


def test_the_fastest_precision_is_bf16_where_there_are_units_for_it(monkeypatch):
    monkeypatch.setattr(precision, "prefers_bf16", lambda device: True)
    assert choose_precision("fastest", None, False) == "bf16"


@pytest.mark.parametrize(("asked", "launcher", "said"), REFUSED)
def test_a_precision_that_cannot_be_is_refused(asked, launcher, said):
    with pytest.raises(UserError, match=said):
        choose_precision(asked, launcher, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
class TestStart:
    @pytest.fixture(autouse=True)
    def _fresh(self, fresh_accelerate, tmp_path):
        self.config = Config()
        self.config.run.dir = str(tmp_path / "run")

    def test_on_a_cpu(self, tmp_path):
        accelerator = start(self.config)
        assert (accelerator.device.type, accelerator.num_processes) == ("cpu", 1)
        assert precision_of(accelerator) == "fp32"
        assert list(tmp_path.iterdir()) == []

    def test_a_start_in_the_same_process_may_have_another_precision(self):
        for asked in ("bf16", "fp32", "bf16"):
            self.config.train.precision = asked
            assert precision_of(start(self.config)) == asked

    @pytest.mark.parametrize(("batch", "accumulation", "ways"), [(10, 4, "8 or 12"), (3, 4, "4 or 8")])
    def test_a_batch_that_cannot_be_shared(self, batch, accumulation, ways):
        self.config.train.batch_size, self.config.train.accumulation = batch, accumulation
        with pytest.raises(UserError, match=rf"batch_size={batch} .* use {ways}"):
            start(self.config)

    def test_trackers_that_are_unknown_or_not_installed(self, monkeypatch):
        self.config.tracking.backends = ["wandbb"]
        with pytest.raises(UserError, match=r"unknown tracker 'wandbb'.*wandb"):
            start(self.config)
        monkeypatch.setattr("dino.tracking.trackers.get_available_trackers", list)
        self.config.tracking.backends = ["wandb"]
        with pytest.raises(UserError, match=r"pip install wandb"):
            start(self.config)


def test_weights_have_the_same_seed_in_every_process_and_the_program_its_own_state_back():
    """Also where a run fails."""

    @process_state_kept()
    def failing_run(seed: int) -> None:
        set_process_state(TrainConfig(cpu_threads=threads + 1, seed=seed))
        assert torch.get_num_threads() == threads + 1
        samples.append(torch.rand(3).tolist())
        raise UserError("the disk is full")

    samples: list = []
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    for seed in (0, 0, 1):
        with pytest.raises(UserError):
            failing_run(seed)
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), random)
    assert samples[0] == samples[1] != samples[2]


def test_stochastic_depth_has_another_seed_in_each():
    samples, before = {}, torch.get_rng_state()
    for seed in range(3):
        for process in range(4):
            seed_process(seed, process)
            samples[seed, process] = tuple(torch.rand(3).tolist())
    assert len(set(samples.values())) == len(samples)
    seed_process(1, 2)
    assert tuple(torch.rand(3).tolist()) == samples[1, 2]
    torch.set_rng_state(before)


def test_statistics_of_batches_are_taken_over_gpus_only():
    """SyncBatchNorm has no CPU kernel."""
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    network = Network(ResNet(ResNetSpec("resnet18")), torch.nn.Identity())
    place(two, SimpleNamespace(state=lambda: {"student": network}), TrainConfig())
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
