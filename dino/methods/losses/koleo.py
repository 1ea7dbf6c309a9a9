"""KoLeo: features that are spread out (Sablayrolles et al. 2019; Oquab et al. 2023, §4)."""

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from dino.distributed import is_distributed

EPSILON = 1e-8  # DINOv2's, added to each difference and to each distance
ROUNDING = 1e-7  # of unit vectors in fp32: distances below have no direction to part in


def koleo_loss(features: Tensor, over_processes: bool = False) -> Tensor:
    """−(1/n)·Σᵢ log(min_{j≠i} ‖xᵢ − xⱼ + ε‖ + ε) of unit-length features: the differential entropy's estimate, negated.

    Gradients reach both ends of each distance, but for copies, whose difference is rounding.

    Args:
        features: (n, D), any floating type; of different images.
        over_processes: look for neighbours among the features of all processes; each still averages over its own.

    Returns:
        Scalar, fp32; 0 where there is no other feature.
    """
    unit = F.normalize(features.float(), dim=-1)
    others, first = unit, 0
    if over_processes and is_distributed():
        others = torch.cat(torch.distributed.nn.functional.all_gather(unit))
        first = dist.get_rank() * len(unit)  # every process has as many
    if len(others) < 2:
        return unit.sum() * 0
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        similarity = unit @ others.T
        itself = torch.arange(len(unit), device=unit.device)
        similarity[itself, first + itself] = -2
        nearest = similarity.argmax(dim=1)
    # From the difference, not from the product, whose rounding would hide the distance of near copies.
    distances = torch.linalg.vector_norm(unit - others[nearest] + EPSILON, dim=1)
    distances = torch.where(distances > ROUNDING, distances, distances.detach())
    return -(distances + EPSILON).log().mean()
