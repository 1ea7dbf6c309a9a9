"""Probes of frozen features against plain loops and slow searches, and honest flags of what has converged."""

import math
import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from dino.evaluation import probes
from dino.evaluation.probes import STRENGTHS, Accuracy, few_shot, knn, logistic, logistic_optimum

SCALES = {"even": np.ones(6), "uneven": 10.0 ** np.arange(-3, 3)}


def blobs(count: int, classes: int, spread: float, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around one random direction a class, far from the origin, and labels as text, in random order."""
    generator = np.random.default_rng(seed)
    numbers = np.arange(count) % classes
    features = generator.normal(size=(classes, width))[numbers] + spread * generator.normal(size=(count, width)) + 3
    order = generator.permutation(count)
    return features[order].astype(np.float32), np.array([f"class {number:03d}" for number in numbers])[order]


def slow_knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> list:
    """As in DINO's publication, one image and one neighbour at a time."""
    answers = []
    for image in test.astype(np.float64):
        similarity = [image @ key / math.sqrt((image @ image) * (key @ key)) for key in train.astype(np.float64)]
        votes: dict = {}
        for neighbour in sorted(range(len(train)), key=lambda index: -similarity[index])[:k]:
            votes[labels[neighbour]] = votes.get(labels[neighbour], 0) + math.exp(similarity[neighbour] / 0.07)
        answers.append(max(votes, key=lambda label: votes[label]))
    return answers


class TestKNN:
    @pytest.mark.parametrize(("k", "classes"), [(1, 4), (5, 4), (90, 4), (1000, 4), (3, 1), (3, 60)])
    def test_is_the_plain_definition(self, k, classes):
        """With more neighbours than there are, too, and any number of classes."""
        features, labels = blobs(150, classes, spread=1.5)
        features -= 3
        assert knn(features[:90], labels[:90], features[90:], k).tolist() == slow_knn(
            features[:90], labels[:90], features[90:], k
        )

    def test_weights_decide_in_these_images(self):
        """Otherwise the comparison above would not see them: equal votes of 90 neighbours give other answers."""
        features, labels = blobs(150, 4, spread=1.5)
        features -= 3
        names, counts = np.unique(labels[:90], return_counts=True)
        assert set(knn(features[:90], labels[:90], features[90:], 90)) > {names[counts.argmax()]}

    def test_labels_are_whatever_they_are(self):
        keys = np.eye(3, dtype=np.float32)
        assert knn(keys, np.array([40, -7, 1000]), keys[[2, 0, 1]], 1).tolist() == [1000, 40, -7]

    def test_lengths_do_not_matter(self):
        features, labels = blobs(100, 4, spread=1.0)
        lengths = np.random.default_rng(1).uniform(0.1, 10, (100, 1)).astype(np.float32)
        one, other = (knn(x[:60], labels[:60], x[60:], 5) for x in (features - 3, (features - 3) * lengths))
        assert np.array_equal(one, other)

    @pytest.mark.parametrize("k", [1, 7, 30])
    def test_chunks_do_not_matter_even_where_many_are_equally_near(self, k):
        """Corners of a cube, whose cosines are exact, each with many labels: k cuts through equals."""
        generator = np.random.default_rng(0)
        train, test = (generator.choice([-1, 1], size=(count, 4)).astype(np.float32) for count in (300, 130))
        labels = generator.integers(0, 6, 300)
        whole = knn(train, labels, test, k)
        for chunk in (1, 64, 129):
            assert np.array_equal(knn(train, labels, test, k, chunk), whole), chunk
        assert np.array_equal(knn(train, labels, test[::-1].copy(), k, 50), whole[::-1])
        for corner in np.unique(test, axis=0):  # equal images, equal answers
            assert len(set(whole[(test == corner).all(axis=1)])) == 1


@pytest.fixture
def strengths(monkeypatch) -> list[float]:
    """The C of every regression that is fitted, in order."""
    fitted: list[float] = []

    class Watched(LogisticRegression):
        def fit(self, *given, **options):
            fitted.append(self.C)
            return super().fit(*given, **options)

    monkeypatch.setattr(probes, "LogisticRegression", Watched)
    return fitted


def tuned(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return logistic(train, labels, test, iterations=200, standardise_by=train, tuning_seed=seed).labels


class TestLogistic:
    @pytest.mark.parametrize(("scale", "converges"), [("even", True), ("uneven", False)])
    def test_is_scikit_learns_as_it_comes_and_says_whether_it_converged(self, scale, converges):
        """Badly scaled features: scikit-learn's 100 iterations do not suffice, and warn; the result says it instead."""
        features, labels = blobs(400, 5, spread=1.0)
        features = (features - 3) * SCALES[scale]
        answers = logistic(features[:300], labels[:300], features[300:])
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            peer = LogisticRegression().fit(features[:300], labels[:300])
        assert np.array_equal(answers.labels, peer.predict(features[300:]))
        assert answers.converged == converges == (not raised)

    def test_standardises_by_what_it_is_told(self):
        features, labels = blobs(200, 4, spread=1.0)
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        peer = LogisticRegression(max_iter=1000).fit((features[:20] - mean) / deviation, labels[:20])
        answers = logistic(features[:20], labels[:20], features[20:], iterations=1000, standardise_by=features)
        assert np.mean(answers.labels == peer.predict((features[20:] - mean) / deviation)) > 0.98

    def test_tuned_chooses_what_a_plain_loop_over_all_strengths_chooses(self, strengths):
        """And answers as that regression does, fitted to all training images."""
        bests = set()
        for seed, spread in enumerate([1.0, 3.0, 3.0, 0.7, 1.5, 1.0, 0.5, 4.0]):
            features, labels = blobs(400, 5, spread, width=20, seed=seed)
            features = (features * np.linspace(0.01, 100, 20)).astype(np.float32)
            train, test = features[:250], features[250:]
            strengths.clear()
            answers = tuned(train, labels[:250], test, seed)

            test, train = ((part - train.mean(axis=0)) / train.std(axis=0) for part in (test, train))
            fit, check = train_test_split(np.arange(250), test_size=0.2, random_state=seed)
            accuracies = {}
            for strength in STRENGTHS:
                model = LogisticRegression(C=strength, max_iter=10_000).fit(train[fit], labels[fit])
                accuracies[strength] = model.score(train[check], labels[check])
            best = strengths[-1]
            assert accuracies[best] == max(accuracies.values()), f"seed {seed}: {best} of {accuracies}"
            peer = LogisticRegression(C=best, max_iter=10_000).fit(train, labels[:250])
            assert np.mean(answers == peer.predict(test)) > 0.99
            bests.add(best)
        assert len(bests) > 2  # there was something to choose

    def test_test_images_have_no_say(self):
        features, labels = blobs(300, 4, spread=1.5)
        alone, among_more = features[200:210], np.concatenate([features[200:], 1000 * features[200:]])
        first, second = (tuned(features[:200], labels[:200], test, 0) for test in (alone, among_more))
        assert np.array_equal(first, second[:10])

    def test_noise_gives_answers_all_the_same(self):
        generator = np.random.default_rng(0)
        features, labels = generator.normal(size=(400, 30)).astype(np.float32), generator.integers(10, 15, 400)
        answers = tuned(features[:200], labels[:200], features[200:], 0)
        assert set(answers) <= set(labels)
        assert np.mean(answers == labels[200:]) == pytest.approx(0.2, abs=0.1)

    def test_feature_that_never_changes_is_no_obstacle(self):
        features, labels = blobs(200, 3, spread=0.3)
        features[:, 2] = 7
        assert np.mean(tuned(features[:150], labels[:150], features[150:], 0) == labels[150:]) > 0.9

    def test_a_seed_gives_one_choice_and_seeds_differ(self, strengths):
        features, labels = blobs(300, 5, spread=2.0, width=20)
        answers, bests = [], []
        for seed in [0, 0, *range(1, 8)]:
            answers.append(tuned(features[:100], labels[:100], features[100:], seed))
            bests.append(strengths[-1])
        assert np.array_equal(answers[0], answers[1])
        assert bests[0] == bests[1]
        assert len(set(bests)) > 1

    @pytest.mark.parametrize("count", [2, 4])
    def test_very_few_images(self, count):
        """Whatever fifth is set aside, what is left must be something to learn from."""
        labels = np.array(["one", *["other"] * (count - 1)])
        features = np.where(labels[:, None] == "one", np.float32(1), np.float32(-1)) * np.ones(3, dtype=np.float32)
        for seed in range(8):
            assert tuned(features, labels, features[:2], seed).tolist() == ["one", "other"]


@pytest.fixture
def minima(monkeypatch) -> list:
    """What every minimisation ended with."""
    results, minimize = [], probes.minimize

    def watched(*given, **options):
        results.append(minimize(*given, **options))
        return results[-1]

    monkeypatch.setattr(probes, "minimize", watched)
    return results


def newton(train: np.ndarray, labels: np.ndarray, strength: float = 1.0) -> tuple[LogisticRegression, float]:
    """scikit-learn's regression by Newton's method, run to the end, and C · Σ cross-entropy + ½ ‖W‖² there."""
    train = train.astype(np.float64)
    peer = LogisticRegression(C=strength, tol=1e-8, max_iter=100_000, solver="newton-cholesky").fit(train, labels)
    losses = log_loss(labels, peer.predict_proba(train), labels=peer.classes_, normalize=False)
    return peer, strength * losses + 0.5 * (peer.coef_**2).sum()


class TestLogisticOptimum:
    @pytest.mark.parametrize("strength", [0.01, 1.0])
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("classes", [3, 12])
    def test_is_the_optimum_that_newtons_method_finds(self, classes, scale, strength, minima):
        features, labels = blobs(600, classes, spread=1.0)
        features = (features * SCALES[scale]).astype(np.float32)
        answers = logistic_optimum(features[:300], labels[:300], features[300:], strength)
        peer, objective = newton(features[:300], labels[:300], strength)
        assert minima[0].fun == pytest.approx(objective, rel=1e-5)
        assert np.mean(answers == peer.predict(features[300:])) > 0.995  # one image on the border may differ
        assert 0.2 < np.mean(answers == labels[300:]) < 0.99

    def test_gives_the_labels_of_scikit_learns_own_solver_run_to_the_end(self):
        features, labels = blobs(500, 5, spread=1.5, width=12)
        peer = LogisticRegression(tol=1e-8, max_iter=100_000).fit(features[:300].astype(np.float64), labels[:300])
        answers = logistic_optimum(features[:300], labels[:300], features[300:])
        assert np.array_equal(answers, peer.predict(features[300:]))

    def test_goes_on_where_scikit_learn_stops(self):
        """Features of very uneven scale: after 100 iterations scikit-learn gives other labels than at the optimum."""
        features, labels = blobs(600, 12, spread=1.0)
        features = (features * SCALES["uneven"]).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            early = LogisticRegression().fit(features[:300], labels[:300]).predict(features[300:])
        assert np.mean(early == logistic_optimum(features[:300], labels[:300], features[300:])) < 0.98

    @pytest.mark.parametrize(("tolerance", "distance"), [(1e-5, 0.05), (1e-9, 1e-6)])
    def test_more_features_than_images(self, tolerance, distance, minima):
        """Classes that can be separated perfectly; a smaller tolerance comes closer to the optimum."""
        features, labels = blobs(200, 3, spread=1.0, width=150)
        answers = logistic_optimum(features[:100], labels[:100], features[100:], tolerance=tolerance)
        peer, objective = newton(features[:100], labels[:100])
        assert np.array_equal(answers, peer.predict(features[100:]))
        assert minima[0].fun == pytest.approx(objective, rel=distance)

    def test_where_the_origin_lies_does_not_matter(self):
        features, labels = blobs(400, 4, spread=1.0)
        one, other = (logistic_optimum(x[:200], labels[:200], x[200:]) for x in (features, features + 100))
        assert np.mean(one == other) > 0.99

    def test_two_classes(self):
        features, labels = blobs(2000, 2, spread=2.0)
        features = (features * SCALES["uneven"]).astype(np.float32)
        peer, _ = newton(features[:300], labels[:300], 0.01)
        answers = logistic_optimum(features[:300], labels[:300], features[300:], 0.01)
        assert np.mean(answers == peer.predict(features[300:])) > 0.995

    def test_without_convergence_there_is_no_answer(self, monkeypatch):
        minimize = probes.minimize

        def hurried(*given, options, **others):
            return minimize(*given, options={**options, "maxiter": 2}, **others)

        monkeypatch.setattr(probes, "minimize", hurried)
        features, labels = blobs(300, 5, spread=1.0)
        with pytest.raises(RuntimeError, match="did not converge"):
            logistic_optimum(features[:200], labels[:200], features[200:])


def draw(labels: np.ndarray, per_class: int, seed: int) -> list[int]:
    """Rows of the labelled images: for each class in alphabetical order, the first of a permutation."""
    generator = np.random.default_rng(seed)
    rows: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, other in enumerate(labels) if other == label]
        rows += generator.permutation(members)[:per_class].tolist()
    return rows


class TestFewShot:
    def test_is_the_mean_of_plain_fits_on_the_same_images(self):
        features, labels = blobs(48, 4, spread=1.0)
        features -= 3
        accuracies = few_shot(features, labels, per_class=3, seeds=4)
        by_hand: dict[str, list] = {"knn": [], "logistic": []}
        for seed in range(4):
            train = draw(labels, 3, seed)
            test = [index for index in range(len(labels)) if index not in train]
            nearest = slow_knn(features[train], labels[train], features[test], 1)
            model = LogisticRegression(max_iter=1000).fit(features[train], labels[train])
            by_hand["knn"].append(np.mean(nearest == labels[test]))
            by_hand["logistic"].append(np.mean(model.predict(features[test]) == labels[test]))
        for probe, values in by_hand.items():
            assert accuracies[probe].mean == pytest.approx(np.mean(values), abs=1e-9)
            assert accuracies[probe].std == pytest.approx(np.std(values), abs=1e-9)
            assert 0.3 < accuracies[probe].mean < 0.95  # neither trivial nor hopeless: the comparison means something

    def test_separated_classes_are_all_told(self):
        features, labels = blobs(24, 3, spread=0.01)
        accuracies = few_shot(features - 3, labels, per_class=2, seeds=2)
        assert {probe: accuracy.mean for probe, accuracy in accuracies.items()} == {"knn": 1.0, "logistic": 1.0}

    def test_labels_without_meaning_are_guessed(self):
        features, _ = blobs(200, 2, spread=1.0)
        labels = np.random.default_rng(5).integers(0, 2, len(features))
        assert few_shot(features, labels, 10, 10)["knn"].mean == pytest.approx(0.5, abs=0.08)

    def test_labelled_images_are_not_tested_on(self):
        """Every image is its own class's twin but one: whoever tests on labelled images finds more than half."""
        features = np.eye(8, dtype=np.float32)
        labels = np.array(["a", "b"] * 4)
        assert few_shot(features, labels, per_class=3, seeds=3)["knn"].mean <= 0.5


def test_accuracy_reads_as_per_cent():
    assert str(Accuracy(0.8314, 0.0126)) == "83.1 ± 1.3 %"
