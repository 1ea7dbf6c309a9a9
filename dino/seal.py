"""A checkpoint's seal: state.json holds a digest of every file, and one of itself, so that no change goes unnoticed."""

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dino.errors import UserError
from dino.files import read_json, require_regular

STATE = "state.json"
FILES, OWN = "files", "digest"  # keys of state.json: digest of each other file by name, and that of all the rest
logger = logging.getLogger(__name__)


class Damaged(UserError):
    """A checkpoint is not as it was written.

    Args:
        what: which file, and what is wrong with it.
    """

    def __init__(self, checkpoint: Path, what: str):
        self.what = f"the checkpoint {checkpoint} is damaged: {what}"
        super().__init__(
            f"{self.what}. Restore it from a copy, or go on from the newest whole one with train.resume=newest_whole"
        )


def digest(content: bytes) -> str:
    """SHA-256, for which processors have units: of hashlib's the fastest there."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """The same of a file, which is read once and never as a whole; raises OSError, also where it is no ordinary one."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(state: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """The content of state.json.

    Args:
        state: JSON values, under names of their own.
        digests: of every other file, by name.
    """
    content = {**state, FILES: dict(digests)}
    return json.dumps({**content, OWN: _own_digest(content)}, indent=1, sort_keys=True).encode()


def problem_of(folder: Path, digests: Mapping[str, str]) -> str:
    """What is wrong with the files of a folder, the first in order; nothing if all are as they were written.

    Args:
        digests: by name.
    """
    with ThreadPoolExecutor() as threads:  # hashing leaves Python to the others
        problems = list(threads.map(lambda entry: _problem(folder, *entry), sorted(digests.items())))
    return next(filter(None, problems), "")


def verified(checkpoint: Path) -> dict[str, Any]:
    """What state.json holds, once all files are known to be as they were written; without `FILES` in older versions'.

    Raises:
        Damaged: one of them is not, or not there.
    """
    try:
        state = read_json(checkpoint / STATE)
    except UserError as error:
        raise Damaged(checkpoint, str(error)) from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise Damaged(checkpoint, f"{STATE} holds no state")
    number = checkpoint.name.removeprefix("step-")
    if number != checkpoint.name and number.isdecimal() and int(number) != state["step"]:
        raise Damaged(checkpoint, f"{STATE} is of step {state['step']}")
    if FILES not in state and OWN not in state:
        logger.warning("%s is of a version that wrote no digests: damage in it may go unnoticed", checkpoint)
        return state
    own = state.pop(OWN, None)
    if own != _own_digest(state):
        raise Damaged(checkpoint, f"{STATE} has changed since it was written")
    if problem := problem_of(checkpoint, state[FILES]):
        raise Damaged(checkpoint, problem)
    return state


def _own_digest(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def _problem(folder: Path, name: str, expected: str) -> str:
    """What is wrong with a file; nothing if it is whole."""
    try:
        is_whole = file_digest(folder / name) == expected
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return "" if is_whole else f"{name} has changed since it was written"
