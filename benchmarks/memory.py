"""What a forward pass keeps for the backward pass, of an image with its ten crops, beside the official code's.

    python benchmarks/memory.py --official ~/dino --prototypes 65536

Each tensor's memory counts once, and parameters not at all. The same on every device, up to the kernels of attention.
"""

from collections.abc import Callable

import kit
from torch import Tensor
from training import Built, Official, build, parser

from dino import cli
from dino.training.memory import Kept


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    device = kit.begin(arguments)
    kept: dict[str, float] = {}
    for precision in arguments.precision:
        built = build(arguments, precision, device)
        if arguments.official:
            theirs = Official(arguments, built, precision)
            kept[f"official, {precision}"] = measure(lambda theirs=theirs: whole(theirs), theirs.student.parameters())
        for name, setting in (("", "false"), (", activation checkpointing", "true")):
            built = build(arguments, precision, device, f"train.activation_checkpointing={setting}")
            kept[f"ours, {precision}{name}"] = ours(built)
    first = next(iter(kept.values()))
    rows = [[name, f"{size / arguments.batch / 1e6:.1f}", f"{size / first:.2f}"] for name, size in kept.items()]
    kit.print_table("kept for the backward pass", ["MB an image", "of the first"], rows)


def ours(built: Built) -> float:
    method = built.step.method
    (batch,) = built.step._batches([built.views])
    (target,) = method.targets([batch], 0)
    return measure(lambda: sum(method.losses(batch, target).values()), method.student.parameters())


def whole(theirs: Official) -> Tensor:
    theirs.targets()
    theirs.forward()
    theirs.loss()
    return theirs.total


def measure(forward: Callable[[], Tensor], parameters) -> float:
    with Kept(parameters) as kept:
        total = forward()
    del total  # until here the graph held what was kept, so that no memory was counted for two
    return kept.bytes


if __name__ == "__main__":
    cli.run(main)
