"""Stages of a curation, each done once: a killed run goes on with what is there, a changed setting begins it anew."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dino.errors import UserError
from dino.files import write_text


class Stage:
    """A folder of a stage's files, and the key of all that they depend on.

    Args:
        folder: RUN/…
        key: JSON values of all that the stage depends on, the stages before included.
    """

    def __init__(self, folder: Path, key: list[Any], accelerator: Accelerator):
        self.folder, self.key, self.accelerator = folder, key, accelerator

    def begin(self) -> bool:
        """Whether there is work to do; what was made by another key is removed. Every process must call this.

        Raises:
            UserError: the folder holds something else, which is left alone.
        """
        begun, done, key = self.folder / "begun.json", self.folder / "done.json", self._key_text()
        if self.accelerator.is_main_process and not (begun.exists() and begun.read_text() == key):
            self._clear(begun)
            write_text(begun, key)
        self.accelerator.wait_for_everyone()
        return not done.exists()

    def finish(self) -> None:
        """Mark it as done; every process must call this when its part is."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text(self.folder / "done.json", self._key_text())
        self.accelerator.wait_for_everyone()

    def _key_text(self) -> str:
        return json.dumps(self.key, sort_keys=True)

    def _clear(self, begun: Path) -> None:
        """Leave nothing but `begun`, which says nothing from the start on: a kill leaves what must be cleared again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = [path for path in self.folder.iterdir() if path != begun]
        if content and not begun.exists():
            raise UserError(
                f"{self.folder} holds files that no curation made, for example {content[0].name}: move it elsewhere, "
                "or name another run.dir"
            )
        begun.write_text("")
        for path in content:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
