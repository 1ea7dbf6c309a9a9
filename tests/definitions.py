"""What the family's papers minimise, written from their equations: slow, one image at a time, and plain to see."""

import torch
from torch import Tensor


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(dim=-1, keepdim=True).sqrt()


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, eq. 1 and algorithm 1: the mean of ℓ(i, j) over both orders of each image's two views."""
    views, images = unit(torch.cat([first, second])), len(first)
    terms = []
    for i in range(2 * images):
        partner = (i + images) % (2 * images)
        others = [torch.exp(views[i] @ views[k] / temperature) for k in range(2 * images) if k != i]
        terms.append(-torch.log(torch.exp(views[i] @ views[partner] / temperature) / sum(others)))
    return sum(terms) / len(terms)


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """He et al. 2020, eq. 1, of one query (E,), its key (E,) and other keys (K, E)."""
    positive = torch.exp(unit(query) @ unit(key) / temperature)
    return -torch.log(positive / (positive + sum(torch.exp(unit(query) @ unit(k) / temperature) for k in negatives)))


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    terms = [info_nce(query, key, queue, temperature) for query, key in zip(queries, keys, strict=True)]
    return sum(terms) / len(terms)


def batch_contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Chen, Xie & He 2021, algorithm 1: the other keys of the batch are the negatives; times 2τ."""
    others = [torch.cat([keys[:i], keys[i + 1 :]]) for i in range(len(keys))]
    terms = [info_nce(*row, temperature) for row in zip(queries, keys, others, strict=True)]
    return 2 * temperature * sum(terms) / len(terms)


def regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Grill et al. 2020, eq. 2: squared distance at unit length."""
    return sum((unit(p) - unit(z)).square().sum() for p, z in zip(predictions, targets, strict=True)) / len(targets)


def view_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Wu et al. 2025: half the squared distance of every pair of different views."""
    terms = [
        sum((unit(z) - unit(t)).square().sum() / 2 for z, t in zip(student[v], teacher[g], strict=True))
        / len(teacher[g])
        for g in range(len(teacher))
        for v in range(len(student))
        if v != g
    ]
    return sum(terms) / len(terms)


def coding_rate(features: Tensor, epsilon: float) -> Tensor:
    """Wu et al. 2025: ½·log det(I + d/ε²·Γ), Γ the mean of z·zᵀ, by its eigenvalues."""
    width = features.shape[1]
    covariance = sum(torch.outer(z, z) for z in unit(features)) / len(features)
    return 0.5 * torch.log(1 + width / epsilon**2 * torch.linalg.eigvalsh(covariance)).sum()


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Caron et al. 2020, §3.1: in turn the mass 1/K to every prototype and 1/B to every image; rows sum to 1."""
    codes = torch.exp(scores / epsilon)
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0, keepdim=True) / codes.shape[1]
        codes = codes / codes.sum(dim=1, keepdim=True) / codes.shape[0]
    return codes * codes.shape[0]


def swapped(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Caron et al. 2020, eq. 2: the code of each global view is predicted from every other view, pair by pair."""
    terms = []
    for g in range(len(codes)):
        for v in range(len(scores)):
            if v != g:
                probabilities = torch.exp(scores[v] / temperature)
                probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
                terms.append(-(codes[g] * torch.log(probabilities)).sum(dim=1).mean())
    return sum(terms) / len(terms)
