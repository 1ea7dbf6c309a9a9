"""What the teacher's targets q say over samples and prototypes, in nats (Caron et al. 2021, §5.3)."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from dino.distributed import mean_over_processes, reduced
from dino.monitor.indicators.indicator import Indicator, Observed, Sizes


def mean_entropy(targets: Tensor) -> Tensor:
    """Mean of H(q) over rows (N, K); ln K: uniform, 0: always certain."""
    return torch.special.entr(targets).sum(dim=-1).mean()


def kl_to_mean(targets: Tensor, mean: Tensor) -> Tensor:
    """Mean of KL(q ‖ mean), what a target (N, K) tells of its sample; `mean` (K,) may be that of more samples."""
    # Mean of Σ q ln (q / m) = −mean H(q) − Σ mean(q) ln m
    cross = -torch.xlogy(targets.mean(dim=0), mean).sum()
    return (cross - mean_entropy(targets)).clamp(min=0)


def _targets(observed: Observed) -> Tensor:
    assert observed.seen.targets is not None
    return observed.seen.targets.flatten(0, 1)


def _entropy(observed: Observed) -> Tensor:
    return mean_entropy(_targets(observed))


def _entropy_ratio(observed: Observed) -> Tensor:
    targets = _targets(observed)
    return mean_entropy(targets) / math.log(max(2, targets.shape[1]))


def _kl_to_center(observed: Observed) -> Tensor:
    targets = _targets(observed)
    return kl_to_mean(targets, mean_over_processes(targets.mean(dim=0)))


def _prototypes_in_use(observed: Observed) -> Tensor:
    used = reduced(observed.used.to(torch.int32), dist.ReduceOp.MAX)
    return (used > 0).sum() / min(len(used), observed.views)


def _center_norm(observed: Observed) -> Tensor:
    assert observed.seen.logits is not None
    return mean_over_processes(observed.seen.logits.flatten(0, 1).mean(dim=0)).norm()


def _logarithm(sizes: Sizes) -> float:
    return math.log(sizes.outputs or 1)


TARGETS = (
    Indicator(
        "health/teacher_entropy",
        "teacher entropy",
        "the entropy of the teacher's targets, in nats",
        ("targets",),
        _entropy,
    ),
    Indicator(
        "health/entropy_ratio",
        "teacher entropy / ln K",
        "the teacher's entropy over ln K; 1: uniform, 0: one prototype",
        ("targets",),
        _entropy_ratio,
        lambda sizes: (0.02, 0.995),
    ),
    Indicator(
        "health/kl_to_center",
        "what targets tell (KL, nats)",
        "what targets tell of their image, in nats; 0: nothing",
        ("targets",),
        _kl_to_center,
        lambda sizes: (0.01 * _logarithm(sizes), _logarithm(sizes)),
    ),
    Indicator(
        "health/prototypes_in_use",
        "prototypes in use",
        "fraction of the prototypes that could be some view's first choice",
        ("targets",),
        _prototypes_in_use,
        lambda sizes: (0.05, 1.0),
    ),
    Indicator(
        "health/center_norm",
        "norm of the mean logits",
        "the length of the mean of the teacher's logits",
        ("targets",),
        _center_norm,
    ),
)
