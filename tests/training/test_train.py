"""`dino.train` in this process: a method written here trains, stops and goes on; the program gets its state back."""

import signal
from dataclasses import dataclass

import pytest
import torch
from builders import differing, weights
from torch import Tensor, nn

import dino
from dino.config.schema import Config, setting
from dino.methods import Batch, Curve, Method, Seen
from dino.methods.network import Network
from dino.models import Backbone, build_backbone
from dino.report.run import Reporter

SETTINGS = {
    "data.kind": "digits",
    "data.workers": 0,
    "views.preset": "line_art",
    "views.global_size": 8,
    "views.local_size": 4,
    "views.local_crops": 1,
    "model.arch": "vit_tiny",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "optim.lr": 0.01,
    "optim.lr_end": 0.01,
    "optim.warmup_steps": 0,
    "optim.weight_decay_end": 0.04,  # rates that do not depend on the number of steps
    "train.batch_size": 64,
    "train.cpu_threads": 1,
    "train.checkpoint_every": 100,
    "monitor.log_every": 2,
    "monitor.health_every": 2,
}


def no_page(*_: object, **__: object) -> dict[str, bytes]:
    """In place of a report, which costs more than these runs."""
    return {}


@pytest.fixture
def toy() -> str:
    """The name of a method that is made here."""

    class Toy(Method):
        """Two views of an image are to have like logits, far from nought."""

        @dataclass
        class Settings:
            name: str = setting("toy", "method of learning")
            outputs: int = setting(4, "outputs of the head", low=1)

        def __init__(self, config: Config, initial: Backbone | None = None, outside: None = None):
            super().__init__(config, initial, outside)
            backbone = initial or build_backbone(config)
            self.student = self.result = Network(backbone, nn.Linear(backbone.embed_dim, config.objective.outputs))

        def losses(self, batch: Batch, target: None) -> dict[str, Tensor]:
            with self.autocast():
                output = self.forward(batch.crops)
            images = len(batch.rows)
            self.seen = Seen(output.tokens.detach()[: 2 * images].unflatten(0, (2, images)))
            first, second, *_ = output.logits.float().split(images)
            apart, length = (first - second).square().mean(), first.square().mean()
            return {"loss/toy": apart, "loss/length": (length - 1).square()}

        @classmethod
        def watched(cls, config: Config) -> dict[str, Curve]:
            return {"loss/toy": Curve("likeness of two views"), "loss/length": Curve("length")}

    return "toy"


def test_a_method_of_thirty_lines_trains_stops_and_goes_on(toy, fresh_accelerate, tmp_path, capsys, monkeypatch):
    """As if it had never stopped, bit by bit; metrics, verdict and report have its losses by their names."""

    def train(name: str, steps: int) -> dino.Run:
        settings = SETTINGS | {"objective.name": toy, "objective.outputs": 3, "train.steps": steps}
        return dino.train(run=tmp_path / name, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "write", no_page)
        whole = train("whole", 6)
        train("stopped", 2)
    monkeypatch.setattr(Reporter, "is_due", lambda _: False)  # one page, at the end, is enough
    resumed = train("stopped", 6)
    assert "going on from step 2" in capsys.readouterr().out
    assert differing(weights(resumed.backbone), weights(whole.backbone)) == set()
    assert [line["step"] for line in resumed.metrics] == [2, 4, 6]
    for line, expected in zip(resumed.metrics, whole.metrics, strict=True):
        assert line.keys() == expected.keys() > {"health/feature_std", "health/knn", "health/verdict"}
        for name in ("loss/toy", "loss/length", "optim/lr", "health/gradient_norm"):
            assert line[name] == expected[name]
    assert resumed.metrics[-1]["loss/length"] < resumed.metrics[0]["loss/length"]
    assert resumed.verdict == resumed.metrics[-1]["health/verdict"]
    page = resumed.report.read_text()
    assert "toy" in page
    assert "finished" in page
    assert resumed.config.objective.outputs == 3
    checkpoints = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints" / "step-00000006").iterdir())
    tensors = [f"{name}.safetensors" for name in ("health-0", "optimizer", "random-0", "student")]
    assert checkpoints == sorted([*tensors, "state.json"])


def test_a_methods_settings_are_its_own(toy, fresh_accelerate, tmp_path):
    with pytest.raises(dino.UserError, match=r"unknown key 'objective\.prototypes'"):
        dino.train(run=tmp_path / "run", **SETTINGS | {"objective.name": toy, "objective.prototypes": 12})
    with pytest.raises(dino.UserError, match=r"objective\.outputs must be at least 1, got 0"):
        dino.train(run=tmp_path / "run", **SETTINGS | {"objective.name": toy, "objective.outputs": 0})
    assert not (tmp_path / "run").exists()


def test_runs_in_one_process_leave_nothing_behind(toy, fresh_accelerate, tmp_path, monkeypatch):
    """Not to the program (signal handlers, threads, random state), nor to one another: precision, random weights.

    Also where weights are read to begin with.
    """
    monkeypatch.setattr(Reporter, "write", no_page)
    threads = torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    results: list = []
    for index, precision in enumerate(("fp32", "bf16", "fp32")):
        changes = {
            "objective.name": toy,
            "train.steps": 2,
            "train.precision": precision,
            "train.cpu_threads": threads + 1,
        }
        if index == 1:
            changes["model.init"] = str(tmp_path / "0")
        random = torch.get_rng_state()
        run = dino.train(run=tmp_path / str(index), **SETTINGS | changes)
        assert run.config.train.precision == precision
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), random)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        results.append(weights(run.backbone))
    assert differing(results[0], results[2]) == set()
    assert differing(results[0], results[1])
