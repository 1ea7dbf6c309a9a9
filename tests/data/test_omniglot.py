"""Which drawings of Omniglot are kept out of pre-training, so that a readout can test on what no weight has seen."""

import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch

from dino.data import fingerprint, open_images
from dino.data.sources.omniglot import held_out, parse


@pytest.fixture(scope="module")
def names(omniglot_zip) -> list[str]:
    return list(open_images(str(omniglot_zip), "omniglot").names)


def characters(names, chosen) -> dict[str, dict[str, list[int]]]:
    """The drawers of each character of each alphabet, of the drawings chosen."""
    found = defaultdict(lambda: defaultdict(list))
    for name, wanted in zip(names, chosen, strict=True):
        drawing = parse(name)
        if wanted:
            found[drawing.alphabet][drawing.character].append(drawing.drawer)
    return found


class TestHeldOut:
    def test_six_drawers_and_a_fifth_of_the_characters_of_each_alphabet(self, names):
        everything, left = characters(names, [True] * len(names)), characters(names, held_out(names))
        assert len(everything) == 30
        for alphabet, drawn in everything.items():
            whole = [character for character in drawn if sorted(left[alphabet][character]) == list(range(1, 21))]
            others = [sorted(left[alphabet][character]) for character in drawn if character not in whole]
            assert len(whole) == round(len(drawn) / 5), alphabet
            assert others == [list(range(15, 21))] * len(others), alphabet

    def test_without_drawers_only_characters(self, names):
        both, only = held_out(names), held_out(names, by_drawer=False)
        by_character = {
            (parse(name).alphabet, parse(name).character) for name, left in zip(names, only, strict=True) if left
        }
        assert sum(only) == 20 * len(by_character)
        assert not (only & ~both).any()
        assert {parse(name).drawer for name, left in zip(names, both & ~only, strict=True) if left} == set(
            range(15, 21)
        )

    def test_is_drawn_once_and_for_all(self, names):
        assert np.array_equal(held_out(names), held_out(list(names)))
        assert not np.array_equal(held_out(names, seed=43), held_out(names))

    def test_neither_order_nor_place_of_the_drawings_matters(self, names):
        order = np.random.default_rng(0).permutation(len(names))
        assert np.array_equal(held_out([names[index] for index in order]), held_out(names)[order])
        elsewhere = ["somewhere/" + "/".join(name.split("/")[-3:]) for name in names]
        assert np.array_equal(held_out(elsewhere), held_out(names))

    def test_characters_are_not_always_the_first(self, names):
        """A permutation of each alphabet: of 30 alphabets, some leave out other places than others."""
        places = set()
        for alphabet, drawn in characters(names, held_out(names, by_drawer=False)).items():
            known = sorted({parse(name).character for name in names if parse(name).alphabet == alphabet})
            places |= {known.index(character) for character in drawn}
        assert len(places) > 30


class TestTrainingPart:
    def test_is_the_rest_of_the_pool(self, omniglot_zip):
        whole, part = (open_images(str(omniglot_zip), kind) for kind in ("omniglot", "omniglot_train"))
        left = held_out(whole.names)
        assert (part.kind, part.channels) == ("omniglot_train", 1)
        assert list(part.names) == [name for name, out in zip(whole.names, left, strict=True) if not out]
        assert not held_out(whole.names)[np.isin(whole.names, part.names)].any()
        assert 0.5 < len(part.names) / len(whole.names) < 0.6  # 14 of 20 drawers, four fifths of the characters
        assert fingerprint(part) != fingerprint(whole), "a run must not be resumed with the other pool"

    def test_names_labels_and_pixels_belong_together(self, omniglot_zip):
        whole, part = (open_images(str(omniglot_zip), kind) for kind in ("omniglot", "omniglot_train"))
        places = {name: index for index, name in enumerate(whole.names)}
        assert len(part.labels) == len(part.names)
        copied = pickle.loads(pickle.dumps(part))  # as worker processes get it
        for index in range(0, len(part.names), 397):
            place = places[part.names[index]]
            assert part.labels[index] == whole.labels[place] == parse(part.names[index]).alphabet
            assert torch.equal(part.read(index), whole.read(place))
            assert torch.equal(copied.read(index), whole.read(place))
