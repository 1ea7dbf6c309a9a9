"""SimDINO's two terms (Wu et al. 2025): views agree with the teacher's, and features keep a high coding rate."""

import torch
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from dino.distributed import is_distributed, rank_and_size


def view_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ½·‖z_v − z_g‖² over all pairs of a teacher's view g and another student's view v ≠ g, and over images.

    Args:
        student: (V, B, E), any floating type; the teacher's views first.
        teacher: (G, B, E); no gradient flows to it.

    Returns:
        Scalar, fp32; of unit vectors 1 − cos.
    """
    student, teacher = (F.normalize(views.float(), dim=-1) for views in (student, teacher.detach()))
    with torch.autocast(student.device.type, enabled=False):
        cosines = torch.einsum("gbe,vbe->gv", teacher, student) / student.shape[1]
    views, globals_ = len(student), len(teacher)
    return 1 - (cosines.sum() - cosines.diagonal().sum()) / (globals_ * views - globals_)


def coding_rate(features: Tensor, epsilon: float = 0.5) -> Tensor:
    """R(Γ) = ½·log det(I + E/ε²·Γ), Γ = 1/n·Σ z·zᵀ over the unit-length features of all processes.

    What it takes to code the features up to a precision of ε (Ma et al. 2007): 0 where all are 0, largest where they
    fill all directions evenly. The mean over processes has the gradient of the whole batch.

    Args:
        features: (B, E), any floating type, B the same in all processes.
        epsilon: ε.

    Returns:
        Scalar, fp32, in nats.
    """
    unit, width = F.normalize(features.float(), dim=1), features.shape[1]
    with torch.autocast(unit.device.type, enabled=False):
        covariance = unit.T @ unit / (len(unit) * rank_and_size()[1])
        if is_distributed():
            covariance = torch.distributed.nn.functional.all_reduce(covariance)
        identity = torch.eye(width, device=unit.device)
        # Positive definite by its making: log det is twice the logarithms of the Cholesky factor's diagonal.
        factor = torch.linalg.cholesky_ex(identity + width / epsilon**2 * covariance).L
    return factor.diagonal().log().sum()
