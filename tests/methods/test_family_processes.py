"""Several processes take the steps of one, whatever method of the family; BatchNorm alone makes them differ."""

import os

import pytest
import worlds
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from builders import assert_close, build, packed, views_of_batch, weights
from test_family import FAMILY, WITH_NORM, settings, without_norm
from torch import Tensor

from dino.config.schema import Config

pytestmark = pytest.mark.slow
WORLDS = [3, 2]
SHARED = {"train.batch_size": 12}


class Shared:
    """Three steps of each config, of which each process has its part of the images."""

    def __init__(self, configs: dict[str, Config]):
        self.configs = configs

    def __call__(self, rank: int, processes: int) -> dict[str, tuple[dict[str, Tensor], float]]:
        # Accelerate asks for these.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), OMP_NUM_THREADS="1")
        return {name: three_steps(config, rank, processes) for name, config in self.configs.items()}


def three_steps(config: Config, rank: int, processes: int) -> tuple[dict[str, Tensor], float]:
    """What a checkpoint has afterwards, and the last step's loss on this process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    built = build(Accelerator(cpu=True, mixed_precision="no"), config)
    for number in range(3):
        own = [view.chunk(processes)[rank] for view in views_of_batch(config, number)]
        logged = built.step(number, packed(own))
    loss = sum(value.item() for name, value in logged.items() if name.startswith("loss/"))
    return weights(*built.method.state().values()), loss


@pytest.fixture
def configs(tiny) -> dict[str, Config]:
    exact = {name: tiny(without_norm(name) | SHARED) for name in FAMILY}
    return exact | {f"{name}, BatchNorm": tiny(settings(name, SHARED)) for name in sorted(WITH_NORM)}


def test_two_and_three_processes_are_one(configs, fresh_accelerate, tmp_path):
    """Student, teacher and queue; each process with BatchNorm of its own learns nearly the same."""
    alone = {name: three_steps(config, 0, 1) for name, config in configs.items()}
    for processes, results in worlds.run(Shared(configs), WORLDS, tmp_path).items():
        for name, (state, loss) in alone.items():
            losses = [result[name][1] for result in results]
            if "BatchNorm" in name:
                assert sum(losses) / processes == pytest.approx(loss, rel=0.3), name
                continue
            assert sum(losses) / processes == pytest.approx(loss, rel=1e-4), name
            for result in results:
                assert_close(result[name][0], state, rtol=1e-3, atol=1e-5)
