"""Signals, a lost launcher, the time limit and unreadable images end a run after its step, in all processes at once."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from dino.training.interrupt import Interrupt, Stop


@pytest.fixture(autouse=True)
def _handlers(monkeypatch) -> Iterator[None]:
    """Puts the handlers of this process back."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Processes:
    """Stands in for Accelerate: this process and what the others report."""

    device = torch.device("cpu")

    def __init__(self, *others: Stop):
        self.others, self.num_processes, self.gathered = others, 1 + len(others), 0

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        self.gathered += 1
        return torch.cat([mine, torch.tensor([int(other) for other in self.others])])


def fine() -> bool:
    return False


def too_many() -> bool:
    return True


class TestOneProcess:
    def test_goes_on_when_nobody_asks(self):
        assert Interrupt(Processes(), None).asked(fine, together=True) == Stop.NO

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("together", [True, False])
    def test_a_signal_asks_and_does_not_kill(self, number, together):
        interrupt = Interrupt(Processes(), None)
        os.kill(os.getpid(), number)
        assert interrupt.asked(fine, together) == Stop.SIGNAL
        assert interrupt.asked(fine, together) == Stop.SIGNAL

    @pytest.mark.parametrize(("limit", "stop"), [(None, Stop.NO), (60.0, Stop.NO), (0.0, Stop.TIME)])
    def test_time_limit_in_minutes(self, limit, stop):
        assert Interrupt(Processes(), limit).asked(fine, together=False) == stop

    def test_time_limit_counts_from_the_start(self, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr("dino.training.interrupt.time.monotonic", lambda: now[0])
        interrupt = Interrupt(Processes(), 2.0)
        now[0] += 119
        assert interrupt.asked(fine, together=False) == Stop.NO
        now[0] += 2
        assert interrupt.asked(fine, together=False) == Stop.TIME

    def test_unreadable_images_are_looked_at_only_together(self):
        interrupt = Interrupt(Processes(), None)
        assert interrupt.asked(too_many, together=False) == Stop.NO
        assert interrupt.asked(too_many, together=True) == Stop.UNREADABLE

    def test_an_error_comes_before_a_wish(self):
        interrupt = Interrupt(Processes(), 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked(fine, together=True) == Stop.SIGNAL
        assert interrupt.asked(too_many, together=True) == Stop.UNREADABLE


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(number):
    child = os.fork()
    if child == 0:
        Interrupt(Processes(), None)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == number


class TestLauncher:
    def test_its_end_asks_to_stop(self, monkeypatch):
        """Accelerate's launcher dies of a SIGTERM without passing it on."""
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        interrupt = Interrupt(Processes(), None)
        assert interrupt.asked(fine, together=False) == Stop.NO
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interrupt.asked(fine, together=False) == Stop.SIGNAL

    def test_without_one_the_parent_does_not_matter(self, monkeypatch):
        """`nohup python train/pretrain.py &` outlives its shell."""
        interrupt = Interrupt(Processes(), None)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interrupt.asked(fine, together=True) == Stop.NO


class TestSeveralProcesses:
    def test_one_that_is_asked_stops_all(self):
        assert Interrupt(Processes(Stop.SIGNAL, Stop.NO), None).asked(fine, together=True) == Stop.SIGNAL
        assert Interrupt(Processes(Stop.UNREADABLE), 0.0).asked(fine, together=True) == Stop.UNREADABLE

    def test_none_stops_alone_between_the_steps_at_which_all_ask(self):
        """It would leave the others waiting for its gradients for ever."""
        processes = Processes(Stop.NO)
        interrupt = Interrupt(processes, 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked(too_many, together=False) == Stop.NO
        assert processes.gathered == 0
        assert interrupt.asked(fine, together=True) == Stop.SIGNAL
        assert processes.gathered == 1


def test_farewell_says_where_the_results_are(tmp_path):
    assert "backbone.safetensors" in Stop.NO.farewell(tmp_path)
    assert "report.html" in Stop.NO.farewell(tmp_path)
    for stop, why in ((Stop.TIME, "time limit"), (Stop.SIGNAL, "asked to stop")):
        assert why in stop.farewell(tmp_path)
        assert str(tmp_path / "checkpoints") in stop.farewell(tmp_path)
