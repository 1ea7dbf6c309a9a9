"""Linear probes as DINOv2 evaluates (Oquab et al. 2023, §7.1): a sweep of heads at once, the best by validation.

Every learning rate is tried on the class token of the last block and on those of the last four, with and without the
mean patch token. Heads of one kind of input are one tensor, so that the sweep costs little more than its largest head.
DINOv2 trains them on augmented crops; here features are computed once, which takes minutes instead of hours.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dino.evaluation.features import Features

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at batch 256, as published
BLOCKS = (1, 4)


class Head(NamedTuple):
    """One linear probe of the sweep and what it reached.

    Attributes:
        blocks: of how many of the last blocks it sees the class token.
        with_patches: whether it sees the mean patch token too.
        rate: its learning rate at batch 256.
        validation, test: accuracies, as fractions of 1.
    """

    blocks: int
    with_patches: bool
    rate: float
    validation: float
    test: float


class Heads(NamedTuple):
    """A head for each learning rate: weights (L, D, classes) and biases (L, 1, classes)."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) to (L, N, classes)."""
        return x @ self.weight + self.bias

    def accuracies(self, x: Tensor, y: Tensor) -> list[float]:
        """Of each head, in chunks of images."""
        correct = torch.zeros(len(self.weight), dtype=torch.int64, device=x.device)
        for part, target in zip(x.split(1024), y.split(1024), strict=True):
            correct += (self.logits(part).argmax(dim=2) == target).sum(dim=1)
        return (correct / len(y)).tolist()


def inputs(features: Features, blocks: int, with_patches: bool) -> np.ndarray:
    """(N, blocks · D), or (N, (blocks + 1) · D) with the mean patch token."""
    tokens = features.blocks[:, -blocks:].reshape(len(features.rows), -1)
    return np.concatenate([tokens, features.patch_means], axis=1) if with_patches else tokens


def sweep(
    train: Features,
    labels: np.ndarray,
    test: Features,
    test_labels: np.ndarray,
    classes: int,
    device: torch.device,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
) -> list[Head]:
    """Train all heads with SGD (momentum 0.9, cosine to 0, no decay), and judge each on a tenth of the training images.

    Args:
        labels, test_labels: class numbers.
        epochs: passes over the training images; at least 1,000 steps are taken.

    Returns:
        All heads, the best by validation first.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    validation, fit = np.split(order, [max(1, len(order) // 10)])
    steps = max(1000, epochs * len(fit) // batch_size)
    y, y_test = torch.from_numpy(labels).long().to(device), torch.from_numpy(test_labels).long().to(device)
    results = []
    for blocks in BLOCKS:
        if blocks > train.blocks.shape[1]:
            continue
        for with_patches in (False, True):
            x, x_test = (
                torch.from_numpy(inputs(part, blocks, with_patches)).float().to(device) for part in (train, test)
            )
            title = f"last {blocks}" + (" + patches" if with_patches else "")
            heads = _train(x[fit], y[fit], classes, steps, batch_size, seed, title)
            on_validation, on_test = heads.accuracies(x[validation], y[validation]), heads.accuracies(x_test, y_test)
            for rate, *accuracies in zip(RATES, on_validation, on_test, strict=True):
                results.append(Head(blocks, with_patches, rate, *accuracies))
    return sorted(results, key=lambda head: -head.validation)


def _train(x: Tensor, y: Tensor, classes: int, steps: int, batch_size: int, seed: int, title: str) -> Heads:
    """All heads of one kind of input, from the same weights and on the same batches."""
    generator = torch.Generator(x.device).manual_seed(seed)
    weight = 0.01 * torch.randn(1, x.shape[1], classes, device=x.device, generator=generator)
    heads = Heads(
        weight.repeat(len(RATES), 1, 1).requires_grad_(),
        torch.zeros(len(RATES), 1, classes, device=x.device, requires_grad=True),
    )
    velocities = [torch.zeros_like(parameter) for parameter in heads]
    rates = torch.tensor(RATES, device=x.device)[:, None, None] * batch_size / 256
    for step in tqdm(range(steps), desc=title, unit="step", leave=False):
        batch = torch.randint(len(x), (batch_size,), device=x.device, generator=generator)
        logits = heads.logits(x[batch])
        losses = F.cross_entropy(logits.transpose(1, 2), y[batch].expand(len(RATES), -1), reduction="none")
        gradients = torch.autograd.grad(losses.mean(dim=1).sum(), list(heads))
        factor = rates * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(heads, velocities, gradients, strict=True):
                velocity.mul_(0.9).add_(gradient)
                parameter.sub_(factor * velocity)
    return Heads(heads.weight.detach(), heads.bias.detach())
