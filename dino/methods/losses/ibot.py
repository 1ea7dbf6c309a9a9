"""The iBOT objective (Zhou et al. 2022): the student predicts what the teacher sees in the patches hidden from it."""

from torch import Tensor


def ibot_loss(
    student_logits: Tensor, teacher_probabilities: Tensor, weights: Tensor, crops: int, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy over masked patches, averaged in each crop and then over crops.

    L = 1/C · Σ_c 1/|M_c| · Σ_{i ∈ M_c} −Σ_k q_ci[k]· log softmax(z_ci / τ)[k],  C counting crops without a mask too, as
    DINOv2 does (Oquab et al. 2023, §4): half of the crops masked halves the loss.

    Args:
        student_logits: (M, K), of the masked patches of all crops, any floating type.
        teacher_probabilities: (M, K), of the same patches, which the teacher sees.
        weights: (M,), 1/|M_c| of each patch's crop.
        crops: C.
        temperature: the student's τ.

    Returns:
        Scalar, fp32; 0 where nothing is masked.
    """
    logits = student_logits.float() / temperature
    # A row of q sums to 1, so −Σ q·log softmax(z) is logsumexp(z) − ⟨q, z⟩: no matrix is kept but the logits.
    entropy = logits.logsumexp(dim=-1) - (teacher_probabilities.float() * logits).sum(dim=-1)  # (M,)
    return (entropy * weights).sum() / crops
