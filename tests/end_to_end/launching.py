"""The entry points started as a user starts them, with no key, no settings, no cache: in this process, or in others."""

import contextlib
import io
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import forking
import matplotlib
import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "train" / "pretrain.py"
TINY = (
    "data.kind=digits",
    "data.workers=0",
    "views.preset=line_art",
    "views.global_size=8",
    "views.local_size=4",
    "views.local_crops=2",
    "model.arch=vit_tiny",
    "model.patch_size=4",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "objective.prototypes=64",
    "objective.head_hidden=32",
    "objective.head_bottleneck=16",
    "train.batch_size=32",
    "train.cpu_threads=1",
    "monitor.log_every=1",
)
ONE = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
TWO = "-m torch.distributed.run --standalone --nproc_per_node 2"
LAUNCHERS = {"python": [], "accelerate": ONE.split(), "torchrun": TWO.split()}
FROM_OUTSIDE = ("ACCELERATE_", "WANDB_", "MASTER_", "TORCHELASTIC_", "OMP_", "RANK", "WORLD_SIZE", "LOCAL_")
NO_PAGE = "from dino.report.run import Reporter; Reporter.write = lambda *arguments, **settings: {}"
LONGEST = 300  # seconds that a process may take on a busy machine


class Running:
    """A run that goes on while the test looks at it, in a process group of its own."""

    pid: int
    output: Path
    errors: Path

    def poll(self) -> int | None:
        """Its exit code; None: it goes on."""
        raise NotImplementedError

    def wait(self, longest: float) -> int | None:
        """Its exit code, for which at most `longest` seconds are waited."""
        raise NotImplementedError

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once `holds()`; the test fails if the run ends before."""

        def holds_or_ended() -> bool:
            return holds() or self.poll() is not None

        wait_for(holds_or_ended, self.errors)
        assert self.poll() is None, f"the run ended too early, {self.poll()}: {self.errors.read_text()}"

    def end(self, number: signal.Signals, everybody: bool = False) -> int:
        """Send a signal, to the process or to its whole group, and wait for the exit code."""
        send = os.killpg if everybody else os.kill
        send(self.pid, number)
        code = self.wait(LONGEST)
        assert code is not None, f"it did not end in {LONGEST} s"
        return code


class Started(subprocess.Popen, Running):
    """By a command."""


class Forked(Running):
    """From the server of forking.py."""

    def __init__(self, job: forking.Job):
        self.process = forking.start(job)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, longest: float) -> int | None:
        self.process.join(longest)
        return self.process.exitcode


def wait_for(holds: Callable[[], bool], errors: Path) -> None:
    """Return once `holds()`; after five minutes the test fails with the text in `errors`."""
    deadline = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < deadline, f"waited {LONGEST} s in vain: {errors.read_text()}"
        time.sleep(0.001)


class Runs:
    """Starts pre-trainings, by default of a tiny ViT on scikit-learn's digits.

    Args:
        folder: the home directory that the runs see, and where their output is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[Running] = []
        self.jobs = 0
        self.lock = threading.Lock()

    def environment(self, **changes: str) -> dict[str, str]:
        """This process's variables without those that steer launchers and trackers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FROM_OUTSIDE)}
        home = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(self.folder))
        fonts = {"MPLCONFIGDIR": matplotlib.get_cachedir()}  # found once, not by every home
        return {**kept, **home, **fonts, "PYTHONUNBUFFERED": "1", **changes}

    def run(
        self,
        *arguments: object,
        launcher: str = "here",
        largest_file: int = 0,
        before: str = "",
        settings: Sequence[str] = TINY,
        page: bool = False,
        **variables: str,
    ) -> CompletedProcess:
        """Run to the end; gives the exit code and the output.

        Args:
            arguments: of pretrain.py, after `settings`, over which they take precedence.
            launcher: here (in this process), fork (in another), two (as torchrun's two processes), or a real one, which
                takes ten seconds to start: python, accelerate, torchrun (two).
            largest_file: bytes; a file that grows beyond fails as on a full disk. 0: any. In a process of its own.
            before: Python code that is run in the same process before pretrain.py. In a process of its own.
            page: whether a run that no real launcher starts writes its report, which takes a third of so short a one.
            variables: changes of the environment.
        """
        if launcher == "here" and not before and not largest_file:
            return self.here(SCRIPT, *settings, *arguments, page=page, **variables)
        if launcher in ("here", "fork", "two"):
            words, before = [SCRIPT, *settings, *arguments], before if page else f"{NO_PAGE}\n{before}"
            return self.fork(words, launcher == "two", before, largest_file, **variables)
        command = _command(launcher, arguments, settings)
        try:
            return subprocess.run(
                command,
                env=self.environment(**variables),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired as expired:  # killed; the other runs of `together` shall still be judged
            output, errors = ((text or b"").decode() for text in (expired.stdout, expired.stderr))
            return CompletedProcess(command, -signal.SIGKILL, output, f"{errors}\nhung for {LONGEST} s")

    def fork(
        self, words: Sequence[object], two: bool = False, before: str = "", largest_file: int = 0, **variables: str
    ) -> CompletedProcess:
        """Run a script to its end in a forked process, or in two, with what `run` says of the rest."""
        job = self.job(words, **variables)._replace(before=before, largest_file=largest_file)
        try:
            code = forking.run(job, 2 if two else 1, LONGEST)
        except TimeoutError:
            code = -signal.SIGKILL
        output, errors = (path.read_text(errors="replace").replace("\r", "\n") for path in (job.output, job.errors))
        return CompletedProcess(job.words, code, output, errors)

    def job(self, words: Sequence[object], **variables: str) -> forking.Job:
        """A script and its arguments, with files for what it writes."""
        with self.lock:
            self.jobs += 1
            output, errors = (self.folder / f"process-{self.jobs}.{kind}" for kind in ("out", "err"))
        for path in (output, errors):
            path.touch()
        return forking.Job([str(word) for word in words], self.environment(**variables), REPOSITORY, output, errors)

    def here(self, script: Path, *arguments: object, page: bool = True, **variables: str) -> CompletedProcess:
        """Run a script of the repository in this process as if it were started: its exit code and output."""
        output, errors, code = io.StringIO(), io.StringIO(), 0
        handler, logger = logging.StreamHandler(errors), logging.getLogger()
        level = logger.level
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "argv", [str(script), *map(str, arguments)]))
            stack.enter_context(mock.patch.dict(os.environ, self.environment(**variables), clear=True))
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(errors))
            stack.enter_context(contextlib.chdir(REPOSITORY))
            if not page:
                stack.enter_context(mock.patch("dino.report.run.Reporter.write", return_value={}))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as ended:
                code = ended.code
            finally:
                logger.removeHandler(handler)
                logger.setLevel(level)
        texts = [stream.getvalue().replace("\r", "\n") for stream in (output, errors)]  # as of a process
        return CompletedProcess([str(script), *map(str, arguments)], code or 0, *texts)

    def finish(self, *arguments: object, **options: object) -> CompletedProcess:
        """`run`; the test fails unless the exit code is 0."""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return done

    def together(
        self, commands: dict[str, Sequence[object]], *, page: bool = False, fails: bool = False, **launchers: str
    ) -> dict[str, CompletedProcess]:
        """Several runs: those in this process one after the other, while others of their own go on.

        Args:
            commands: name to arguments.
            page: see `run`.
            fails: whether they may fail.
            launchers: name to launcher, where it is not this process.
        """
        with ThreadPoolExecutor(1) as pool:
            processes = {
                name: pool.submit(self.run, *commands[name], launcher=launchers[name], page=page) for name in launchers
            }
            done = {name: self.run(*commands[name], page=page) for name in commands if name not in launchers}
            done |= {name: process.result() for name, process in processes.items()}
        for name, process in done.items():
            assert fails or process.returncode == 0, f"{name}: {process.stderr}"
        return done

    def start(self, *arguments: object, launcher: str = "fork", **variables: str) -> Running:
        """Start a run and return while it goes on."""
        job = self.job([SCRIPT, *TINY, *arguments], **variables)._replace(before=NO_PAGE)
        if launcher == "fork":
            process: Running = Forked(job)
        else:
            with job.output.open("w") as out, job.errors.open("w") as err:
                process = Started(
                    _command(launcher, arguments),
                    env=job.environment,
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
        process.output, process.errors = job.output, job.errors
        self.started.append(process)
        return process

    def stop_all(self) -> None:
        """Kill what a failed test has left running."""
        for process in self.started:
            if process.poll() is None:
                process.end(signal.SIGKILL, everybody=True)


def _command(launcher: str, arguments: Sequence[object], settings: Sequence[str] = TINY) -> list[str]:
    return [sys.executable, *LAUNCHERS[launcher], str(SCRIPT), *settings, *map(str, arguments)]


def metrics(run: Path) -> list[dict]:
    """The lines of RUN/metrics.jsonl, without one that is just being written."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_logged(run: Path) -> list[int]:
    """The steps in RUN/metrics.jsonl, in the file's order."""
    return [line["step"] for line in metrics(run)]


def losses(run: Path) -> list[float]:
    """The losses in RUN/metrics.jsonl, in the file's order."""
    return [line["loss/dino"] for line in metrics(run)]


def checkpoints(run: Path) -> list[int]:
    """The steps of a run's whole checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def checkpoint(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-…"""
    return run / "checkpoints" / f"step-{step:08d}"


def copy_run(source: Path, target: Path, *steps: int) -> Path:
    """A copy of a run directory with only the checkpoints of `steps`."""
    shutil.copytree(source, target)
    assert set(steps) <= set(checkpoints(target))
    for step in set(checkpoints(target)) - set(steps):
        shutil.rmtree(checkpoint(target, step))
    return target


def backbone(run: Path) -> bytes:
    """RUN/backbone.safetensors."""
    return (run / "backbone.safetensors").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(done: CompletedProcess) -> str:
    """The message for a user's error: exit code 2, 'error: ' at the beginning of a line of stderr, no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
    _, found, message = f"\n{done.stderr}".partition("\nerror: ")
    assert found, f"no line begins with 'error: ': {done.stderr!r}"
    assert "error: " not in message, f"said twice: {done.stderr!r}"
    return message


def write_images(folder: Path, count: int, size: int = 24, suffix: str = ".png") -> list[Path]:
    """Small RGB images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = [folder / f"image-{index:03d}{suffix}" for index in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (size, size + 5, 3), dtype=np.uint8)).save(path)
    return paths
