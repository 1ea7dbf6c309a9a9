"""Omniglot's protocols on a small pool that is laid out like it: who is tested on what, and what a backbone sees."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dino.data.sources import omniglot as names_of_omniglot
from dino.data.sources.omniglot import article_subset, held_out, parse
from dino.errors import UserError
from dino.evaluation import omniglot
from dino.evaluation.omniglot import article_input, drawings, input_size, own_input, probe_splits, splits
from dino.evaluation.probes import Answers
from dino.models import Preprocess, ResNet, ResNetSpec, VisionTransformer, ViTSpec

CHARACTERS = {"Alphaic": 5, "Betaic": 11, "Gammaic": 8}
SPLITS = ["random", "by drawer", "by character", "1 label", "2 labels", "5 labels", "10 labels"]
NAMES = [
    f"images_background/{alphabet}/character{character:02d}/{100 * number + character:04d}_{drawer:02d}.png"
    for number, (alphabet, count) in enumerate(CHARACTERS.items())
    for character in range(1, count + 1)
    for drawer in range(1, 21)
]


class Pool:
    """Drawings of noise, in an order that says nothing."""

    channels, kind, labels = 1, "omniglot", None

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.names = [NAMES[place] for place in generator.permutation(len(NAMES))]
        self.pixels = torch.from_numpy(generator.integers(0, 256, (len(NAMES), 1, 33, 33), dtype=np.uint8))

    def read(self, index: int, enough: float | None = None) -> torch.Tensor:
        return self.pixels[index]


@pytest.fixture(scope="module")
def data() -> omniglot.Drawings:
    return drawings(Pool())


def parsed(data: omniglot.Drawings, chosen: np.ndarray) -> list:
    return [parse(data.images.names[data.indices[place]]) for place in chosen]


class TestDrawings:
    def test_ten_drawings_of_each_character(self):
        pool = Pool()
        subset = article_subset(pool.names)
        assert subset.tolist() == sorted(set(subset.tolist()))
        counts = Counter(parse(pool.names[index])[:2] for index in subset)
        assert len(counts) == sum(CHARACTERS.values())
        assert set(counts.values()) == {10}
        assert {parse(pool.names[index]).drawer for index in subset} == set(range(1, 21))
        assert not np.array_equal(article_subset(pool.names, seed=1), subset)

    def test_fewer_where_a_character_has_fewer(self):
        names = [name for name in NAMES if "Alphaic/character01" not in name or name.endswith(("_03.png", "_17.png"))]
        counts = Counter(parse(names[index])[:2] for index in article_subset(names))
        assert counts.pop(("Alphaic", "character01")) == 2
        assert set(counts.values()) == {10}

    def test_what_is_too_many_is_left_out_anywhere(self, monkeypatch):
        whole = article_subset(NAMES)
        monkeypatch.setattr(names_of_omniglot, "ARTICLE_IMAGES", 200)
        subset = article_subset(NAMES)
        assert len(subset) == len(set(subset)) == 200
        assert set(subset) < set(whole)
        assert {parse(NAMES[index]).alphabet for index in set(whole) - set(subset)} == set(CHARACTERS)

    def test_labels_are_alphabets_and_the_split_has_every_drawing_once(self, data):
        assert data.labels.tolist() == [drawing.alphabet for drawing in parsed(data, np.arange(240))]
        assert sorted([*data.train, *data.test]) == list(range(240))
        assert len(data.test) == 72

    def test_split_is_scikit_learns_of_seed_42_and_always_the_same(self, data):
        train, test = train_test_split(list(range(240)), test_size=0.3, random_state=42)
        assert (data.train.tolist(), data.test.tolist()) == (train, test)
        assert np.array_equal(drawings(Pool()).test, data.test)

    def test_left_out_are_those_that_pretraining_may_not_see(self, data):
        wanted = held_out(data.images.names)
        assert data.held_out.tolist() == [bool(wanted[data.indices[place]]) for place in data.test]
        new = {drawing.drawer for drawing, left in zip(parsed(data, data.test), data.held_out, strict=True) if not left}
        assert max(new) == 14
        assert 0 < data.held_out.sum() < len(data.test)

    def test_chance_names_the_most_frequent_alphabet_of_the_training_part(self, data):
        assert data.chance == np.mean(data.labels[data.test] == "Betaic")
        labels = np.array(["a", "a", "b", "b", "b", "a"])  # most frequent in training: a; in the test: b
        turned = omniglot.Drawings(data.images, np.arange(6), labels, np.array([0, 1, 2]), np.array([3, 4, 5]))
        assert turned.chance == pytest.approx(1 / 3)

    def test_pool_that_is_not_the_protocols_is_said(self):
        assert omniglot.check_drawings([f"A{n}/c01/0001_01.png" for n in range(30)]) == ""
        assert "3 alphabets instead of 30" in omniglot.check_drawings(NAMES)
        with pytest.raises(UserError, match="1 alphabet"):
            omniglot.check_drawings(NAMES[:20])


class TestSplits:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_training_and_test_have_every_drawing_once(self, data, seed):
        found = splits(data, seed)
        assert list(found) == SPLITS
        for train, test in found.values():
            assert sorted([*train, *test]) == list(range(240))

    def test_random_is_70_to_30(self, data):
        assert len(splits(data, 0)["random"][1]) == 72

    def test_by_drawer_tests_on_drawers_who_are_new(self, data):
        (train, test), (_, again) = (splits(data, seed)["by drawer"] for seed in (0, 1))
        assert {drawing.drawer for drawing in parsed(data, test)} == set(range(15, 21))
        assert {drawing.drawer for drawing in parsed(data, train)} == set(range(1, 15))
        assert np.array_equal(test, again)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_by_character_tests_on_a_fifth_of_the_characters_never_seen(self, data, seed):
        train, test = splits(data, seed)["by character"]
        seen, new = ({drawing[:2] for drawing in parsed(data, part)} for part in (train, test))
        assert not seen & new
        assert Counter(alphabet for alphabet, _ in new) == {"Alphaic": 1, "Betaic": 2, "Gammaic": 2}  # of 5, 11, 8
        assert min(Counter(drawing.drawer > 14 for drawing in parsed(data, test)).values()) > 5  # of all drawers

    @pytest.mark.parametrize(("count", "name"), omniglot.FEW.items())
    def test_few_labels_are_so_many_of_each_alphabet(self, data, count, name):
        train, _ = splits(data, 0)[name]
        assert len(train) == len(set(train))
        assert Counter(data.labels[train].tolist()) == dict.fromkeys(CHARACTERS, count)

    def test_seeds_draw_anew_and_again_the_same(self, data):
        drawn = [splits(data, seed) for seed in (0, 1, 2, 3, 3)]
        for name in ("random", "by character", "5 labels"):
            tests = [found[name][1] for found in drawn]
            assert np.array_equal(tests[-1], tests[-2]), name
            assert len({tuple(sorted(test)) for test in tests}) > 2, name  # characters of few are sometimes the same


def marks(data: omniglot.Drawings, spread: float) -> np.ndarray:
    """Features (240, 3) that tell alphabets apart, better or worse."""
    names = np.array(list(CHARACTERS))
    noise = np.random.default_rng(0).normal(size=(240, 3))
    return ((data.labels[:, None] == names) + spread * noise).astype(np.float32)


@pytest.fixture(scope="module")
def found(data) -> dict:
    """The outcome of features that are neither perfect nor useless."""
    return probe_splits(data, marks(data, 0.4), "marks", seeds=2)


class TestStandard:
    def test_every_split_and_number_of_labels_by_both_probes(self, found):
        for probe in ("logistic", "knn"):
            assert list(found[probe]) == SPLITS
            assert all(0 < mean <= 1 for mean, _ in found[probe].values())
            assert found[probe]["10 labels"][0] > found[probe]["1 label"][0]
        assert found["logistic"]["random"][1] > 0
        assert found["knn"]["by drawer"][1] == 0  # the same split for all seeds

    def test_confusion_counts_each_test_drawing_of_the_random_splits(self, data, found):
        truth = Counter(label for seed in range(2) for label in data.labels[splits(data, seed)["random"][1]].tolist())
        confusion = np.array(found["confusion"])
        assert confusion.sum(axis=1).tolist() == [truth[name] for name in sorted(CHARACTERS)]
        assert np.trace(confusion) / 144 == pytest.approx(found["logistic"]["random"][0])
        assert 0 < np.trace(confusion) < confusion.sum() == 144
        assert found["per_alphabet"]["Betaic"] == confusion[1, 1] / truth["Betaic"]

    def test_confusion_has_truth_in_rows_and_answers_in_columns(self, data, monkeypatch):
        def always_gammaic(train, labels, test, **options):
            return Answers(np.full(len(test), "Gammaic"), converged=True)

        monkeypatch.setattr(omniglot, "logistic", always_gammaic)
        outcome = probe_splits(data, marks(data, 0.4), "marks", seeds=1)
        confusion = np.array(outcome["confusion"])
        assert confusion[:, :2].sum() == 0
        assert (confusion[:, 2] > 0).all()
        assert outcome["logistic"]["random"][0] == confusion[2, 2] / 72

    def test_accuracies_are_those_of_the_splits_by_hand(self, data, found):
        """By the simplest probe, the nearest neighbour of few labels."""
        features = marks(data, 0.4)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        for name in ("1 label", "5 labels"):
            accuracies = []
            for seed in range(2):
                train, test = splits(data, seed)[name]
                neighbours = train[(features[test] @ features[train].T).argmax(axis=1)]
                accuracies.append(np.mean(data.labels[neighbours] == data.labels[test]))
            assert found["knn"][name] == pytest.approx([np.mean(accuracies), np.std(accuracies)], abs=1e-9)

    def test_alphabets_well_apart_are_told_everywhere(self, data):
        outcome = probe_splits(data, marks(data, 0.001), "marks", seeds=1)
        assert {mean for probe in ("logistic", "knn") for mean, _ in outcome[probe].values()} == {1.0}

    def test_features_that_say_nothing_are_at_chance(self, data):
        noise = np.random.default_rng(1).normal(size=(240, 6)).astype(np.float32)
        outcome = probe_splits(data, noise, "noise", seeds=2)
        assert outcome["logistic"]["random"][0] < 0.6
        assert outcome["knn"]["by character"][0] < 0.6


def backbone(image_size: int, patch: int | None, channels: int = 3, trained: bool = False):
    """Without its weights, only what inputs depend on: sizes, channels and preprocessing."""
    if patch is None:
        made = ResNet(ResNetSpec("resnet18", channels))
    else:
        made = VisionTransformer(ViTSpec(8, 1, 2, patch, patch * 2, channels))
    made.preprocess = Preprocess(image_size, [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels])
    made.description = {"training": {"seed": 0}} if trained else {}
    return made


class TestInputs:
    @pytest.mark.parametrize(
        ("image_size", "patch", "wanted"),
        [
            (224, 14, 98),
            (518, 14, 98),
            (224, 16, 96),  # 98 / 16 = 6.1
            (224, 8, 96),
            (98, 7, 98),
            (28, 4, 28),
            (32, 8, 32),
            (32, 16, 32),
            (224, None, 98),
            (64, None, 64),
        ],
    )
    def test_size_is_98_or_the_weights_own_as_patches_divide_it(self, image_size, patch, wanted):
        assert input_size(backbone(image_size, patch)) == wanted

    @pytest.mark.parametrize("antialias", [False, True])
    @pytest.mark.parametrize("side", [105, 33])
    def test_article_input_is_to_tensor_then_resize(self, side, antialias):
        pixels = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
        plain = transforms.Compose([transforms.ToTensor(), transforms.Resize((98, 98), antialias=antialias)])
        wanted = plain(Image.fromarray(pixels))
        found = article_input(torch.from_numpy(pixels)[None], backbone(224, 14), antialias)
        assert found.shape == (3, 98, 98)
        assert torch.allclose(found, wanted.expand(3, -1, -1), atol=1e-6)

    def test_article_input_for_other_sizes_is_resized_once_more(self):
        pixels = np.random.default_rng(0).integers(0, 256, (105, 105), dtype=np.uint8)
        steps = [transforms.Resize((98, 98), antialias=False), transforms.Resize((28, 28), antialias=True)]
        wanted = transforms.Compose([transforms.ToTensor(), *steps])(Image.fromarray(pixels))
        found = article_input(torch.from_numpy(pixels)[None], backbone(28, 4, channels=1))
        assert torch.allclose(found, wanted, atol=1e-6)

    def test_only_runs_of_this_project_are_normalised_in_the_article(self):
        image = Pool().read(0)
        plain, trained = (article_input(image, backbone(224, 14, trained=trained)) for trained in (False, True))
        wanted = transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])(plain)
        assert plain.min() >= 0
        assert torch.allclose(trained, wanted, atol=1e-6)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_own_input_is_resize_crop_and_normalise(self, channels):
        """Against Pillow, whose bicubic resampling rounds pixels, within two grey levels."""
        pixels = np.random.default_rng(0).integers(0, 256, (105, 90), dtype=np.uint8)
        plain = transforms.Compose(
            [
                transforms.Grayscale(channels),
                transforms.Resize(28, InterpolationMode.BICUBIC),
                transforms.CenterCrop(28),
                transforms.ToTensor(),
                transforms.Normalize([0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]),
            ]
        )
        found = own_input(torch.from_numpy(pixels)[None], backbone(28, 4, channels))
        assert found.shape == (channels, 28, 28)
        assert torch.allclose(found, plain(Image.fromarray(pixels)), atol=2 / 255 / 0.2)

    def test_raw_pixels_are_28_by_28_grey_values(self, data):
        rows = omniglot.raw_pixels(data)
        assert rows.shape == (240, 784)
        plain = transforms.Compose([transforms.ToTensor(), transforms.Resize((28, 28), antialias=True)])
        wanted = plain(Image.fromarray(data.images.read(int(data.indices[7]))[0].numpy()))
        assert rows[7] == pytest.approx(wanted.flatten().numpy(), abs=1e-6)
