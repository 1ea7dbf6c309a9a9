"""Omniglot (Lake, Salakhutdinov & Tenenbaum 2015): whose drawing, of which character, of which alphabet."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dino.errors import UserError

ARTICLE_IMAGES = 9543
DRAWINGS_PER_CHARACTER = 10


class Drawing(NamedTuple):
    """What an image's path `<Alphabet>/<characterNN>/<id>_<drawer>.png` says of it."""

    alphabet: str
    character: str
    drawer: int


def parse(name: str) -> Drawing:
    """A drawing from its path; raises `UserError` for another layout."""
    try:
        alphabet, character, file = name.split("/")[-3:]
        return Drawing(alphabet, character, int(file.rsplit(".", 1)[0].rsplit("_", 1)[1]))
    except (ValueError, IndexError) as error:
        raise UserError(f"'{name}' is not laid out as Omniglot: <Alphabet>/<characterNN>/<id>_<drawer>.png") from error


def article_subset(names: Sequence[str], seed: int = 42) -> np.ndarray:
    """Indices, ascending, of 9,543 drawings: at most 10 of each character, drawn with a seed.

    The article's own list is not available; this reconstructs its size and its reach over all alphabets. With the
    complete background set (964 characters × 20 drawers) 9,640 are drawn first and 97 of them, at random, left out.
    """
    generator = np.random.default_rng(seed)
    characters: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(names):
        drawing = parse(name)
        characters.setdefault((drawing.alphabet, drawing.character), []).append(index)
    drawn = [generator.permutation(indices)[:DRAWINGS_PER_CHARACTER] for _, indices in sorted(characters.items())]
    pool = np.concatenate(drawn)
    return np.sort(generator.permutation(pool)[:ARTICLE_IMAGES])
