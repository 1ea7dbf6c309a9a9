"""RUN/best: the backbone of the moment at which a metric was best (`train.keep_best`)."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dino.errors import UserError
from dino.files import read_json, write_text
from dino.run import RunDirectory


class Best:
    """What the best value of a metric was so far, also before the run was stopped.

    Args:
        metric: by its name in metrics.jsonl; larger is better, but of a loss; None: nothing is kept.
    """

    def __init__(self, directory: RunDirectory, metric: str | None):
        self.folder, self.metric = directory.path / "best", metric
        self.file = self.folder / "best.json"
        self.sign = -1 if (metric or "").startswith("loss/") else 1
        self.value = -math.inf * self.sign
        if metric is not None and self.file.exists():
            self.value = self._earlier_value()

    def is_beaten_by(self, line: Mapping[str, Any], indicators: Iterable[str]) -> bool:
        """Whether a line of metrics.jsonl has a better value; not where the metric was not due.

        Args:
            indicators: names that a line has when they are due.

        Raises:
            UserError: the run does not measure this metric.
        """
        if self.metric is None:
            return False
        if self.metric in line:
            return self.sign * line[self.metric] > self.sign * self.value
        if self.metric not in indicators:
            numbers = {name for name, value in line.items() if isinstance(value, float)}
            names = sorted(name for name in numbers.union(indicators) if name.startswith(("loss/", "health/")))
            raise UserError(f"train.keep_best={self.metric}: this run measures no such thing, but {', '.join(names)}")
        return False

    def _earlier_value(self) -> float:
        """Of an earlier start; raises `UserError` where it cannot be read."""
        fix = "remove it, and the best is looked for from here on"
        earlier = read_json(self.file, fix)
        value = earlier.get("value") if isinstance(earlier, dict) else None
        if not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"{self.file} holds no best value: {fix}")
        return value if earlier.get("metric") == self.metric else self.value

    def record(self, line: Mapping[str, Any]) -> None:
        """Remember a line's value as the best; its backbone has been written."""
        assert self.metric is not None
        self.value = line[self.metric]
        content = {"metric": self.metric, "value": self.value, "step": line["step"]}
        write_text(self.file, json.dumps(content, indent=1) + "\n")
