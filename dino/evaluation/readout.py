"""What frozen features are worth: nearest neighbours and logistic regression on top."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from dino.evaluation.neighbours import weighted_knn

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, tried on a part of the training images


@dataclass(frozen=True)
class Accuracy:
    """Mean and standard deviation over draws, as shares of 1."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %"

    @classmethod
    def of(cls, values: list[float]) -> "Accuracy":
        """Of single figures."""
        return cls(float(np.mean(values)), float(np.std(values)))


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
    return {name: Accuracy.of(values) for name, values in scores.items()}


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


def converged_logistic(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, strength: float = 1.0, tolerance: float = 1e-5
) -> np.ndarray:
    """The labels that logistic regression gives at its optimum, which 100 iterations of scikit-learn rarely reach.

    The same objective, C · Σ cross-entropy + ½ ‖W‖², which has one optimum; in variables in which features count alike
    (W = P·V with P = (I + C·S)^−½ for the features' scatter S), L-BFGS gets there in a few hundred steps.

    Args:
        train, test: features (N, D) and (M, D).
        strength: C.
        tolerance: of the largest gradient entry, relative to C · N.

    Returns:
        (M,) labels.

    Raises:
        RuntimeError: not converged.
    """
    names, targets = np.unique(train_labels, return_inverse=True)
    centre = train.mean(axis=0, dtype=np.float64)
    features = train - centre
    share = 1 / len(names)
    values, vectors = np.linalg.eigh(features.T @ features * strength * share * (1 - share))
    whitening = vectors / np.sqrt(1 + values.clip(min=0))
    inputs = torch.from_numpy(features @ whitening)
    # ‖W‖² = ‖vectors · (1 + values)^−½ · V‖², and the eigenvectors turn without stretching.
    penalties = torch.from_numpy(1 / (1 + values.clip(min=0)))[:, None]
    if len(names) == 2:  # scikit-learn then penalises the difference of the two, which counts twice
        penalties = 2 * penalties
    wanted = torch.from_numpy(targets)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(-1, len(names)).requires_grad_()
        scores = inputs @ weights[:-1] + weights[-1]
        loss = strength * torch.nn.functional.cross_entropy(scores, wanted, reduction="sum")
        loss = loss + 0.5 * (penalties * weights[:-1].square()).sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        return loss.item(), gradient.flatten().numpy()

    found = minimize(
        objective,
        np.zeros((inputs.shape[1] + 1) * len(names)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance * strength * len(train), "ftol": 0, "maxcor": 20},
    )
    if not found.success:
        raise RuntimeError(f"logistic regression did not converge: {found.message}")
    weights = found.x.reshape(-1, len(names))
    return names[(((test - centre) @ whitening) @ weights[:-1] + weights[-1]).argmax(axis=1)]


def tuned_logistic(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, seed: int, strengths: tuple[float, ...] = STRENGTHS
) -> np.ndarray:
    """Labels by logistic regression on standardised features, its C chosen on a fifth of the training images.

    Args:
        train, test: features (N, D) and (M, D).
        seed: of the choice of that fifth.

    Returns:
        (M,) labels.
    """
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    fit, check = train_test_split(np.arange(len(train)), test_size=0.2, random_state=seed)
    readout = LogisticRegression(max_iter=200, warm_start=True)
    if len(set(train_labels[fit])) < 2:  # too few images to choose by
        return LogisticRegression(max_iter=200).fit(train, train_labels).predict(test)
    best, best_score = strengths[0], -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in strengths:  # from the simplest on; beyond the best it only gets worse, and slower
            readout.set_params(C=strength).fit(train[fit], train_labels[fit])
            score = readout.score(train[check], train_labels[check])
            if score < best_score:
                break
            best, best_score = strength, score
        return LogisticRegression(C=best, max_iter=200).fit(train, train_labels).predict(test)


def knn(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, k: int = 20, chunk: int = 1024) -> np.ndarray:
    """Labels (M,) by the k nearest training features, weighted as DINO does (cosine, temperature 0.07)."""
    names, numbers = np.unique(train_labels, return_inverse=True)
    keys, labels = torch.from_numpy(train), torch.from_numpy(numbers)
    everyone = torch.ones(1, len(train), dtype=torch.bool)
    found = [
        weighted_knn(queries, keys, labels, len(names), everyone, k) for queries in torch.from_numpy(test).split(chunk)
    ]
    return names[torch.cat(found).numpy()]
