"""InfoNCE as in MoCo: a query finds its own key among others (He et al. 2020, eq. 1; Chen, Xie & He 2021, §3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.distributed import gathered_rows, rank_and_size


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean over queries of −log( exp(q·k⁺/τ) / (exp(q·k⁺/τ) + Σ_{k in queue} exp(q·k/τ)) ), vectors at unit length.

    Args:
        queries: (B, E), any floating type.
        keys: (B, E), of the same images; no gradient flows to them.
        queue: (K, E), of other images.
        temperature: τ.

    Returns:
        Scalar, fp32.
    """
    queries, keys, queue = (F.normalize(vectors.float(), dim=1) for vectors in (queries, keys.detach(), queue))
    with torch.autocast(queries.device.type, enabled=False):
        logits = torch.cat([(queries * keys).sum(dim=1, keepdim=True), queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def batch_contrast(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    """2τ times the mean over queries of −log( exp(q·k⁺/τ) / Σ_k exp(q·k/τ) ), k over the keys of all processes.

    The factor 2τ is the paper's (algorithm 1): the gradient's size then depends less on the temperature.

    Args:
        queries: (B, E), any floating type, B the same in all processes.
        keys: (B, E), of the same images; no gradient flows to them.
        temperature: τ.

    Returns:
        Scalar, fp32.
    """
    queries, keys = (F.normalize(vectors.float(), dim=1) for vectors in (queries, keys.detach()))
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ gathered_rows(keys, equally_many=True).T / temperature
    own = rank_and_size()[0] * len(queries) + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(logits, own)
