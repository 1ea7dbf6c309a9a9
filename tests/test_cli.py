"""The command `dino`: its subcommands, and what a user sees when one cannot go on: one message, never a traceback."""

import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import dino
from dino import cli
from dino.commands import common
from dino.config.recipes import recipe_and_settings, recipe_path
from dino.errors import UserError
from dino.files import append_text, cache_directory
from dino.run import RunDirectory
from dino.training.settings import load

PACKAGE = Path(dino.__file__).parent
UNASKED = ("torch", "wandb", "opentelemetry")


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def exit_code(error: BaseException) -> int:
    return exit_code_of(raising(error))


def exit_code_of(work: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(work)
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


@pytest.mark.parametrize("number", cli.UNUSABLE)
def test_a_path_that_cannot_be_used_is_named_in_one_line(number, capsys):
    assert exit_code(OSError(number, os.strerror(number), "out/\x1b[31mhere")) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: out/\\x1b[31mhere cannot be used ({os.strerror(number)}): name another")
    assert text.count("\n") == 1


def test_a_name_that_no_system_takes_is_no_traceback(tmp_path, capsys):
    def look() -> None:
        (tmp_path / ("a" * 300)).stat()

    assert exit_code_of(look) == 2
    assert "cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.ENOTDIR, False)])
def test_room_is_asked_for_only_where_there_is_none(number, is_full, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=re.escape(os.strerror(number))) as caught:
        append_text(tmp_path / "metrics.jsonl", "{}\n")
    assert ("make room" in str(caught.value)) == is_full


@pytest.mark.parametrize("letter", ["a", "\x1b", "\n", " a", "日"])
def test_what_is_too_long_lacks_its_middle_and_the_advice_stays(letter, capsys, caplog):
    """A path of thousands of letters, in what is printed, in what Python raises, and in what is logged."""
    path = "start" + 40_000 * letter + "end"
    raised = UserError(f"run.dir={path} is no folder: name another")
    assert exit_code(raised) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: run.dir=start")
    assert printed.endswith(" is no folder: name another\n")
    assert len(printed) < 25_000
    assert len(str(raised)) < 25_000
    record = logging.LogRecord("dino", logging.INFO, "", 0, "left out: %s: no image", (path,), None)
    cli.harmless(record)
    assert len(record.getMessage()) < 25_000


def test_what_has_a_usual_length_is_printed_whole(capsys):
    path = "/".join(["folder"] * 60)
    assert exit_code(UserError(f"{path} is no folder: name another")) == 2
    assert capsys.readouterr().err == f"error: {path} is no folder: name another\n"


def test_a_home_is_meant_by_a_tilde_in_every_path(tmp_path, monkeypatch):
    """A shell leaves it in `--out=~/x`, `run.dir=~/x` and what a file sets; no folder called ~ must come of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("train: {steps: 3}")
    assert common.parser("", out={}).parse_args(["--out=~/x.csv"]).out == tmp_path / "x.csv"
    assert load("~/mine.yaml").train.steps == 3
    assert RunDirectory("~/run").path == tmp_path / "run"
    for name, folder in (("DINO_CACHE", "~/kept"), ("XDG_CACHE_HOME", "~/kept/dino-pretrain")):
        monkeypatch.setenv(name, "~/kept")
        assert cache_directory() == Path(folder).expanduser()
        monkeypatch.delenv(name)


@pytest.mark.parametrize("file", sorted(Path(common.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_commands_take_paths_in_that_way_alone(file):
    assert "type=Path" not in file.read_text(encoding="utf-8")


def test_a_word_that_no_command_knows_is_shortened_and_escaped(capsys):
    with pytest.raises(SystemExit):
        common.parser("").parse_args(["--" + 9000 * "x" + "\x1b[31m"])
    text = capsys.readouterr().err
    assert "unrecognized arguments: --xxx" in text
    assert len(text) < 1000
    assert "\x1b" not in text


def test_other_errors_are_programming_errors_and_keep_their_traceback():
    for error in (ValueError("bug"), OSError(errno.EIO, "broken"), OSError(errno.ENOENT, "gone", "x")):
        with pytest.raises(type(error)):
            cli.run(raising(error))


def test_ctrl_c_before_the_run_has_the_shells_code():
    assert exit_code(KeyboardInterrupt()) == 130


class TestSubcommands:
    def test_each_is_a_file_and_each_file_with_a_main_is_one(self):
        files = {path.stem for path in (PACKAGE / "commands").glob("*.py") if "def main()" in path.read_text()}
        assert set(cli.COMMANDS) == files

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_each_explains_itself_and_shows_how_it_is_called(self, command, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["dino", command, "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: dino {command}" in text
        assert f"\n    dino {command} " in text

    def test_without_a_command_all_are_listed(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["dino"])
        cli.main()
        text = capsys.readouterr().out
        assert all(f"  {command} " in text for command in cli.COMMANDS)

    def test_the_version_is_that_of_the_package(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["dino", "--version"])
        cli.main()
        assert capsys.readouterr().out == f"dino-pretrain {metadata.version('dino-pretrain')}\n"

    def test_an_unknown_one_names_the_nearest(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["dino", "trian"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


class TestRecipes:
    def test_all_of_configs_are_found_by_name(self):
        for file in (PACKAGE.parent / "configs").glob("*.yaml"):
            assert recipe_path(file.stem).read_text() == file.read_text()

    def test_a_path_is_itself(self, tmp_path):
        (tmp_path / "mine").write_text("")
        for path in (tmp_path / "none.yaml", tmp_path / "mine"):
            assert recipe_path(path) == path

    @pytest.mark.parametrize("name", ["omniglot_cqu", "../omniglot_cpu", ""])
    def test_an_unknown_name_lists_those_there_are(self, name):
        with pytest.raises(UserError, match=r"no recipe is called.*omniglot_cpu"):
            recipe_path(name)

    def test_the_nearest_is_proposed(self):
        with pytest.raises(UserError, match="did you mean omniglot_cpu"):
            recipe_path("omniglot_cqu")

    def test_the_first_word_may_be_one(self):
        assert recipe_and_settings(["demo", "a=1"], None) == ("demo", ["a=1"])
        assert recipe_and_settings(["a=1"], "x.yaml") == ("x.yaml", ["a=1"])
        assert recipe_and_settings([], None) == (None, [])
        with pytest.raises(UserError, match="leave one out"):
            recipe_and_settings(["demo"], "x.yaml")


def test_importing_the_package_loads_little_and_changes_nothing():
    script = f"""
import os, sys
before = dict(os.environ)
import dino
assert os.environ == before, set(os.environ) ^ set(before)
assert not set({UNASKED}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.slow
def test_a_run_loads_no_tracker_that_nobody_asked_for(tmp_path):
    settings = ["data.kind=digits", "data.workers=0", "model.arch=vit_tiny", "model.patch_size=4", "model.depth=1"]
    settings += ["views.global_size=8", "views.local_crops=0", "train.steps=1", "train.batch_size=8"]
    script = f"""
import sys
from dino import cli
sys.argv = ["dino", "train", *{settings}, "objective.prototypes=16", "run.dir={tmp_path / "run"}"]
cli.main()
assert not set({UNASKED[1:]}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
