"""RUN/: what a run leaves on disk, and the refusal to mix two runs in one place."""

import json
import re
import shutil
from pathlib import Path

from dino.config import read as configuration
from dino.config.read import Config, get, leaves
from dino.errors import UserError
from dino.training.checkpoint import whole_checkpoints

MAY_DIFFER = (  # on resume
    "train.steps",
    "train.epochs",
    "train.time_limit",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.resume",
    "train.cpu_threads",
    "train.shard",
    "train.checkpoint_blocks",
    "data.cache",
    "data.workers",
    "run.dir",
)
MAY_DIFFER_GROUPS = ("tracking.", "monitor.")


class RunDirectory:
    """Paths and small files of one run.

    Args:
        path: RUN, which need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.skipped = self.path / "skipped.txt"
        self.report = self.path / "report.html"
        self.results = self.path / "results.json"

    def earlier_config(self, resume: str) -> Config | None:
        """The config of the run that is already here, or None for a fresh directory.

        Raises:
            UserError: the directory holds something else, or a run while `train.resume=never`.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir={self.path} is a file: name another directory")
        if not self.path.exists() or not any(map(self._is_somebodys, self.path.iterdir())):
            return None
        if not self.config.exists():
            raise UserError(f"run.dir={self.path} is not empty and holds no run: name another directory")
        if resume == "never":
            raise UserError(
                f"run.dir={self.path} already holds a run and train.resume=never: "
                "name another directory, or go on from its newest checkpoint with train.resume=auto"
            )
        return configuration.load(self.config)

    def _is_somebodys(self, path: Path) -> bool:
        """Whether it is more than what a run leaves that is killed before it has written its config."""
        return not path.name.endswith(".partial") and not (path == self.checkpoints and not any(path.iterdir()))

    def refuse_other_config(self, config: Config, earlier: Config) -> None:
        """Raise a `UserError` if resuming with `config` would make another run of it."""
        changed = [
            f"{key}: {get(earlier, key)} there, {get(config, key)} now"
            for key, _ in leaves()
            if key not in MAY_DIFFER and not key.startswith(MAY_DIFFER_GROUPS) and get(earlier, key) != get(config, key)
        ]
        if changed:
            raise UserError(
                f"run.dir={self.path} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse its settings to resume it, or name another directory with run.dir=…; nothing was changed"
            )

    def starting_point(self, resume: str) -> Path | None:
        """The checkpoint to go on from: the newest here, the one named by `resume`, or None."""
        if resume in ("auto", "never"):
            return next(reversed(whole_checkpoints(self.checkpoints)), None)
        path = Path(resume)
        mine = whole_checkpoints(self.checkpoints)
        if mine and path.resolve().parent != self.checkpoints.resolve():
            return mine[-1]  # an earlier start of this command went on from `path`
        if not (path / "state.json").exists():
            raise UserError(f"train.resume={resume} is no checkpoint: name a folder like RUN/checkpoints/step-00000500")
        return path

    def prepare(self, config: Config, step: int) -> None:
        """Write the config, sweep up what a killed run left half done, and drop metrics after `step`."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for left in [*self.checkpoints.glob(".*"), *self.path.glob(".*.partial")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for later in whole_checkpoints(self.checkpoints):
                if int(later.name.removeprefix("step-")) > step:
                    shutil.rmtree(later)
            _replace(self.config, configuration.dump(config))
            if self.metrics.exists():
                lines = [line for line in self.read_metrics() if line["step"] <= step > 0]
                _replace(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be written: {error.strerror or error}") from error

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl so far; a line that a killed process left half written is dropped."""
        lines = []
        for text in self.metrics.read_text().splitlines() if self.metrics.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return lines

    def write_skipped(self, entries: list[tuple[str, str]]) -> None:
        """Replace what skipped.txt lists by `entries`, (name, reason)."""
        self.skipped.unlink(missing_ok=True)
        if entries:
            self.add_skipped(entries)

    def add_skipped(self, entries: list[tuple[str, str]]) -> None:
        """Append unreadable images, (name, reason), to skipped.txt; any process may."""
        lines = "".join(f"{_escape(name)}\t{_escape(reason)}\n" for name, reason in entries)
        with self.skipped.open("a", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.write(lines)

    def read_skipped(self) -> dict[str, str]:
        """Unreadable images so far: name to reason."""
        if not self.skipped.exists():
            return {}
        lines = self.skipped.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        pairs = (line.split("\t", 1) for line in lines if "\t" in line)
        return {_unescape(name): _unescape(reason) for name, reason in pairs}


ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _escape(text: str) -> str:
    """Tabs and line ends, which a file name may hold, as \\t, \\n and \\r."""
    return "".join(ESCAPES.get(character, character) for character in text)


def _unescape(text: str) -> str:
    written = {escaped: plain for plain, escaped in ESCAPES.items()}
    return re.sub(r"\\[\\tnr]", lambda match: written[match[0]], text)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
