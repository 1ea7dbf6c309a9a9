"""How fast are the losses? DINO's with its centre, forward and backward, and the targets by Sinkhorn-Knopp.

    python benchmarks/loss.py
    python benchmarks/loss.py --official ~/dino --dinov2 ~/dinov2

Logits are cosines of random directions, as of a head at its start. Beside the official code values and gradients are
compared before anything is timed.
"""

import argparse

import kit
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dino import cli
from dino.methods.losses import Center, dino_loss, sinkhorn_knopp

TEACHER, STUDENT = 0.04, 0.1  # temperatures


def main() -> None:
    arguments = parse()
    device = kit.begin(arguments)
    torch.manual_seed(0)
    shape = (arguments.views, arguments.batch, arguments.prototypes)
    student, teacher = cosines(shape, device), cosines((2, *shape[1:]), device)
    titles = "{} views, batch {}, K {:,}".format(*shape)
    kit.show(f"DINO, {titles}", kit.alternate(dino_ways(student, teacher, arguments), arguments.rounds, device))
    logits = teacher.flatten(0, 1)
    title = f"Sinkhorn, {len(logits)} × {shape[2]:,}"
    kit.show(title, kit.alternate(sinkhorn_ways(logits, arguments), arguments.rounds, device))


def dino_ways(student: Tensor, teacher: Tensor, arguments: argparse.Namespace) -> kit.Ways:
    """Loss, gradient and the centre's next value."""
    center = Center(teacher.shape[-1]).to(student.device)

    def ours() -> tuple[Tensor, Tensor]:
        logits = student.clone().requires_grad_()
        loss = dino_loss(logits, center.probabilities(teacher, TEACHER), STUDENT)
        loss.backward()
        center.update(teacher.flatten(0, 1))
        return loss, logits.grad

    if not arguments.official:
        return {"this project": ours}
    join_a_group_of_one()
    criterion = kit.official(arguments.official, "main_dino").DINOLoss(
        teacher.shape[-1], len(student), TEACHER, TEACHER, warmup_teacher_temp_epochs=0, nepochs=1, student_temp=STUDENT
    )
    criterion.to(student.device)

    def theirs() -> tuple[Tensor, Tensor]:
        logits = student.clone().requires_grad_()
        loss = criterion(logits.flatten(0, 1), teacher.flatten(0, 1), epoch=0)
        loss.backward()
        return loss, logits.grad

    for mine, other, what in zip(ours(), theirs(), ("DINO's loss", "its gradient"), strict=True):
        kit.same(mine, other, 1e-5, what)
    return {"official": theirs, "this project": ours}


def sinkhorn_ways(logits: Tensor, arguments: argparse.Namespace) -> kit.Ways:
    """Targets of one batch."""

    def ours() -> Tensor:
        return sinkhorn_knopp(logits, TEACHER)

    if not arguments.dinov2:
        return {"this project": ours}
    criterion = kit.official(arguments.dinov2, "dinov2.loss.dino_clstoken_loss").DINOLoss(logits.shape[1])

    def theirs() -> Tensor:
        return criterion.sinkhorn_knopp_teacher(logits, TEACHER)

    kit.same(ours(), theirs(), 1e-5, "Sinkhorn's targets")
    return {"official": theirs, "this project": ours}


def cosines(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Products of random directions of 256 numbers."""
    prototypes = F.normalize(torch.randn(shape[-1], 256, device=device), dim=-1)
    return F.normalize(torch.randn(*shape[:-1], 256, device=device), dim=-1) @ prototypes.T


def join_a_group_of_one() -> None:
    """The official loss adds up its centre over processes, of which there must be one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__)
    parser.add_argument("--dinov2", metavar="DIR", help="your clone of facebookresearch/dinov2, for Sinkhorn")
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16, help="images; Sinkhorn sees two views of each")
    parser.add_argument("--prototypes", type=int, default=65_536)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
