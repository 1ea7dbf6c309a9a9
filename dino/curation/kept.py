"""What a curation keeps, as files for other programs: copied or linked into a folder, or listed."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dino.data import Limits, Pool, UnreadableImage, open_images
from dino.data.formats import EXTENSIONS, open_picture
from dino.errors import UserError
from dino.files import replacing, shown, write_text

WAYS = ("copy", "link", "list")
MARK = (
    ".dino-kept"  # a file that says whose folder it is: an interrupted copy goes on, and nothing else is written over
)
logger = logging.getLogger(__name__)


def check_target(way: str, target: Path, roots: Iterator[str]) -> None:
    """Raise a `UserError`, before the work, where kept images cannot be put there.

    Args:
        way: one of `WAYS`.
        roots: where the images come from.
    """
    resolved = target.resolve()
    if way == "list":
        if target.is_dir() or target.suffix != ".txt":
            raise UserError(f"--list {target}: name a file that ends in .txt")
        return
    for root in roots:
        pool = Path(root).expanduser().resolve()
        if resolved.is_relative_to(pool) or pool.is_relative_to(resolved):
            raise UserError(f"--{way} {target} and the images of {root} lie in each other: name a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise UserError(f"--{way} {target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        raise UserError(f"--{way} {target} is not empty: name another folder")


def write_kept(manifest: Path, way: str, target: Path) -> int:
    """Put the images that a manifest keeps where they are wanted, each once whatever its weight; how many there are.

    A folder gets them under their names in the pool. What an interrupted call has written is not written again.

    Args:
        way: `copy`, `link` (for images that are files) or `list` (a path on each line; of an archive's, its name).

    Raises:
        UserError: another curation's images are there, or some are no files and cannot be linked.
    """
    images = open_images(manifest)
    if way == "list":
        paths = [str(images.location(index) or images.names[index]) for index in range(len(images.names))]
        if broken := next((path for path in paths if "\n" in path or "\r" in path), None):
            raise UserError(f"{shown(broken)} has a line's end in its name, which no list can hold: use --copy")
        write_text(target, "".join(f"{path}\n" for path in paths))
        return len(paths)
    _claim(images, way, target)
    bar = tqdm(range(len(images.names)), desc=f"{way} kept images", unit="image", leave=False)
    return sum(_put(images, index, way, target) for index in bar)


def _claim(images: Pool, way: str, target: Path) -> None:
    """Mark a folder as that of these images; raises `UserError` where it is that of others."""
    digest = hashlib.sha256(way.encode())
    for name in images.names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    mark = target / MARK
    target.mkdir(parents=True, exist_ok=True)
    if mark.is_file() and mark.read_text(encoding="utf-8") != digest.hexdigest():
        raise UserError(f"{target} holds what another curation kept: name another folder, or remove this one")
    write_text(mark, digest.hexdigest())


def _put(images: Pool, index: int, way: str, target: Path) -> bool:
    """One image; False, with a warning, where it cannot be read any more."""
    name = images.names[index]
    try:
        if way == "link":
            source = images.location(index)
            if source is None:
                raise UserError(f"{shown(name)} is no file that a link could lead to: use --copy")
            return _link(source.resolve(), _inside(target, name))
        content = images.content(index)
        if isinstance(content, Tensor):
            raise UserError(f"{shown(name)} is no file that could be copied")
        file = _inside(target, name if name.lower().endswith(EXTENSIONS) else name + _ending(content))
        if not (file.is_file() and file.stat().st_size == len(content)):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file, durable=False) as partial:
                partial.write_bytes(content)
        return True
    except UnreadableImage as reason:
        logger.warning("left out: %s: %s", shown(name), reason)
        return False


def _link(source: Path, file: Path) -> bool:
    if not source.is_file():
        raise UnreadableImage("it is gone")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_symlink():
        os.symlink(source, file)
    return True


def _inside(target: Path, name: str) -> Path:
    """Where an image of this name goes: below the folder, whatever an archive or a list calls it."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    parts = [part.replace(":", "_") for part in parts]  # of URLs, and of drives
    return target.joinpath(*parts)


def _ending(content: bytes) -> str:
    """Of a file whose name has none, as rows of tables have."""
    try:
        with open_picture(content, Limits()) as image:
            return f".{str(image.format).lower().replace('jpeg', 'jpg')}"
    except (OSError, UnreadableImage, Image.DecompressionBombError):
        return ""
