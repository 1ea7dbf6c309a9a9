"""Shared by all tests: the real data sets, an Accelerator of its own for each test, and a run small enough for one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from dino import precision
from dino.config.auto import PoolFacts, resolve
from dino.config.schema import Config
from dino.methods import METHODS
from dino.training.settings import load

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("DINO_TEST_DATA", REPOSITORY / "../shared/data"))


@pytest.fixture(scope="session")
def omniglot_zip() -> Path:
    """Omniglot's background set: 19,280 drawings."""
    return _present("omniglot_images_background.zip")


@pytest.fixture(scope="session")
def caltech_zip() -> Path:
    """Caltech-101: 8,677 photographs, shorter side at most 128."""
    return _present("caltech101_128px.zip")


def _present(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"needs the data in DINO_TEST_DATA: {name} is not there")
    return DATA / name


@pytest.fixture(autouse=True, scope="session")
def in_fp32() -> Iterator[None]:
    """Features are the same on every processor: none is taken to have units for bf16; forking.py does the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "prefers_bf16", lambda device: False)
        yield


@pytest.fixture(autouse=True)
def own_methods() -> Iterator[None]:
    """A method that a test defines registers itself: the next test must not find it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def fresh_accelerate(monkeypatch) -> Iterator[None]:
    """Accelerate keeps its state in singletons and takes wishes from the environment: neither may leak."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture
def accelerator(fresh_accelerate) -> Accelerator:
    """One process on the CPU in fp32."""
    torch.manual_seed(0)
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Function that gives every parameter of a model a random value, so that none could be ignored unnoticed."""
    return _randomise


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "token" in name or "pos" in name:
            value = 0.1 * noise  # short, as trained ones: the ε of layer norms counts
        elif parameter.ndim > 1:  # weights: outputs as large as inputs
            value = noise / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:  # gains of norms and LayerScale
            value = 1 + 0.3 * noise
        parameter.copy_(value)
    return model.eval()


TINY = {
    "views.global_size": 16,
    "views.local_size": 8,
    "views.local_crops": 2,
    "model.arch": "vit_tiny",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.drop_path": 0.0,
    "objective.prototypes": 12,
    "objective.head_layers": 2,
    "objective.head_hidden": 24,
    "objective.head_bottleneck": 8,
    "objective.centering": "center",
    "objective.teacher_temperature": 0.07,
    "objective.teacher_temperature_warmup": 2,
    "objective.teacher_momentum": 0.9,
    "objective.teacher_momentum_end": 1.0,
    "optim.lr": 0.01,
    "optim.warmup_steps": 1,
    "objective.freeze_last_layer_steps": 0,
    "train.batch_size": 8,
    "train.steps": 10,
}


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """Function that gives the resolved config of a very small ViT; changes are made by `{key: value}`.

    With an `objective.name` the method's own settings are at their defaults.
    """

    def build(changes: dict | None = None) -> Config:
        changes = changes or {}
        own = {key: value for key, value in TINY.items() if not key.startswith("objective.")}
        values = (own if "objective.name" in changes else TINY) | changes
        config = load(None, [f"{key}={value}" for key, value in values.items()])
        return resolve(config, PoolFacts(images=64, channels=3, kind="folder"))[0]

    return build
