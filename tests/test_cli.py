"""What a user sees when a command cannot go on: one message and an exit code, never a traceback."""

import errno
import os

import pytest

from dino import cli
from dino.errors import UserError


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def exit_code(error: BaseException) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(raising(error))
    return caught.value.code


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_success_returns():
    called = []
    cli.run(lambda: called.append(True))
    assert called == [True]


def test_a_user_error_is_one_message_and_exit_code_2(capsys):
    assert exit_code(UserError("the data are missing: name them")) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the data are missing: name them\n"
    assert captured.out == ""


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("7", 0)])
def test_only_the_first_process_prints_it(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert exit_code(UserError("no")) == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error(number, capsys):
    assert exit_code(OSError(number, os.strerror(number), "metrics.jsonl")) == 2
    text = capsys.readouterr().err
    assert "metrics.jsonl cannot be written" in text
    assert "make room on the disk" in text


def test_other_errors_are_programming_errors_and_keep_their_traceback():
    for error in (ValueError("bug"), OSError(errno.EIO, "broken")):
        with pytest.raises(type(error)):
            cli.run(raising(error))


def test_ctrl_c_before_the_run_has_the_shells_code():
    assert exit_code(KeyboardInterrupt()) == 130
