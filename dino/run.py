"""RUN/: what a run leaves on disk, for those who write it and for those who look at it afterwards."""

import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dino.config.read import read
from dino.config.schema import Config
from dino.files import write_text
from dino.seal import verified

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

    def read_config(self) -> Config:
        """The settings of the run, as resolved."""
        return read(Config, self.config)

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; one that a kill cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = []
        for text in self.metrics.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            lines.append({OLD_METRICS.get(name, name): value for name, value in line.items()})
        return lines

    def newest_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of one file of the newest checkpoint; None where there is none; raises `Damaged`."""
        checkpoints = whole_checkpoints(self.checkpoints)
        if not checkpoints or not (checkpoints[-1] / f"{name}.safetensors").is_file():
            return None
        verified(checkpoints[-1])
        return load_file(checkpoints[-1] / f"{name}.safetensors")

    def read_skipped(self) -> dict[str, str]:
        """Unreadable images so far: name to reason."""
        if not self.skipped.exists():
            return {}
        entries = map(json.loads, self.skipped.read_text().splitlines())
        return {entry["name"]: entry["reason"] for entry in entries}

    def write_skipped(self, entries: dict[str, str]) -> None:
        """Replace what skipped.jsonl lists by `entries`, name to reason."""
        if entries:
            write_text(self.skipped, _skipped_lines(entries))
        else:
            self.skipped.unlink(missing_ok=True)

    def add_skipped(self, entries: dict[str, str]) -> None:
        """Append unreadable images, name to reason, to skipped.jsonl; any process may."""
        with self.skipped.open("a") as file:
            file.write(_skipped_lines(entries))


def _skipped_lines(entries: dict[str, str]) -> str:
    """JSON escapes whatever a file name holds: line ends, and bytes that are not UTF-8."""
    return "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in entries.items())


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in RUN/checkpoints, oldest first; partial ones have other names."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
