"""Real processes (gloo), for what is computed over several of them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run(work: Callable[[int, int], object], worlds: Sequence[int], folder: Path) -> dict[int, list]:
    """What `work(rank, processes)` returns on every process of each world, by the world's number of processes."""
    # Importing torch takes longer than all the rest, so it is done once: by a server from which processes fork.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["dino.methods.losses"])
    multiprocessing.start_processes(
        _process, (work, worlds, str(folder)), nprocs=max(worlds), start_method="forkserver"
    )
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in worlds}


def _process(rank: int, work: Callable[[int, int], object], worlds: Sequence[int], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    for processes in worlds:
        if rank >= processes:
            continue
        dist.init_process_group("gloo", f"file://{folder}/rendezvous-{processes}", rank=rank, world_size=processes)
        torch.save(work(rank, processes), f"{folder}/{processes}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
