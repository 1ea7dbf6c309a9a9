"""Two runs in one directory: the second is refused, whatever became of the first."""

import os
import re
import signal
import subprocess
import sys

import pytest

import dino
from dino.errors import UserError
from dino.run_lock import held

HOLD = """
import sys
from pathlib import Path
from dino.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process, which holds `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_by_the_first_ones_number_until_it_ends(other, tmp_path):
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on {re.escape(os.uname().nodename)}"):
        held(tmp_path / "run").__enter__()
    other.communicate("\n")
    with held(tmp_path / "run"):
        assert (tmp_path / "run" / ".running").exists()
    assert not (tmp_path / "run" / ".running").exists()


def test_a_killed_one_leaves_no_lock(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / ".running").exists()
    with held(tmp_path / "run"):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on: of what this child does nothing
def test_forked_workers_do_not_keep_it(tmp_path):
    """They may outlive a killed run by seconds, in which it is started again."""
    read, write = os.pipe()
    with held(tmp_path):
        if not (worker := os.fork()):
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    again = subprocess.run([sys.executable, "-c", HOLD, tmp_path], input="\n", capture_output=True, text=True)
    os.close(write)
    os.waitpid(worker, 0)
    assert again.stdout == "held\n", again.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}"])
def test_whatever_is_written_there_the_lock_alone_decides(other, tmp_path, content):
    (tmp_path / "run" / ".running").write_text(content)
    with pytest.raises(UserError, match="in use by process"):
        held(tmp_path / "run").__enter__()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_is_refused_before_it_reads_what_the_other_one_writes(other, fresh_accelerate, tmp_path, dry_run):
    """A checkpoint that goes while it is read looks damaged; one that comes afterwards would be removed."""
    (tmp_path / "run" / "config.yaml").write_text("half a conf")
    with pytest.raises(UserError, match=f"in use by process {other.pid}"):
        dino.train(run=tmp_path / "run", dry_run=dry_run, **{"data.kind": "digits"})
    other.communicate("\n")
    with pytest.raises(UserError, match=r"config\.yaml must hold"):
        dino.train(run=tmp_path / "run", dry_run=dry_run, **{"data.kind": "digits"})


def test_a_folder_in_which_nothing_was_written_is_gone_again(tmp_path):
    with held(tmp_path / "deep" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "deep" / "run"):
        (tmp_path / "deep" / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["config.yaml"]


def test_an_error_gives_it_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(tmp_path):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_in_its_place_is_refused_and_what_it_leads_to_stays(tmp_path, target):
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".running").symlink_to(tmp_path / target)
    with pytest.raises(
        UserError, match=rf"{re.escape(str(tmp_path))}/\.running, which says who runs, cannot be written"
    ):
        held(tmp_path).__enter__()
    assert (tmp_path / "file").read_text() == "somebody's"
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        held(tmp_path / "file" / "run").__enter__()
