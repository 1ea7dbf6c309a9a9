"""Stages of a curation, each done once: a killed run goes on with what is there, a changed setting begins it anew."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Stage:
    """A folder of a stage's files, and the key of all that they depend on.

    Args:
        folder: RUN/…
        key: JSON values of all that the stage depends on, the stages before included.
    """

    def __init__(self, folder: Path, key: list[Any], accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.key = json.dumps(key, sort_keys=True)

    def begin(self) -> bool:
        """Whether there is work left; what was made by another key is removed. Every process must call this."""
        begun, done = self.folder / "begun.json", self.folder / "done.json"
        if self.accelerator.is_main_process and not (begun.exists() and begun.read_text() == self.key):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            begun.write_text(self.key)
        self.accelerator.wait_for_everyone()
        return not done.exists()

    def finish(self) -> None:
        """Mark it as done; every process must call this when its part is."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (self.folder / "done.json").write_text(self.key)
        self.accelerator.wait_for_everyone()
