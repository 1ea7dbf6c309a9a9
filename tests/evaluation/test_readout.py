"""Readouts of frozen features against plain loops, and honest flags of what has converged."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dino.evaluation.readout import Accuracy, few_shot, logistic


def blobs(per_class: int, classes: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around one random direction a class, and labels as text, in random order."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, 6))
    labels = generator.permutation(np.repeat(np.arange(classes), per_class))
    features = centres[labels] + spread * generator.normal(size=(len(labels), 6))
    return features.astype(np.float32), np.array([f"class {label}" for label in labels])


def draw(labels: np.ndarray, per_class: int, seed: int) -> list[int]:
    """The labelled images of one draw: for each class in alphabetical order, the first of a permutation."""
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, other in enumerate(labels) if other == label]
        chosen += generator.permutation(members)[:per_class].tolist()
    return chosen


class TestFewShot:
    def test_nearest_neighbour_by_a_plain_loop(self):
        features, labels = blobs(12, 4, spread=1.0)
        found = few_shot(features, labels, per_class=3, draws=4)["knn"]
        accuracies = []
        for seed in range(4):
            train = draw(labels, 3, seed)
            right = 0
            test = [index for index in range(len(labels)) if index not in train]
            for index in test:
                similarity = [
                    float(features[index] @ features[other])
                    / float(np.linalg.norm(features[index]) * np.linalg.norm(features[other]))
                    for other in train
                ]
                right += labels[train[int(np.argmax(similarity))]] == labels[index]
            accuracies.append(right / len(test))
        assert found.mean == pytest.approx(np.mean(accuracies), abs=1e-9)
        assert found.std == pytest.approx(np.std(accuracies), abs=1e-9)
        assert 0.3 < found.mean < 0.95  # neither trivial nor hopeless: the comparison means something

    def test_logistic_regression_on_the_same_draws(self):
        features, labels = blobs(12, 4, spread=1.0)
        found = few_shot(features, labels, per_class=3, draws=3)["logistic"]
        accuracies = []
        for seed in range(3):
            train = draw(labels, 3, seed)
            test = [index for index in range(len(labels)) if index not in train]
            model = LogisticRegression(max_iter=1000).fit(features[train], labels[train])
            accuracies.append(np.mean(model.predict(features[test]) == labels[test]))
        assert found.mean == pytest.approx(np.mean(accuracies), abs=1e-9)

    def test_lengths_do_not_matter_to_nearest_neighbours(self):
        features, labels = blobs(12, 4, spread=1.0)
        scaled = features * np.random.default_rng(1).uniform(0.1, 10, (len(features), 1)).astype(np.float32)
        one, other = (few_shot(values, labels, 3, 3)["knn"] for values in (features, scaled))
        assert one.mean == pytest.approx(other.mean, abs=1e-9)

    def test_separated_classes_are_all_found(self):
        scores = few_shot(*blobs(8, 3, spread=0.01), per_class=2, draws=2)
        assert {name: score.mean for name, score in scores.items()} == {"knn": 1.0, "logistic": 1.0}

    def test_labels_without_meaning_are_found_by_chance(self):
        features, _ = blobs(100, 2, spread=1.0)
        labels = np.random.default_rng(5).integers(0, 2, len(features))
        assert few_shot(features, labels, 10, 10)["knn"].mean == pytest.approx(0.5, abs=0.08)

    def test_labelled_images_are_not_tested_on(self):
        """Every image is its own class's twin but one: whoever tests on labelled images finds more than half."""
        features = np.eye(8, dtype=np.float32)
        labels = np.array(["a", "b"] * 4)
        assert few_shot(features, labels, per_class=3, draws=3)["knn"].mean <= 0.5


def test_accuracy_reads_as_per_cent():
    assert str(Accuracy(0.8314, 0.0126)) == "83.1 ± 1.3 %"


class TestLogistic:
    def test_converged_at_once(self):
        features, labels = blobs(40, 3, spread=0.5)
        found = logistic(features[:90], labels[:90], features[90:], labels[90:])
        peer = LogisticRegression().fit(features[:90], labels[:90])
        assert found.converged
        assert found.accuracy == peer.score(features[90:], labels[90:])

    def test_stopped_early_is_said(self):
        """Badly scaled features: scikit-learn's 100 iterations do not suffice, and warn; the result says it instead."""
        features, labels = blobs(100, 5, spread=2.0)
        features = features * np.array([1, 10, 100, 1000, 1e4, 1e5], dtype=np.float32)
        found = logistic(features[:300], labels[:300], features[300:], labels[300:])
        assert not found.converged
        with pytest.warns(match="converge"):
            early = LogisticRegression().fit(features[:300], labels[:300])
        assert found.accuracy == early.score(features[300:], labels[300:])
