"""Damaged files of a run, by the hundred: what is read is right, or one line says which file is wrong; no traceback."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dino.errors import UserError
from dino.run import RunDirectory
from dino.seal import Damaged, digest, sealed, verified
from dino.training.best import Best

TIMES = 250  # of each file
NUMBERS = (b"0", b"-1", b"1e400", b"true", b"null", b'"a"', b"9" * 400, b"NaN", b"[1]")
PIECES = (b"\0", b"\n", b'"', b"}", b"9" * 5000, b"-", b"\xff", b"\\ud800", b",", b"{}")
WHOLE = (b"", b"[]", b"{}", b"null", b"3", b'"x"', b"[" * 100_000, b'{"step": "x"}\n{"step": 2}\n', b"\xff\xfe")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A file with something wrong in it: a bit, its end, a number, a piece more, or all of it."""
    at = chance.randrange(len(content))
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    number = chance.choice(numbers)
    return chance.choice(
        (
            content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            content[:at],
            content[: number.start()] + chance.choice(NUMBERS) + content[number.end() :],
            content[:at] + chance.choice(PIECES) + content[at:],
            content + content,
            chance.choice(WHOLE),
            chance.randbytes(100),
        )
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run directory with one of each file."""
    directory = RunDirectory(tmp_path)
    lines = [{"step": step, "loss/dino": 6.5 / step, "health/verdict": "healthy"} for step in (10, 20, 30)]
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    directory.add_skipped({"a.png": "1 of 2 is broken", "b.png": "empty"})
    directory.results.write_text(json.dumps({"caption": "k = 10", "columns": ["a", "b"], "rows": [["1", "2"]]}))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text('{"metric": "loss/dino", "value": 0.25, "step": 20}')
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / "step-00000030" / "student.safetensors").write_bytes(b"weights")
    state = {"step": 30, "scaler": None, "images": "abc"}
    state_file = tmp_path / "step-00000030" / "state.json"
    state_file.write_bytes(sealed(state, {"student.safetensors": digest(b"weights")}))
    return directory


READ: dict[str, Callable[[RunDirectory], object]] = {
    "metrics.jsonl": RunDirectory.read_metrics,
    "skipped.jsonl": RunDirectory.read_skipped,
    "results.json": RunDirectory.read_results,
    "best/best.json": lambda run: Best(run, "loss/dino").value,
    "step-00000030/state.json": lambda run: verified(run.path / "step-00000030"),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_as_it_should_be_or_named(run, name):
    file, chance = run.path / name, random.Random(name)
    messages: list[str] = []
    kinds: set[type] = set()
    content, whole = file.read_bytes(), READ[name](run)
    for _ in range(TIMES):
        file.write_bytes(damaged(content, chance))
        try:
            value = READ[name](run)
        except UserError as error:
            messages.append(str(error))
            kinds.add(type(error))
        else:
            assert type(value) is type(whole)
            assert value == whole or name != "step-00000030/state.json", "damage that nobody has noticed"
    assert len(messages) > TIMES / 10
    assert not [message for message in messages if file.name not in message or "\n" in message]
    assert kinds == {Damaged if name.endswith("state.json") else UserError}


@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_is_named_and_nobody_waits_for_it(run, name):
    file = run.path / name
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=re.escape(file.name)):
        READ[name](run)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(UserError, match=re.escape(file.name)):
        READ[name](run)
