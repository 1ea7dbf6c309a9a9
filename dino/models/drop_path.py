"""Stochastic depth (Huang et al. 2016): which sequences lose which residual branches, drawn for all blocks at once.

What a block gets of it are tensors of fixed shapes, so that one compiled graph serves all blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dino.models.tokens import Group, shortened


class Subset(NamedTuple):
    """Which tokens go through a block's two branches: attention, then MLP.

    Attributes:
        groups: that the chosen sequences make; the second branch's are as long as the block's outputs.
        inputs: (2, T") rows of the block's input.
        outputs: (2, T‴) rows of its output, to which they are added.
        scales: (T‴, 1) how many sequences of their group there are for each that was chosen.
    """

    groups: list[Group]
    inputs: Tensor
    outputs: Tensor
    scales: Tensor


def draw_factors(groups: list[Group], lengths: list[int], rate: float, depth: int, like: Tensor) -> list[Tensor]:
    """Each sequence by itself loses a branch with a probability that grows linearly from 0 to `rate` at the last block.

    Args:
        lengths: tokens of each sequence that the last block gives.
        like: of the type and on the device that the factors are to have.

    Returns:
        For each block (2, T, 1), for the last (2, T', 1): by what each token's two branches are multiplied: 0, or
        1 / (1 − probability).
    """
    sequences = sum(group.batch for group in groups)
    keep = torch.linspace(1, 1 - rate, depth, device=like.device)[:, None, None]
    factors = (torch.bernoulli(keep.expand(depth, 2, sequences)) / keep).to(like.dtype)
    of_tokens = factors[:-1].index_select(2, _sequences(groups, like.device)).unsqueeze(3)
    of_last = factors[-1].index_select(1, _sequences(shortened(groups, lengths), like.device)).unsqueeze(2)
    return [*of_tokens.unbind(), of_last]


def _sequences(groups: list[Group], device: torch.device) -> Tensor:
    """(T,) the number of the sequence that each token is of."""
    first, parts = 0, []
    for group in groups:
        numbers = torch.arange(first, first + group.batch, device=device)
        parts.append(numbers[:, None].expand(-1, group.length).flatten())
        first += group.batch
    return torch.cat(parts)


def draw_subsets(groups: list[Group], lengths: list[int], rate: float, depth: int, like: Tensor) -> list[Subset]:
    """DINOv2's way (Oquab et al. 2023, §5): a fixed number of random sequences of each group goes through a branch.

    That is all of them but for `rate`, and at least one; what is dropped costs nothing. For the arguments see
    `draw_factors`.
    """
    chosen = [group._replace(batch=max(1, int(group.batch * (1 - rate)))) for group in groups]
    numbers = []  # (2 · depth, count) of each group
    for group, few in zip(groups, chosen, strict=True):
        order = torch.rand(2 * depth, group.batch, device=like.device).argsort(dim=1)
        numbers.append(order[:, : few.batch])
    short = shortened(groups, lengths)
    rows, scales = _rows(groups, numbers).unflatten(0, (depth, 2)), _scales(groups, chosen, like)
    subsets = [Subset(chosen, of_block, of_block, scales) for of_block in rows.unbind()]
    if short != groups:
        outputs = _rows(short, [of_group[-2:] for of_group in numbers])
        scales = _scales(short, shortened(chosen, lengths), like)
        subsets[-1] = Subset(chosen, rows[-1], outputs, scales)
    return subsets


def _rows(groups: list[Group], numbers: list[Tensor]) -> Tensor:
    """(n, T") where the tokens of some sequences of each group, (n, count), are in the packed matrix."""
    start, parts = 0, []
    for group, of_group in zip(groups, numbers, strict=True):
        within = torch.arange(start, start + group.length, device=of_group.device)
        parts.append((of_group[:, :, None] * group.length + within).flatten(1))
        start += group.batch * group.length
    return torch.cat(parts, dim=1)


def _scales(groups: list[Group], chosen: list[Group], like: Tensor) -> Tensor:
    parts = []
    for group, few in zip(groups, chosen, strict=True):
        parts.append(like.new_full((few.batch * group.length, 1), group.batch / few.batch))
    return torch.cat(parts)
