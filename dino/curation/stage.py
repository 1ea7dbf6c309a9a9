"""Stages of a curation, each done once: a killed run goes on with what is there, a changed setting begins it anew."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from dino.errors import UserError
from dino.files import read_arrays, read_json, read_text, write_text
from dino.seal import file_digest, problem_of


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
            UserError: the folder holds something else, which is left alone; or what was done is damaged.
        """
        begun, done, key = self.folder / "begun.json", self.folder / "done.json", self._key_text()
        if self.accelerator.is_main_process:
            if not (begun.exists() and read_text(begun, self.fix) == key):
                self._clear(begun)
                write_text(begun, key)
            elif done.exists():
                self._verify(done)
        self.accelerator.wait_for_everyone()
        return not done.exists()

    @property
    def fix(self) -> str:
        """What helps where one of its files is damaged."""
        return f"remove {self.folder} and start the same command again, which makes it anew"

    def finish(self) -> None:
        """Mark it as done; every process must call this when its part is."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "begun.json"]
            digests = {path.relative_to(self.folder).as_posix(): file_digest(path) for path in files}
            write_text(self.folder / "done.json", json.dumps(digests, indent=1, sort_keys=True))
        self.accelerator.wait_for_everyone()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an .npz file; raises `UserError` where it is damaged."""
        file = self.folder / name
        try:
            return read_arrays(file)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}): {self.fix}") from error

    def _verify(self, done: Path) -> None:
        """Raise a `UserError` where a file is not what it was when the stage was done."""
        digests = read_json(done, self.fix)
        if isinstance(digests, list):  # of a version that wrote its key there, and no digests
            return
        if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
            raise UserError(f"{done} is damaged: {self.fix}")
        if problem := problem_of(self.folder, digests):
            raise UserError(f"{self.folder} is damaged ({problem}): {self.fix}")

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
        write_text(begun, "")
        for path in content:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
