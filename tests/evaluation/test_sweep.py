"""Heads of the sweep are what plain SGD makes of each by itself, and the best is chosen without a look at the test."""

import numpy as np
import pytest
import torch
from torch import nn

from dino.evaluation import sweep as sweeping
from dino.evaluation.features import Features
from dino.evaluation.sweep import RATES, Head, sweep

CPU = torch.device("cpu")


def tokens(labels: np.ndarray, spread: float, blocks: int = 1, seed: int = 0) -> Features:
    """Features of width 5 around one direction a class, which is another in each block and in the patches."""
    centres = np.random.default_rng(0).normal(size=(labels.max() + 1, blocks + 1, 5))
    noise = np.random.default_rng(seed + 1).normal(size=(len(labels), blocks + 1, 5))
    values = (centres[labels] + spread * noise).astype(np.float32)
    return Features(values[:, :blocks], values[:, blocks], np.arange(len(labels)))


def draw(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def by_kind(heads: list[Head]) -> dict[tuple[int, bool, float], Head]:
    return {(head.blocks, head.with_patches, head.rate): head for head in heads}


@pytest.fixture(scope="module")
def judged() -> tuple[Features, np.ndarray, Features, np.ndarray, list[Head]]:
    """Hard data of 5 blocks, and the sweep on it."""
    labels, test_labels = draw(500, 4), draw(2000, 4, seed=1)
    train, test = tokens(labels, 1.5, blocks=5), tokens(test_labels, 1.5, blocks=5, seed=1)
    return train, labels, test, test_labels, sweep(train, labels, test, test_labels, 4, CPU, epochs=3, seed=3)


class TestSweep:
    def test_all_heads_are_there_once(self, judged):
        assert set(by_kind(judged[4])) == {(b, p, rate) for b in (1, 4) for p in (False, True) for rate in RATES}
        assert len(judged[4]) == 4 * len(RATES)

    @pytest.mark.parametrize("blocks", [1, 4])
    @pytest.mark.parametrize("with_patches", [False, True])
    def test_a_head_is_what_plain_sgd_makes_of_it_alone(self, judged, blocks, with_patches):
        """The same weights to begin with and the same batches, by torch's own optimizer, layer and schedule."""
        train, labels, test, test_labels, heads = judged
        found = by_kind(heads)
        order = np.random.default_rng(3).permutation(500)[50:]
        x, x_test = (side_by_side(part, blocks, with_patches) for part in (train, test))
        x, y = x[order], torch.from_numpy(labels[order])
        for rate in (RATES[4], RATES[12]):
            generator = torch.Generator().manual_seed(3)
            head = nn.Linear(x.shape[1], 4)
            with torch.no_grad():
                head.weight.copy_(0.01 * torch.randn(x.shape[1], 4, generator=generator).T)
                head.bias.zero_()
            optimizer = torch.optim.SGD(head.parameters(), rate * 128 / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
            for _ in range(1000):
                chosen = torch.randint(450, (128,), generator=generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(x[chosen]), y[chosen]).backward()
                optimizer.step()
                schedule.step()
            accuracy = (head(x_test).argmax(dim=1).numpy() == test_labels).mean()
            assert found[blocks, with_patches, rate].test == pytest.approx(accuracy, abs=0.0011)  # 2 images of 2,000

    def test_heads_differ_so_that_a_mix_up_would_be_seen(self, judged):
        found = by_kind(judged[4])
        compared = [found[b, p, RATES[i]].test for b in (1, 4) for p in (False, True) for i in (4, 12)]
        assert max(compared) - min(compared) > 0.1
        assert len(set(compared)) > 5

    def test_best_by_validation_comes_first(self, judged):
        validations = [head.validation for head in judged[4]]
        assert validations == sorted(validations, reverse=True)
        assert len(set(validations)) > 5
        tests = [head.test for head in judged[4]]
        assert tests != sorted(tests, reverse=True)

    def test_steps_are_those_of_the_epochs_but_at_least_a_thousand(self, monkeypatch):
        steps = []
        monkeypatch.setattr(sweeping, "tqdm", lambda numbers, **_: steps.append(len(numbers)) or numbers[:1])
        labels = draw(2000, 2)
        for epochs, batch_size in ((1, 128), (3, 2), (10, 4)):
            sweep(tokens(labels, 1), labels, tokens(labels, 1), labels, 2, CPU, epochs, batch_size)
        assert steps == [1000, 1000, 2700, 2700, 4500, 4500]

    def test_classes_far_apart_are_all_told(self):
        labels, test_labels = draw(200, 6), draw(100, 6, seed=1)
        best = sweep(tokens(labels, 0.02), labels, tokens(test_labels, 0.02, seed=1), test_labels, 6, CPU)[0]
        assert (best.validation, best.test) == (1, 1)


def side_by_side(features: Features, blocks: int, with_patches: bool) -> torch.Tensor:
    """Class tokens of the last blocks, the last block's last, and the patches."""
    parts = [features.blocks[:, place] for place in range(features.blocks.shape[1] - blocks, features.blocks.shape[1])]
    return torch.from_numpy(np.hstack([*parts, *([features.patch_means] if with_patches else [])]))


class TestHonesty:
    """No label of a validation or test image leaks."""

    def test_validation_images_are_not_trained_on(self):
        """Images that share no feature and have labels by chance: whoever has not seen one can only guess."""
        labels = draw(60, 6)
        values = 20 * np.eye(60, dtype=np.float32)
        images = Features(values[:, None], 0 * values, np.arange(60))
        heads = [head for head in sweep(images, labels, images, labels, 6, CPU, batch_size=32) if head.rate >= 1e-2]
        for head in heads:  # test images are the training images here, of which 54 have been learned by heart
            assert head.validation <= 0.5
            assert head.test == pytest.approx(0.9 + 0.1 * head.validation, abs=1e-6)

    def test_poisoned_validation_labels_change_validation_alone(self, judged):
        train, labels, test, test_labels, heads = judged
        held = np.random.default_rng(3).permutation(500)[:50]
        poisoned = labels.copy()
        poisoned[held] = (labels[held] + 1) % 4
        found = by_kind(sweep(train, poisoned, test, test_labels, 4, CPU, epochs=3, seed=3))
        for kind, head in by_kind(heads).items():
            assert found[kind].test == head.test
            assert found[kind].validation <= 1 - head.validation

    def test_test_labels_and_test_images_decide_nothing(self, judged):
        train, labels, test, test_labels, heads = judged
        others = Features(*(values[:100] for values in test))
        found = sweep(train, labels, others, (test_labels[:100] + 1) % 4, 4, CPU, epochs=3, seed=3)
        assert [head[:4] for head in found] == [head[:4] for head in heads]
        assert found[0].test < 0.4 < heads[0].test


class TestSmallest:
    def test_with_fewer_than_four_blocks_only_the_last_is_taken(self):
        """And its heads are those of that block alone."""
        labels = draw(100, 3)
        train = tokens(labels, 1.0, blocks=3)
        last = Features(train.blocks[:, -1:], train.patch_means, train.rows)
        heads = sweep(train, labels, train, labels, 3, CPU)
        assert set(by_kind(heads)) == {(1, p, rate) for p in (False, True) for rate in RATES}
        assert heads == sweep(last, labels, last, labels, 3, CPU)

    def test_two_images_suffice(self):
        """One to learn from, one to choose by."""
        labels = np.array([0, 1])
        heads = sweep(tokens(labels, 0.1), labels, tokens(labels, 0.1), labels, 2, CPU)
        assert len(heads) == 2 * len(RATES)
        assert all(head.test >= 0.5 for head in heads if head.rate >= 1e-2)
