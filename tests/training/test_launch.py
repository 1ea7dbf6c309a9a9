"""Precision follows the launcher, contradictions are refused, and a batch is shared equally or not at all."""

from collections import OrderedDict

import pytest
import torch

from dino.config.schema import Config
from dino.distributed import local_processes
from dino.errors import UserError
from dino.training import launch
from dino.training.launch import choose_precision, seed_process, set_threads_and_seed, start

TABLE = [  # wanted, launcher, accelerator, precision
    ("auto", None, False, "fp32"),
    ("auto", None, True, "bf16"),
    ("auto", "no", False, "fp32"),
    ("auto", "no", True, "bf16"),
    ("auto", "bf16", False, "bf16"),
    ("auto", "bf16", True, "bf16"),
    ("auto", "fp16", True, "fp16"),
    ("fp32", None, True, "fp32"),
    ("fp32", "no", True, "fp32"),
    ("fp32", None, False, "fp32"),
    ("bf16", None, False, "bf16"),
    ("bf16", "no", True, "bf16"),
    ("bf16", "bf16", True, "bf16"),
    ("fp16", None, True, "fp16"),
    ("fp16", "fp16", True, "fp16"),
]


class TestPrecision:
    @pytest.mark.parametrize(("wanted", "launcher", "accelerator", "precision"), TABLE)
    def test_table(self, wanted, launcher, accelerator, precision):
        assert choose_precision(wanted, launcher, accelerator) == precision

    @pytest.mark.parametrize(
        ("wanted", "launcher"),
        [("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp16"), ("fp16", "bf16"), ("bf16", "fp8")],
    )
    @pytest.mark.parametrize("accelerator", [True, False])
    def test_a_contradiction_is_refused_naming_both(self, wanted, launcher, accelerator):
        with pytest.raises(UserError, match=rf"train\.precision={wanted}.*--mixed_precision {launcher}"):
            choose_precision(wanted, launcher, accelerator)

    @pytest.mark.parametrize(("wanted", "launcher"), [("fp16", None), ("fp16", "no"), ("auto", "fp16")])
    def test_fp16_needs_a_gpu(self, wanted, launcher):
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            choose_precision(wanted, launcher, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
class TestStart:
    @pytest.fixture(autouse=True)
    def _fresh(self, fresh_accelerate, tmp_path):
        self.config = Config()
        self.config.run.dir = str(tmp_path / "run")

    def test_on_a_cpu(self):
        accelerator = start(self.config)
        assert accelerator.device.type == "cpu"
        assert accelerator.mixed_precision == "no"
        assert accelerator.num_processes == 1

    @pytest.mark.parametrize(("batch", "accumulation", "ways"), [(10, 4, "8 or 12"), (3, 4, "4 or 8")])
    def test_a_batch_that_cannot_be_shared(self, batch, accumulation, ways):
        self.config.train.batch_size, self.config.train.accumulation = batch, accumulation
        with pytest.raises(UserError, match=rf"batch_size={batch} .* use {ways}"):
            start(self.config)

    def test_an_unknown_tracker(self):
        self.config.tracking.backends = ["wandbb"]
        with pytest.raises(UserError, match=r"unknown tracker 'wandbb'.*wandb"):
            start(self.config)

    def test_a_tracker_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
        self.config.tracking.backends = ["wandb"]
        with pytest.raises(UserError, match=r"pip install wandb"):
            start(self.config)

    def test_writes_nothing(self, tmp_path):
        start(self.config)
        assert list(tmp_path.iterdir()) == []


class TestSeeds:
    def test_weights_have_the_same_seed_in_every_process(self):
        config = Config()
        config.train.cpu_threads = torch.get_num_threads()
        draws = []
        for _ in range(2):
            set_threads_and_seed(config)
            draws.append(torch.rand(3))
        assert torch.equal(*draws)
        config.train.seed = 1
        set_threads_and_seed(config)
        assert not torch.equal(torch.rand(3), draws[0])

    def test_stochastic_depth_has_another_in_each(self):
        draws = {}
        for seed in range(3):
            for process in range(4):
                seed_process(seed, process)
                draws[seed, process] = tuple(torch.rand(3).tolist())
        assert len(set(draws.values())) == len(draws)
        seed_process(1, 2)
        assert tuple(torch.rand(3).tolist()) == draws[1, 2]

    def test_threads_are_set(self):
        before, config = torch.get_num_threads(), Config()
        try:
            config.train.cpu_threads = 2
            set_threads_and_seed(config)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(("value", "processes"), [(None, 1), ("4", 4)])
def test_local_processes(value, processes, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert local_processes() == processes


def test_statistics_of_batches_are_taken_over_gpus_only(monkeypatch):
    """SyncBatchNorm has no CPU kernel."""

    class Two:
        num_processes, device = 2, torch.device("cpu")

    network = torch.nn.Sequential(OrderedDict(backbone=torch.nn.BatchNorm1d(2)))
    student, _ = launch.place(Two(), (network, network), Config().train)
    assert isinstance(student.backbone, torch.nn.BatchNorm1d)
