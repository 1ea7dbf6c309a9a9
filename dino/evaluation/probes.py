"""What frozen features are worth: nearest neighbours and logistic regression on top."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from dino.evaluation.neighbours import weighted_knn

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, tried on a part of the training images


@dataclass(frozen=True)
class Accuracy:
    """Mean and standard deviation over seeds, as fractions of 1."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %"

    @classmethod
    def of(cls, values: list[float]) -> "Accuracy":
        """Of single figures."""
        return cls(float(np.mean(values)), float(np.std(values)))


def knn(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, k: int = 20, chunk: int = 1024) -> np.ndarray:
    """Labels (M,) by the k nearest training features, weighted as DINO does (cosine, temperature 0.07)."""
    names, numbers = np.unique(train_labels, return_inverse=True)
    keys, labels = torch.from_numpy(train), torch.from_numpy(numbers)
    all_keys = torch.ones(1, len(train), dtype=torch.bool)
    answers = [
        weighted_knn(queries, keys, labels, len(names), all_keys, k) for queries in torch.from_numpy(test).split(chunk)
    ]
    return names[torch.cat(answers).numpy()]


class Answers(NamedTuple):
    """What a logistic regression says of M images.

    Attributes:
        labels: (M,).
        converged: whether its iterations sufficed.
    """

    labels: np.ndarray
    converged: bool


def logistic(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    *,
    iterations: int = 100,
    standardise_by: np.ndarray | None = None,
    tuning_seed: int | None = None,
) -> Answers:
    """scikit-learn's `LogisticRegression`, by default as it comes.

    Args:
        train, test: features (N, D) and (M, D).
        iterations: at most.
        standardise_by: features (K, D) whose mean and deviation become 0 and 1; None: features as they are.
        tuning_seed: C is chosen on a fifth of the training images, drawn with this seed; None: C is 1.
    """
    if standardise_by is not None:
        mean, deviation = standardise_by.mean(axis=0), standardise_by.std(axis=0) + 1e-6
        train, test = (train - mean) / deviation, (test - mean) / deviation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by the result
        strength = 1.0 if tuning_seed is None else _best_strength(train, train_labels, iterations, tuning_seed)
        model = LogisticRegression(C=strength, max_iter=iterations).fit(train, train_labels)
    return Answers(model.predict(test), bool(model.n_iter_.max() < iterations))


def _best_strength(features: np.ndarray, labels: np.ndarray, iterations: int, seed: int) -> float:
    """Of STRENGTHS the one that answers best on a fifth of the images, having learned from the others."""
    fit, check = train_test_split(np.arange(len(features)), test_size=0.2, random_state=seed)
    if len(set(labels[fit])) < 2:  # too few images to choose by
        return 1.0
    model = LogisticRegression(max_iter=iterations, warm_start=True)
    best, best_accuracy = STRENGTHS[0], -1.0
    for strength in STRENGTHS:  # from the simplest on; beyond the best it only gets worse, and slower
        model.set_params(C=strength).fit(features[fit], labels[fit])
        accuracy = model.score(features[check], labels[check])
        if accuracy < best_accuracy:
            break
        best, best_accuracy = strength, accuracy
    return best


def logistic_optimum(
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
    names, numbers = np.unique(train_labels, return_inverse=True)
    classes, targets = len(names), torch.from_numpy(numbers)
    center = train.mean(axis=0, dtype=np.float64)
    centered = train - center
    fraction = 1 / classes
    eigenvalues, eigenvectors = np.linalg.eigh(centered.T @ centered * strength * fraction * (1 - fraction))
    whitening = eigenvectors / np.sqrt(1 + eigenvalues.clip(min=0))
    inputs = torch.from_numpy(centered @ whitening)
    # ‖W‖² = ‖eigenvectors · (1 + eigenvalues)^−½ · V‖², and the eigenvectors turn without stretching.
    penalties = torch.from_numpy(1 / (1 + eigenvalues.clip(min=0)))[:, None]
    if classes == 2:  # scikit-learn then penalises the difference of the two, which counts twice
        penalties = 2 * penalties

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(-1, classes).requires_grad_()
        logits = inputs @ weights[:-1] + weights[-1]
        loss = strength * F.cross_entropy(logits, targets, reduction="sum")
        loss = loss + 0.5 * (penalties * weights[:-1].square()).sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        return loss.item(), gradient.flatten().numpy()

    minimum = minimize(
        objective,
        np.zeros((inputs.shape[1] + 1) * classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance * strength * len(train), "ftol": 0, "maxcor": 20},
    )
    if not minimum.success:
        raise RuntimeError(f"logistic regression did not converge: {minimum.message}")
    weights = minimum.x.reshape(-1, classes)
    return names[(((test - center) @ whitening) @ weights[:-1] + weights[-1]).argmax(axis=1)]


def few_labelled(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a few images of each class to learn from, drawn with a seed, and of all others, which are the test."""
    generator = np.random.default_rng(seed)
    train = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    )
    return train, np.setdiff1d(np.arange(len(labels)), train)


def few_shot(features: np.ndarray, labels: np.ndarray, per_class: int = 10, seeds: int = 20) -> dict[str, Accuracy]:
    """Accuracy on all other images after learning from a few labelled ones.

    Args:
        features: (N, D).
        labels: (N,).
        per_class: labelled images of each class.
        seeds: how often the labelled images are drawn anew, so that two sets of features are compared on the same.

    Returns:
        `knn` (the nearest neighbour by cosine) and `logistic` (scikit-learn's default regularisation).
    """
    accuracies: dict[str, list[float]] = {"knn": [], "logistic": []}
    # Not `knn`, whose rounding is another: published figures stay to the last digit.
    nearest = KNeighborsClassifier(n_neighbors=1, metric="cosine")
    for seed in range(seeds):
        train, test = few_labelled(labels, per_class, seed)
        answers = {
            "knn": nearest.fit(features[train], labels[train]).predict(features[test]),
            "logistic": logistic(features[train], labels[train], features[test], iterations=1000).labels,
        }
        for probe, predicted in answers.items():
            accuracies[probe].append(float((predicted == labels[test]).mean()))
    return {probe: Accuracy.of(values) for probe, values in accuracies.items()}
