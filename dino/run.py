"""RUN/: what a run leaves on disk, for those who write it and for those who look at it afterwards."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dino.config.bounds import out_of_bounds
from dino.config.read import get, leaves, read, refuse
from dino.config.schema import AUTO, Config
from dino.errors import UserError
from dino.files import append_text, in_the_way, read_json, read_text, write_text
from dino.seal import verified

VERDICT = "health/verdict"  # the one metric that is text
OLD_METRICS = {"health/kl_to_centre": "health/kl_to_center", "health/centre_norm": "health/center_norm"}


class RunDirectory:
    """Paths and small files of one run.

    Args:
        path: RUN, which need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.skipped = self.path / "skipped.jsonl"
        self.report = self.path / "report.html"
        self.results = self.path / "results.json"

    def read_config(self, all_resolved: bool = True) -> Config:
        """The settings of the run, as resolved.

        Args:
            all_resolved: whether none may be missing; earlier versions had fewer, which a run that goes on resolves.

        Raises:
            UserError: config.yaml is damaged.
        """
        try:
            config = read(Config, self.config)
            refuse(list(out_of_bounds(config)))
        except UserError as error:
            source = "" if str(self.config) in str(error) else f"{self.config}: "
            raise UserError(f"{source}{error}") from error
        unresolved = [key for key, leaf in leaves(config).items() if leaf.may_be_auto and get(config, key) == AUTO]
        if all_resolved and unresolved:
            raise UserError(
                f"{self.config} does not say {', '.join(unresolved)}: restore it, or start the command that trained it "
                "again, which writes it anew"
            )
        return config

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; the last is left out where a kill cut it short.

        Raises:
            UserError: another is none.
        """
        fix = "restore it, remove that line, or move the file away, and curves begin anew"
        lines = _json_lines(self.metrics, _is_metrics, fix)
        return [{OLD_METRICS.get(name, name): value for name, value in line.items()} for line in lines]

    def read_results(self) -> dict[str, Any] | None:
        """What a probe has measured, with a `caption` and a table of `columns` and `rows`; None: nothing yet.

        Raises:
            UserError: results.json is damaged.
        """
        if not self.results.exists():
            return None
        fix = "remove it, and measure again"
        results = read_json(self.results, fix)
        if not (isinstance(results, dict) and isinstance(results.get("caption"), str) and _is_table(results)):
            raise UserError(f"{self.results} holds no table of results: {fix}")
        return results

    def newest_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of one file of the newest checkpoint; None where there is none; raises `Damaged`."""
        checkpoints = whole_checkpoints(self.checkpoints)
        if not checkpoints or not (checkpoints[-1] / f"{name}.safetensors").is_file():
            return None
        verified(checkpoints[-1])
        return load_file(checkpoints[-1] / f"{name}.safetensors")

    def read_skipped(self) -> dict[str, str]:
        """Unreadable images so far: name to reason."""
        entries = _json_lines(self.skipped, _is_skipped, "remove it, and it is written anew")
        return {entry["name"]: entry["reason"] for entry in entries}

    def write_skipped(self, entries: dict[str, str]) -> None:
        """Replace what skipped.jsonl lists by `entries`, name to reason."""
        if entries:
            write_text(self.skipped, _skipped_lines(entries))
        else:
            self.skipped.unlink(missing_ok=True)

    def add_skipped(self, entries: dict[str, str]) -> None:
        """Append unreadable images, name to reason, to skipped.jsonl; any process may."""
        append_text(self.skipped, _skipped_lines(entries))


def require_free_places(directory: Path, folders: Iterable[str], files: Iterable[str]) -> None:
    """Raise a `UserError` where a run directory, or a place in it, is not free for what is going to be written there.

    Args:
        folders, files: that are going to be, by their paths in the directory.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file: name another directory")
    places = dict.fromkeys(("", *folders), True) | dict.fromkeys(files, False)
    for name, is_folder in places.items():
        if problem := in_the_way(directory / name, is_folder):
            raise UserError(
                f"{directory / name} is in the way of the run, which writes there ({problem}): change that, move it "
                "elsewhere, or name another run.dir"
            )


def _json_lines(path: Path, is_right: Callable[[Any], bool], fix: str) -> list[dict[str, Any]]:
    """The objects of a file's lines; the last is left out where it was cut short.

    Args:
        is_right: whether what a line says is what belongs there.
    """
    if not path.exists():
        return []
    texts = read_text(path, fix).removesuffix("\n").split("\n")
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):
                break
            line = None
        if not is_right(line):
            raise UserError(f"{path}, line {number} is damaged: {fix}")
        lines.append(line)
    return lines


def _is_metrics(line: Any) -> bool:
    """Numbers by name, and the verdict in words."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return False
    return all(isinstance(value, str) if name == VERDICT else _is_number(value) for name, value in line.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_skipped(line: Any) -> bool:
    return isinstance(line, dict) and all(isinstance(line.get(name), str) for name in ("name", "reason"))


def _is_table(results: dict[str, Any]) -> bool:
    columns, rows = results.get("columns"), results.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return False
    lines = [columns, *rows]
    return all(isinstance(line, list) and all(isinstance(cell, str) for cell in line) for line in lines)


def _skipped_lines(entries: dict[str, str]) -> str:
    """JSON escapes whatever a file name holds: line ends, and bytes that are not UTF-8."""
    return "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in entries.items())


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in RUN/checkpoints, oldest first; partial ones have other names."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
