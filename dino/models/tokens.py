"""Packed tokens: all sequences of all crop sizes in one (T, D) matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from dino.models.positions import Grid


class Group(NamedTuple):
    """A run of equally long sequences in a packed (T, D) matrix.

    Attributes:
        batch: number of sequences.
        length: tokens of each.
        grid: rows and columns of the patches, which are a sequence's last tokens.
    """

    batch: int
    length: int
    grid: Grid


def unpack(tokens: Tensor, groups: list[Group]) -> list[Tensor]:
    """(T, D) to one (batch, length, D) per group."""
    parts = tokens.split([group.batch * group.length for group in groups])
    return [part.unflatten(0, (group.batch, group.length)) for part, group in zip(parts, groups, strict=True)]


def shorten(tokens: Tensor, groups: list[Group], lengths: list[int]) -> tuple[Tensor, list[Group]]:
    """(T, D) to (T', D), the first `lengths[i]` tokens of each sequence of group i; and the groups that they make."""
    shorter, first = shortened(groups, lengths), []
    if shorter == groups:
        return tokens, groups
    for sequences, length in zip(unpack(tokens, groups), lengths, strict=True):
        first.append(sequences[:, :length].flatten(0, 1))
    return torch.cat(first), shorter


def shortened(groups: list[Group], lengths: list[int]) -> list[Group]:
    """The groups that the first `lengths[i]` tokens of each sequence of group i make."""
    return [group._replace(length=length) for group, length in zip(groups, lengths, strict=True)]
