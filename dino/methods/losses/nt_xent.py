"""NT-Xent, SimCLR's loss (Chen et al. 2020, eq. 1): the two views of an image find each other among all others."""

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from dino.distributed import is_distributed


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over both directions and images of −log of the softmax over similarities, at the other view of the image.

    ℓ(i, j) = −log( exp(sim(zᵢ, zⱼ)/τ) / Σ_{k ≠ i} exp(sim(zᵢ, z_k)/τ) ), sim the cosine, k over both views of all
    processes' images. Each process averages over its own images; gradients reach the others' too, so that the mean over
    processes has the gradient of the whole batch.

    Args:
        first, second: (B, E), any floating type; embeddings of two views of B images, B the same in all processes.
        temperature: τ.

    Returns:
        Scalar, fp32.
    """
    views = [F.normalize(view.float(), dim=1) for view in (first, second)]
    of_all, start = views, 0
    if is_distributed():
        of_all = [torch.cat(torch.distributed.nn.functional.all_gather(view)) for view in views]
        start = dist.get_rank() * len(first)
    own, everything = torch.cat(views), torch.cat(of_all)
    itself = start + torch.arange(len(first), device=first.device)
    partner = itself + len(of_all[0])  # of first views; the whole batch has its second views after all first ones
    with torch.autocast(first.device.type, enabled=False):
        similarity = own @ everything.T / temperature
    similarity = similarity.scatter(1, torch.cat([itself, partner])[:, None], -torch.inf)
    return F.cross_entropy(similarity, torch.cat([partner, itself]))
