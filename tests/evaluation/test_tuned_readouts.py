"""Readouts that look for an optimum find the one that slow, plain searches find."""

import math
import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from dino.evaluation import readout
from dino.evaluation.readout import STRENGTHS, converged_logistic, knn, tuned_logistic

SCALES = {"even": np.ones(6), "uneven": 10.0 ** np.arange(-3, 3)}


def blobs(count: int, classes: int, spread: float, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around one random direction a class, far from the origin, and labels as text, in random order."""
    generator = np.random.default_rng(seed)
    numbers = np.arange(count) % classes
    features = generator.normal(size=(classes, width))[numbers] + spread * generator.normal(size=(count, width)) + 3
    order = generator.permutation(count)
    return features[order].astype(np.float32), np.array([f"class {number:03d}" for number in numbers])[order]


def objective(model: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> float:
    """C · Σ cross-entropy + ½ ‖W‖² of a fitted model."""
    losses = log_loss(labels, model.predict_proba(features), labels=model.classes_, normalize=False)
    return model.C * losses + 0.5 * (model.coef_**2).sum()


class TestConvergedLogistic:
    @pytest.mark.parametrize("strength", [0.01, 1.0])
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("classes", [3, 12])
    def test_is_the_optimum_that_newtons_method_finds(self, classes, scale, strength, monkeypatch):
        features, labels = blobs(600, classes, spread=1.0)
        features = (features * SCALES[scale]).astype(np.float32)
        minima, minimize = [], readout.minimize
        monkeypatch.setattr(readout, "minimize", lambda *given, **options: keep(minima, minimize(*given, **options)))
        found = converged_logistic(features[:300], labels[:300], features[300:], strength)

        train = features[:300].astype(np.float64)
        peer = LogisticRegression(C=strength, tol=1e-8, max_iter=100_000, solver="newton-cholesky")
        peer.fit(train, labels[:300])
        assert minima[0].fun == pytest.approx(objective(peer, train, labels[:300]), rel=1e-5)
        assert np.mean(found == peer.predict(features[300:])) > 0.995  # one image on the border may differ
        assert 0.2 < np.mean(found == labels[300:]) < 0.99

    def test_gives_the_labels_of_scikit_learns_own_solver_run_to_the_end(self):
        features, labels = blobs(500, 5, spread=1.5, width=12)
        peer = LogisticRegression(tol=1e-8, max_iter=100_000).fit(features[:300].astype(np.float64), labels[:300])
        assert np.array_equal(
            converged_logistic(features[:300], labels[:300], features[300:]), peer.predict(features[300:])
        )

    def test_goes_on_where_scikit_learn_stops(self):
        """Features of very uneven scale: after 100 iterations scikit-learn gives other labels than at the optimum."""
        features, labels = blobs(600, 12, spread=1.0)
        features = (features * SCALES["uneven"]).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            early = LogisticRegression().fit(features[:300], labels[:300]).predict(features[300:])
        assert np.mean(early == converged_logistic(features[:300], labels[:300], features[300:])) < 0.98

    @pytest.mark.parametrize("tolerance", [1e-5, 1e-9])
    def test_more_features_than_images(self, tolerance, monkeypatch):
        """Classes that can be separated perfectly; a smaller tolerance comes closer to the optimum."""
        features, labels = blobs(200, 3, spread=1.0, width=150)
        minima, minimize = [], readout.minimize
        monkeypatch.setattr(readout, "minimize", lambda *given, **options: keep(minima, minimize(*given, **options)))
        found = converged_logistic(features[:100], labels[:100], features[100:], tolerance=tolerance)
        train = features[:100].astype(np.float64)
        peer = LogisticRegression(tol=1e-8, max_iter=100_000, solver="newton-cholesky").fit(train, labels[:100])
        assert np.array_equal(found, peer.predict(features[100:]))
        assert minima[0].fun == pytest.approx(
            objective(peer, train, labels[:100]), rel=0.05 if tolerance > 1e-6 else 1e-6
        )

    def test_the_place_of_the_origin_does_not_matter(self):
        features, labels = blobs(400, 4, spread=1.0)
        one, other = (converged_logistic(x[:200], labels[:200], x[200:]) for x in (features, features + 100))
        assert np.mean(one == other) > 0.99

    def test_two_classes(self):
        features, labels = blobs(2000, 2, spread=2.0)
        features = (features * SCALES["uneven"]).astype(np.float32)
        train = features[:300].astype(np.float64)
        peer = LogisticRegression(C=0.01, tol=1e-8, max_iter=100_000, solver="newton-cholesky").fit(train, labels[:300])
        found = converged_logistic(features[:300], labels[:300], features[300:], 0.01)
        assert np.mean(found == peer.predict(features[300:])) > 0.995

    def test_without_convergence_there_is_no_answer(self, monkeypatch):
        minimize = readout.minimize
        monkeypatch.setattr(
            readout,
            "minimize",
            lambda *given, options, **others: minimize(*given, options={**options, "maxiter": 2}, **others),
        )
        features, labels = blobs(300, 5, spread=1.0)
        with pytest.raises(RuntimeError, match="did not converge"):
            converged_logistic(features[:200], labels[:200], features[200:])


def keep(kept: list, value):
    kept.append(value)
    return value


@pytest.fixture
def fitted(monkeypatch) -> list[float]:
    """The C of every regression that is fitted, in order."""
    strengths: list[float] = []

    class Watched(LogisticRegression):
        def fit(self, *given, **options):
            strengths.append(self.C)
            return super().fit(*given, **options)

    monkeypatch.setattr(readout, "LogisticRegression", Watched)
    return strengths


class TestTunedLogistic:
    def test_chooses_what_a_plain_loop_over_all_strengths_chooses(self, fitted):
        """And answers as that regression does, fitted to all training images."""
        chosen = set()
        for seed, spread in enumerate([1.0, 3.0, 3.0, 0.7, 1.5, 1.0, 0.5, 4.0]):
            features, labels = blobs(400, 5, spread, width=20, seed=seed)
            features = (features * np.linspace(0.01, 100, 20)).astype(np.float32)
            train, test = features[:250], features[250:]
            fitted.clear()
            answers = tuned_logistic(train, labels[:250], test, seed)

            test, train = ((part - train.mean(axis=0)) / train.std(axis=0) for part in (test, train))
            fit, check = train_test_split(np.arange(250), test_size=0.2, random_state=seed)
            scores = {}
            for strength in STRENGTHS:
                model = LogisticRegression(C=strength, max_iter=10_000).fit(train[fit], labels[fit])
                scores[strength] = model.score(train[check], labels[check])
            best = fitted[-1]
            assert scores[best] == max(scores.values()), f"seed {seed}: {best} of {scores}"
            peer = LogisticRegression(C=best, max_iter=10_000).fit(train, labels[:250])
            assert np.mean(answers == peer.predict(test)) > 0.99
            chosen.add(best)
        assert len(chosen) > 2  # there was something to choose

    def test_test_images_have_no_say(self):
        features, labels = blobs(300, 4, spread=1.5)
        alone, among_others = features[200:210], np.concatenate([features[200:], 1000 * features[200:]])
        first, second = (tuned_logistic(features[:200], labels[:200], test, 0) for test in (alone, among_others))
        assert np.array_equal(first, second[:10])

    def test_noise_gives_answers_all_the_same(self):
        generator = np.random.default_rng(0)
        features, labels = generator.normal(size=(400, 30)).astype(np.float32), generator.integers(10, 15, 400)
        answers = tuned_logistic(features[:200], labels[:200], features[200:], 0)
        assert set(answers) <= set(labels)
        assert np.mean(answers == labels[200:]) == pytest.approx(0.2, abs=0.1)

    def test_feature_that_never_changes_is_no_obstacle(self):
        features, labels = blobs(200, 3, spread=0.3)
        features[:, 2] = 7
        answers = tuned_logistic(features[:150], labels[:150], features[150:], 0)
        assert np.mean(answers == labels[150:]) > 0.9

    def test_a_seed_gives_one_choice_and_seeds_differ(self, fitted):
        features, labels = blobs(300, 5, spread=2.0, width=20)
        choices = []
        for seed in [0, 0, *range(1, 8)]:
            tuned_logistic(features[:100], labels[:100], features[100:], seed)
            choices.append(fitted[-1])
        first, again = (tuned_logistic(features[:100], labels[:100], features[100:], 3) for _ in range(2))
        assert np.array_equal(first, again)
        assert choices[0] == choices[1]
        assert len(set(choices)) > 1

    @pytest.mark.parametrize("count", [2, 4])
    def test_very_few_images(self, count):
        """Whatever fifth is set aside, what is left must be something to learn from."""
        labels = np.array(["one", *["other"] * (count - 1)])
        features = np.where(labels[:, None] == "one", np.float32(1), np.float32(-1)) * np.ones(3, dtype=np.float32)
        for seed in range(8):
            assert tuned_logistic(features, labels, features[:2], seed).tolist() == ["one", "other"]


def slow_knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> list:
    """As in DINO's publication, one image and one neighbour at a time."""
    answers = []
    for image in test.astype(np.float64):
        similarity = [image @ key / math.sqrt((image @ image) * (key @ key)) for key in train.astype(np.float64)]
        votes: dict = {}
        for neighbour in sorted(range(len(train)), key=lambda place: -similarity[place])[:k]:
            votes[labels[neighbour]] = votes.get(labels[neighbour], 0) + math.exp(similarity[neighbour] / 0.07)
        answers.append(max(votes, key=lambda label: votes[label]))
    return answers


class TestKNN:
    @pytest.mark.parametrize("k", [1, 5, 20, 90, 1000])  # the last: more than there are
    def test_is_the_plain_definition(self, k):
        features, labels = blobs(150, 4, spread=1.5)
        features -= 3
        found = knn(features[:90], labels[:90], features[90:], k)
        assert found.tolist() == slow_knn(features[:90], labels[:90], features[90:], k)

    def test_weights_decide_in_these_images(self):
        """Otherwise the comparison above would not see them: equal votes of 90 neighbours give other answers."""
        features, labels = blobs(150, 4, spread=1.5)
        features -= 3
        names, counts = np.unique(labels[:90], return_counts=True)
        assert set(knn(features[:90], labels[:90], features[90:], 90)) > {names[counts.argmax()]}

    @pytest.mark.parametrize("classes", [1, 2, 60])
    def test_any_number_of_classes(self, classes):
        features, labels = blobs(120, classes, spread=0.1)
        features -= 3
        found = knn(features[:60], labels[:60], features[60:], 3)
        assert found.tolist() == slow_knn(features[:60], labels[:60], features[60:], 3)

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
        for chunk in (1, 3, 64, 129, 130):
            assert np.array_equal(knn(train, labels, test, k, chunk), whole), chunk
        assert np.array_equal(knn(train, labels, test[::-1].copy(), k, 50), whole[::-1])
        for corner in np.unique(test, axis=0):  # equal images, equal answers
            assert len(set(whole[(test == corner).all(axis=1)])) == 1
