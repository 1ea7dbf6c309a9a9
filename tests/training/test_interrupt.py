"""Signals, a lost launcher, the time limit and unreadable images end a run after its step, in all processes at once."""

import os
import signal
import time

import pytest
import torch

from dino.training.interrupt import Interrupt, Stop


class Processes:
    """Stands in for Accelerate: this process and what the others report."""

    device, is_main_process = torch.device("cpu"), True

    def __init__(self, *others: Stop):
        self.others, self.num_processes, self.gathered = others, 1 + len(others), 0

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        self.gathered += 1
        return torch.cat([mine, torch.tensor([int(other) for other in self.others])])


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    """Nor a shell that starts its jobs with signals ignored."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("synchronise", [True, False])
def test_a_signal_asks_and_does_not_kill(number, synchronise, capfd):
    """Until the end of the run: then whoever handled it before does so again."""
    before = signal.getsignal(number)
    with Interrupt(Processes(), None, 11) as interrupt:
        assert interrupt.reason(False, synchronise) == Stop.NO
        interrupt.step = 12
        os.kill(os.getpid(), number)
        assert interrupt.reason(False, synchronise) == Stop.SIGNAL
        assert interrupt.reason(False, synchronise) == Stop.SIGNAL
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.count("finishing step 12, then saving; once more: in 10 s at most") == 1


def test_what_is_ignored_stays_so():
    """That is how nohup keeps a run alive."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(Processes(), None) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.reason(False, synchronise=False) == Stop.NO
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("signals", "grace", "takes", "is_killed"),
    [(2, 0.1, 60, True), (2, 60, 0.1, False), (3, 60, 60, True)],
    ids=["a second one when its time is over", "a second one with time to save", "a third one at once"],
)
def test_more_signals_end_the_process(number, signals, grace, takes, is_killed, monkeypatch):
    monkeypatch.setattr("dino.training.interrupt.TOGETHER", 0.0)
    monkeypatch.setattr("dino.training.interrupt.GRACE", grace)
    child = os.fork()
    if child == 0:
        with Interrupt(Processes(), None):
            for _ in range(signals):
                os.kill(os.getpid(), number)
            time.sleep(takes)  # of the step and its checkpoint
        os._exit(17)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-number if is_killed else 17)


def test_what_a_launcher_hands_on_at_once_is_no_second_signal():
    """A terminal's Ctrl-C reaches all processes, and torchrun sends its own the same once more."""
    with Interrupt(Processes(), None) as interrupt:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert interrupt.reason(False, synchronise=True) == Stop.SIGNAL
        assert interrupt.end is None


def test_a_run_that_ends_in_time_leaves_no_end_behind(monkeypatch):
    """A notebook goes on after it."""
    monkeypatch.setattr("dino.training.interrupt.TOGETHER", 0.0)
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(Processes(), None) as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.end.is_alive()
    interrupt.end.join(5)
    assert not interrupt.end.is_alive()
    assert signal.getsignal(signal.SIGINT) == before


def test_time_limit_in_minutes_from_the_start(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("dino.training.interrupt.time.monotonic", lambda: now[0])
    limited, unlimited = Interrupt(Processes(), 2.0), Interrupt(Processes(), None)
    for seconds, stop in ((119, Stop.NO), (2, Stop.TIME)):
        now[0] += seconds
        assert limited.reason(False, synchronise=False) == stop
        assert unlimited.reason(False, synchronise=False) == Stop.NO


def test_an_error_comes_before_a_wish():
    with Interrupt(Processes(), 0.0) as interrupt:
        assert interrupt.reason(False, synchronise=True) == Stop.TIME
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.reason(False, synchronise=True) == Stop.SIGNAL
        assert interrupt.reason(True, synchronise=True) == Stop.UNREADABLE


@pytest.mark.parametrize(("launched", "stop"), [(True, Stop.SIGNAL), (False, Stop.NO)])
def test_the_end_of_accelerates_launcher_asks_to_stop(launched, stop, monkeypatch):
    """It dies of a SIGTERM without passing it on. Without one, a run by `nohup … &` outlives its shell."""
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    interrupt = Interrupt(Processes(), None)
    assert interrupt.reason(False, synchronise=False) == Stop.NO
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interrupt.reason(False, synchronise=True) == stop


class TestSeveralProcesses:
    def test_one_that_is_asked_stops_all(self):
        assert Interrupt(Processes(Stop.SIGNAL, Stop.NO), None).reason(False, synchronise=True) == Stop.SIGNAL
        assert Interrupt(Processes(Stop.UNREADABLE), 0.0).reason(False, synchronise=True) == Stop.UNREADABLE

    def test_none_stops_alone_between_the_steps_at_which_all_ask(self, capfd):
        """It would leave the others waiting for its gradients for ever."""
        processes = Processes(Stop.NO)
        with Interrupt(processes, 0.0) as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.reason(True, synchronise=False) == Stop.NO
            assert processes.gathered == 0
            assert interrupt.reason(False, synchronise=True) == Stop.SIGNAL
            assert processes.gathered == 1
        assert "finishing step 1 and those up to the next logged one, then saving" in capfd.readouterr().err


def test_farewell_says_where_the_results_are(tmp_path):
    assert "backbone.safetensors" in Stop.NO.farewell(tmp_path)
    assert "report.html" in Stop.NO.farewell(tmp_path)
    for stop, why in ((Stop.TIME, "time limit"), (Stop.SIGNAL, "asked to stop")):
        assert why in stop.farewell(tmp_path)
        assert str(tmp_path / "checkpoints") in stop.farewell(tmp_path)
