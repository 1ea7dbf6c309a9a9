"""What frozen features are worth: nearest neighbour and logistic regression on top, by scikit-learn."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier


@dataclass(frozen=True)
class Accuracy:
    """Mean and standard deviation over draws, as shares of 1."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %"


def few_shot(features: np.ndarray, labels: np.ndarray, per_class: int = 10, draws: int = 20) -> dict[str, Accuracy]:
    """Accuracy on all other images after learning from a few labelled ones.

    Args:
        features: (N, D).
        labels: (N,).
        per_class: labelled images of each class.
        draws: how often the labelled images are drawn anew; draw s uses seed s, so that two sets of features are
            compared on the same draws.

    Returns:
        `knn` (the nearest neighbour by cosine) and `logistic` (scikit-learn's default regularisation).
    """
    scores: dict[str, list[float]] = {"knn": [], "logistic": []}
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        train = np.concatenate(
            [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
        )
        test = np.setdiff1d(np.arange(len(labels)), train)
        readouts = {
            "knn": KNeighborsClassifier(n_neighbors=1, metric="cosine"),
            "logistic": LogisticRegression(max_iter=1000),
        }
        for name, readout in readouts.items():
            readout.fit(features[train], labels[train])
            scores[name].append(readout.score(features[test], labels[test]))
    return {name: Accuracy(float(np.mean(values)), float(np.std(values))) for name, values in scores.items()}


@dataclass(frozen=True)
class LogisticResult:
    """A logistic regression with scikit-learn's defaults.

    Attributes:
        correct: (N,) bool, for each test image.
        converged: whether 100 iterations sufficed.
    """

    correct: np.ndarray
    converged: bool

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())


def logistic(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> LogisticResult:
    """scikit-learn's `LogisticRegression()` as it comes, on features (N, D)."""
    readout = LogisticRegression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported by the result
        readout.fit(train, train_labels)
    converged = bool(readout.n_iter_.max() < readout.max_iter)
    return LogisticResult(readout.predict(test) == test_labels, converged)
