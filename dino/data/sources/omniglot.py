"""Omniglot (Lake, Salakhutdinov & Tenenbaum 2015): whose drawing, of which character, of which alphabet."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino.data.sources import folder, zip
from dino.data.sources.source import Kind, Names, Source
from dino.errors import UserError
from dino.files import cache_directory

ARTICLE_IMAGES = 9543
DRAWINGS_PER_CHARACTER = 10
TRAINING_DRAWERS = 14  # drawers 1 … 14; the other six are kept for testing


class Drawing(NamedTuple):
    """What an image's path `<Alphabet>/<characterNN>/<id>_<drawer>.png` says of it."""

    alphabet: str
    character: str
    drawer: int


def download() -> Path:
    """Omniglot's background set, fetched once by torchvision; the folder it lies in. Raises `UserError`."""
    from torchvision.datasets import Omniglot  # a second of imports that only a download needs

    root = cache_directory() / "omniglot"
    try:
        Omniglot(str(root), background=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Omniglot cannot be downloaded ({error}): fetch images_background.zip from "
            "https://github.com/brendenlake/omniglot on another machine and name it with --data"
        ) from error
    return root / "omniglot-py" / "images_background"


def parse(name: str) -> Drawing:
    """A drawing from its path; raises `UserError` for another layout."""
    try:
        alphabet, character, file = name.split("/")[-3:]
        return Drawing(alphabet, character, int(file.rsplit(".", 1)[0].rsplit("_", 1)[1]))
    except (ValueError, IndexError) as error:
        raise UserError(f"'{name}' is not laid out as Omniglot: <Alphabet>/<characterNN>/<id>_<drawer>.png") from error


def held_out(names: Iterable[str], seed: int = 42, by_drawer: bool = True) -> np.ndarray:
    """Which drawings are kept for testing, as (N,) bool: those of a fifth of each alphabet's characters, drawn with a
    seed, and those of drawers 15–20 unless `by_drawer` is false. `data.kind=omniglot_train` leaves them out."""
    drawings = [parse(name) for name in names]
    generator = np.random.default_rng(seed)
    test_characters = set()
    for alphabet in sorted({drawing.alphabet for drawing in drawings}):
        characters = sorted({drawing.character for drawing in drawings if drawing.alphabet == alphabet})
        order = generator.permutation(characters)
        test_characters |= {(alphabet, character) for character in order[: round(len(characters) / 5)]}
    of_characters = np.array([(drawing.alphabet, drawing.character) in test_characters for drawing in drawings])
    of_drawers = np.array([drawing.drawer > TRAINING_DRAWERS for drawing in drawings])
    return of_characters | of_drawers if by_drawer else of_characters


def article_subset(names: Iterable[str], seed: int = 42) -> np.ndarray:
    """Indices, ascending, of 9,543 drawings: at most 10 of each character, drawn with a seed.

    The article's own list is not available; this reconstructs its size and its reach over all alphabets. With the
    complete background set (964 characters × 20 drawers) 9,640 are drawn first and 97 of them, at random, left out.
    """
    generator = np.random.default_rng(seed)
    characters: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(names):
        drawing = parse(name)
        characters.setdefault((drawing.alphabet, drawing.character), []).append(index)
    drawings: list[int] = []
    for _, indices in sorted(characters.items()):
        drawings.extend(generator.permutation(indices)[:DRAWINGS_PER_CHARACTER])
    return np.sort(generator.permutation(drawings)[:ARTICLE_IMAGES])


def _accepts(root: str) -> bool:
    return folder.KIND.accepts(root) or zip.KIND.accepts(root)


def _open(root: str) -> Source:
    source = folder.KIND.open(root) if folder.KIND.accepts(root) else zip.KIND.open(root)
    parse(Names(source.names)[0])
    return source


def _for_training(source: Source) -> np.ndarray:
    return np.flatnonzero(~held_out(Names(source.names)))


KIND = Kind(open=_open, accepts=_accepts, channels=1)
TRAINING_KIND = Kind(open=_open, accepts=_accepts, channels=1, subset=_for_training)
