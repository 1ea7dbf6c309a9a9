"""The training step: whole, in its parts, and beside the official one with the same weights and crops.

    python benchmarks/step.py --official ~/dino
    python benchmarks/step.py --dinov2 ~/dinov2 --batch 4

Crops are noise that lies on the device: how they are made is measured by views.py. Operators are those that PyTorch
dispatches in a step, without views, about as many as a GPU launches; syncs make the host wait for it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import kit
import numpy as np
import torch
from official_dinov2 import OfficialDINOv2
from training import Built, Official, build, parser

from dino import cli
from dino.models import attention
from dino.precision import prefers_bf16
from dino.training.optimizer import clip_gradients, set_rates, step_unless

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from counting import Counted

Ways = dict[str, Callable[[], object]]


def main() -> None:
    arguments = parse()
    device = kit.begin(arguments)
    for precision in arguments.precision:
        built = build(arguments, precision, device)
        wholes: Ways = {}
        parts: Ways = {}
        if arguments.official or arguments.dinov2:
            theirs = (OfficialDINOv2 if arguments.dinov2 else Official)(arguments, built, precision)
            theirs.check(built, 1e-5 if precision == "fp32" else 1e-3)
            wholes["official"] = theirs.step
            parts = {f"official {name}": part for name, part in theirs.parts().items()}
        wholes["ours"] = lambda built=built: built.step(0, [built.views])  # type: ignore[misc]
        if precision == "bf16" and device.type == "cpu" and prefers_bf16(device):
            wholes["ours, attention in fp32"] = patch.object(attention, "prefers_bf16", lambda _: False)(wholes["ours"])
        seconds = kit.alternate(wholes, arguments.rounds, device)
        kit.show(f"{precision}, whole step, {arguments.batch} images", seconds)
        kit.print_table(f"{precision}, counted", ["operators", "syncs"], [counted(*way) for way in wholes.items()])
        parts |= {f"ours {name}": part for name, part in Parts(built).parts().items()}
        show_parts(precision, kit.alternate(parts, arguments.rounds, device))


def counted(name: str, way: Callable[[], object]) -> list[object]:
    with Counted() as count:
        way()
    return [name, f"{count.operators:,}", count.syncs]


def show_parts(precision: str, seconds: dict[str, np.ndarray]) -> None:
    """Medians of ours and the official code's side by side."""
    rows = []
    for name, taken in seconds.items():
        whose, part = name.split()
        if whose == "ours":
            theirs = seconds.get(f"official {part}")
            beside = ["", ""] if theirs is None else [milliseconds(theirs), f"{np.median(theirs / taken):.2f}"]
            rows.append([part, milliseconds(taken), *beside])
    kit.print_table(f"{precision}, parts, ms", ["ours", "official", "×"], rows)


def milliseconds(seconds: np.ndarray) -> str:
    return kit.number(float(np.median(1000 * seconds)))


class Parts:
    """Our step in pieces, which must be called in turn."""

    def __init__(self, built: Built):
        self.built, self.method = built, built.step.method
        self.student = self.method.forward

    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "teacher": self.teacher,
            "student": self.forward,
            "loss": self.loss,
            "backward": lambda: self.total.backward(),
            "clip": self.clip,
            "optimizer": self.update,
            "average": lambda: self.method.after_update(0),
        }

    def teacher(self) -> None:
        set_rates(self.built.optimizer, 1e-6, 0.04)
        self.batches = self.built.step._batches([self.built.views])
        (self.target,) = self.method.targets(self.batches, 0)

    def forward(self) -> None:
        with self.method.autocast():
            self.output = self.student(self.batches[0].crops, self.target.masks, hide=True)

    def loss(self) -> None:
        self.method.forward = lambda *arguments, **options: self.output
        self.total = sum(self.method.losses(self.batches[0], self.target).values())
        self.method.forward = self.student

    def clip(self) -> None:
        clip_gradients(self.method.student.parameters(), 3.0, self.built.config.optim.clip_scope)

    def update(self) -> None:
        step_unless(self.built.optimizer, torch.zeros((), dtype=torch.bool, device=self.total.device))
        self.built.optimizer.zero_grad()


def parse() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--dinov2", metavar="DIR", help="instead: your clone of facebookresearch/dinov2; preset dinov2")
    arguments = made.parse_args()
    if arguments.dinov2:
        arguments.preset = "dinov2"
    return arguments


if __name__ == "__main__":
    cli.run(main)
