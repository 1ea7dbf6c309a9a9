"""A queue of embeddings of earlier steps (He et al. 2020, §3.1; Caron et al. 2020, §3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.distributed import gathered_rows


class Queue(nn.Module):
    """The newest embeddings of all processes, in all processes the same; part of a checkpoint.

    At first it holds random directions, as it must hold something.

    Args:
        length: L, how many are kept.
        width: E.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.rows: Tensor
        self.steps: Tensor
        self.register_buffer("rows", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("steps", torch.full((length,), -1))  # in which each came in

    @torch.no_grad()
    def add(self, rows: Tensor, step: int) -> None:
        """Put (n, E) of this process, as many in each, before what is there; the oldest drop out.

        Rows that are not finite, of a broken step, are left out all together.
        """
        rows = gathered_rows(rows.float(), equally_many=True)
        moved = torch.cat([rows, self.rows])[: len(self.rows)]
        steps = torch.cat([self.steps.new_full((len(rows),), step), self.steps])[: len(self.rows)]
        is_whole = rows.isfinite().all()  # on the device, so that the host need not wait
        self.rows.copy_(torch.where(is_whole, moved, self.rows))
        self.steps.copy_(torch.where(is_whole, steps, self.steps))

    def age(self, step: int) -> Tensor:
        """Mean over its rows of how many steps ago they came in."""
        return (step - self.steps).float().mean()
