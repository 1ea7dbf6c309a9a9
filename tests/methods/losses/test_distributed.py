"""On several real processes, each with its shard, targets and averages are those of the whole batch on one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dino.distributed import mean_over_processes
from dino.methods.ema import synchronise_buffers
from dino.methods.losses import Centre, dino_loss, sinkhorn_knopp

WORLDS = [3, 2]
IMAGES, PROTOTYPES, VIEWS = 12, 9, 4


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher logits (2, B, K), of which image 3 is far ahead of the others, and student logits (V, B, K)."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, IMAGES, PROTOTYPES, generator=generator)
    teacher[:, 3] += 50
    return teacher, torch.randn(VIEWS, IMAGES, PROTOTYPES, generator=generator)


def batch_norm(rank: int) -> torch.nn.BatchNorm1d:
    module = torch.nn.BatchNorm1d(3)
    module.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]) * (rank + 1))
    return module


def results(teacher: torch.Tensor, student: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """What a process finds out from its images."""
    centre = Centre(PROTOTYPES)
    centre.update(teacher.flatten(0, 1))
    centre.update(2 * teacher.flatten(0, 1))
    targets = sinkhorn_knopp(teacher.flatten(0, 1), 0.1).view(teacher.shape)
    module = batch_norm(rank)
    synchronise_buffers(module)
    return {
        "sinkhorn": targets,
        "centre": centre.center,
        "loss": mean_over_processes(dino_loss(student, centre.probabilities(teacher, 0.1))),
        "running_mean": module.running_mean,
    }


def process(rank: int, worlds: list[int], folder: str) -> None:
    """One process of each world in turn: starting a process takes longer than all that it does here."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    for processes in worlds:
        if rank >= processes:
            continue
        meeting = f"file://{folder}/rendezvous-{processes}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=processes)
        teacher, student = (logits.chunk(processes, dim=1)[rank] for logits in whole_batch())
        found = {**results(teacher, student, rank), "world": dist.get_world_size()}
        torch.save(found, f"{folder}/{processes}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (WORLDS, str(folder)), nprocs=max(WORLDS))
    return folder


@pytest.fixture(params=WORLDS, ids=[f"{processes} processes" for processes in WORLDS])
def shards(request, folder) -> list[dict[str, torch.Tensor]]:
    found = [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]
    assert [shard["world"] for shard in found] == [request.param] * request.param
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return results(*whole_batch(), rank=0)


def test_sinkhorn_balances_over_all_processes(shards, whole):
    joined = torch.cat([shard["sinkhorn"] for shard in shards], dim=1)
    torch.testing.assert_close(joined, whole["sinkhorn"], rtol=0, atol=1e-6)


def test_centre_is_the_same_everywhere_and_that_of_the_whole_batch(shards, whole):
    for shard in shards:
        torch.testing.assert_close(shard["centre"], whole["centre"], rtol=0, atol=1e-6)
        assert torch.equal(shard["centre"], shards[0]["centre"])


def test_loss_averages_to_that_of_the_whole_batch(shards, whole):
    for shard in shards:
        torch.testing.assert_close(shard["loss"], whole["loss"], rtol=1e-6, atol=1e-6)


def test_running_statistics_of_a_teacher_are_averaged(shards):
    """(1 + … + P) / P = (P + 1) / 2 times (1, 2, 3)."""
    expected = torch.tensor([1.0, 2.0, 3.0]) * (len(shards) + 1) / 2
    for shard in shards:
        torch.testing.assert_close(shard["running_mean"], expected)
