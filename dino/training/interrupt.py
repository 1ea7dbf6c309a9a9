"""Why a run may end before its last step, and that all processes agree on it."""

import os
import signal
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP
TOGETHER = 1.0  # seconds in which signals are one: launchers hand on what a terminal has sent to all processes
GRACE = 10.0  # seconds that a run has to save after a second signal


class Stop(IntEnum):
    """Reasons to end early; the greatest that any process has counts for all."""

    NO = 0
    TIME = 1
    SIGNAL = 2
    UNREADABLE = 3
    GONE = 4

    @property
    def state(self) -> str:
        """Of the run, for its report."""
        return {Stop.NO: "finished", Stop.TIME: "stopped: time limit", Stop.SIGNAL: "stopped"}.get(self, "failed")

    def farewell(self, run: Path) -> str:
        """What to say at the end."""
        if self == Stop.NO:
            return f"done: {run / 'backbone.safetensors'} and {run / 'report.html'}"
        why = "the time limit is reached" if self == Stop.TIME else "asked to stop"
        return f"{why}: the state is saved in {run / 'checkpoints'}; the same command goes on from there"


class Interrupt:
    """Turns SIGTERM, SIGINT and SIGHUP, the end of the launcher, and the time limit into a request to stop

    A signal is answered at once. A second one ends the process after ten seconds, if it has not saved and ended by
    then; a third at once, as without this class. Used as a context: what handled the signals before does so again
    afterwards.

    Attributes:
        step: that is being taken, from 1 on; the answer names it.
    """

    def __init__(self, accelerator: Accelerator, time_limit: float | None, step: int = 1):
        self.accelerator = accelerator
        self.step = step
        self.deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
        self.signalled_at: float | None = None
        self.end: threading.Timer | None = None
        # Accelerate's launcher does not hand a SIGTERM on; that it is gone shows in this process's parent.
        self.launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def __enter__(self) -> "Interrupt":
        # Python lets only the main thread handle signals; a run in another one is stopped by its program.
        in_main_thread = threading.current_thread() is threading.main_thread()
        signals = [getattr(signal, name) for name in SIGNALS if in_main_thread and hasattr(signal, name)]
        # An ignored SIGHUP stays so: that is how nohup keeps a run alive.
        heeded = [each for each in signals if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        if self.end is not None:
            self.end.cancel()
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
            later = "" if self.accelerator.num_processes == 1 else " and those up to the next logged one"
            self._answer(f"finishing step {self.step}{later}, then saving; once more: in {GRACE:.0f} s at most")
        elif now - self.signalled_at >= TOGETHER:
            for each in self.before:
                signal.signal(each, signal.SIG_DFL)
            self.end = threading.Timer(GRACE, os.kill, (os.getpid(), number))
            self.end.daemon = True
            self.end.start()
            self._answer(
                f"ending in {GRACE:.0f} s at most, with the step saved if it is done by then; once more: at once"
            )

    def _answer(self, text: str) -> None:
        if self.accelerator.is_main_process:
            os.write(2, f"\n{text}\n".encode())  # not print: what it interrupts may be a print

    def reason(self, too_many_unreadable: bool, synchronise: bool, is_gone: bool = False) -> Stop:
        """Why to stop now, if at all.

        Args:
            too_many_unreadable: as this process sees it.
            synchronise: whether all processes ask at this step; at the others, a process of several does not stop.
            is_gone: whether the run's directory is, as this process sees it.
        """
        alone = self.accelerator.num_processes == 1
        if not (alone or synchronise):
            return Stop.NO
        mine = Stop.NO
        if self.deadline is not None and time.monotonic() > self.deadline:
            mine = Stop.TIME
        if self.signalled_at is not None or (self.launcher is not None and os.getppid() != self.launcher):
            mine = Stop.SIGNAL
        if too_many_unreadable:
            mine = Stop.UNREADABLE
        if is_gone:
            mine = Stop.GONE
        if alone:
            return mine
        reasons = self.accelerator.gather(torch.tensor([int(mine)], device=self.accelerator.device))
        return Stop(int(reasons.max()))
