"""Runs in processes of their own that need not import torch: they fork from a server that has.

The import takes longer than a tiny run. What a process finds is what `python` and `torchrun` would give it; that these
start the program is for the tests that use them.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from dino import precision

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ["torch._dynamo", "dino.cli", "dino.training.train", "dino.methods.losses", "dino.commands.curate"]
GRACE = 30  # seconds that the other processes of a failed run have to end


class Job(NamedTuple):
    """What a process is to run.

    Attributes:
        words: a script and its arguments.
        environment: all of its variables.
        folder: the working directory.
        output, errors: files that get what it writes.
        before: Python code that is run first.
        largest_file: bytes; a file that grows beyond fails as on a full disk. 0: any.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    output: Path
    errors: Path
    before: str = ""
    largest_file: int = 0


def start(job: Job) -> ForkServerProcess:
    """Begin a job in a process, and process group, of its own."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    process = CONTEXT.Process(target=_run, args=(job,))
    process.start()
    return process


def run(job: Job, processes: int, longest: float) -> int:
    """Run a job in as many processes as torchrun would start for it; gives 0, or the exit code of the first to fail.

    Raises:
        TimeoutError: it took longer than `longest` seconds; its processes are dead.
    """
    if processes == 1:
        return _watch([start(job)], longest)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    members = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        members.append(start(job._replace(environment={**job.environment, **address, **world, **own})))
    return _watch(members, longest)


def _watch(members: list[ForkServerProcess], longest: float) -> int:
    deadline = time.monotonic() + longest
    while any(member.exitcode is None for member in members):
        failed = [member for member in members if member.exitcode]
        if failed or time.monotonic() > deadline:
            for member in members:
                _end(member)
            if not failed:
                raise TimeoutError
        multiprocessing.connection.wait([member.sentinel for member in members if member.exitcode is None], 0.2)
    return next((member.exitcode for member in members if member.exitcode), 0)


def _end(member: ForkServerProcess) -> None:
    member.terminate()
    member.join(GRACE)
    if member.exitcode is None:
        os.killpg(member.pid, signal.SIGKILL)
        member.join()


def _run(job: Job) -> None:
    os.setsid()
    os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(job.environment)
    for number, path in enumerate((os.devnull, job.output, job.errors)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest_file, job.largest_file))
    precision.prefers_bf16 = lambda device: False  # features are then the same on every processor
    sys.argv = list(job.words)
    sys.path.insert(0, str(Path(job.words[0]).parent))
    try:
        if job.before:
            exec(job.before, {"__name__": "before"})
        runpy.run_path(job.words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out, and W&B needs
