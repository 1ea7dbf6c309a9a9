"""`--dry-run`: are the images readable, does the run fit into memory, how long will it take?"""

import time
from contextlib import closing

import torch
from accelerate import Accelerator
from torch import Tensor

from dino.data import read_or_reason
from dino.errors import UserError
from dino.files import shown
from dino.report.facts import duration
from dino.training.faults import raise_if_broken
from dino.training.loader import Batches
from dino.training.memory import Memory, most_in_use
from dino.training.phases import Span, spans
from dino.training.step import Step

CHECKED_IMAGES = 1000
LONGEST = 10.0  # seconds that the steps of a phase are timed
FEWEST, MOST = 3, 20  # steps of a phase that are timed


def rehearse(take_step: Step, batches: Batches, accelerator: Accelerator) -> None:
    """Read up to 1,000 images spread over the pool, estimate memory, and take and time some steps of each phase.

    Raises:
        UserError: too many images cannot be read, the run does not fit into memory, or its loss is not finite.
    """
    if accelerator.is_main_process:
        check_images(batches)
    accelerator.wait_for_everyone()
    memory, seconds = Memory(take_step), 0.0
    for span in spans(batches.config):
        first = max(span.start, batches.start)
        if first < span.stop:
            seconds += _rehearse_span(take_step, batches, span._replace(start=first), memory)
    raise_if_broken(take_step, batches, directory=None)
    steps = batches.config.train.steps - batches.start
    accelerator.print(f"time: {duration(seconds)} for {steps:,} steps, without reports and checkpoints")
    accelerator.print("dry run: everything is in order; nothing was written")


def _rehearse_span(take_step: Step, batches: Batches, span: Span, memory: Memory) -> float:
    """Check that the steps of a phase fit, take and time a few, and give the seconds that all of them will take."""
    accelerator, losses = take_step.accelerator, []
    ends: list[float] = []
    with closing(batches.between(span.start, min(span.stop, span.start + 1 + MOST))) as micro_batches_by_step:
        for step, micro_batches in enumerate(micro_batches_by_step, span.start):
            if not ends:  # what is built in the first step does not count
                estimate = memory.estimate(micro_batches, step)
                accelerator.print(f"memory: {estimate.text()}")
                estimate.check(batches.config.train, accelerator.num_processes)
            losses.append(_total(take_step(step, micro_batches)))
            ends.append(time.perf_counter())
            enough = len(ends) > FEWEST and ends[-1] - ends[0] > LONGEST
            if accelerator.gather(torch.tensor([enough], device=accelerator.device)).any():  # all stop together
                break
    each = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
    accelerator.print(
        f"steps {span.start + 1} to {span.start + len(ends)}: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"{each:.3g} s each; {most_in_use(memory.device)}"
    )
    return each * (span.stop - span.start)


def _total(outputs: dict[str, Tensor]) -> Tensor:
    """The loss, for which the host waits, so that the step has been taken."""
    losses = [value for name, value in outputs.items() if name.startswith("loss/")]
    return sum(losses).cpu()  # type: ignore[union-attr]


def check_images(batches: Batches) -> None:
    """Read images spread over the pool, and list those that cannot be read.

    Raises:
        UserError: more than `data.max_unreadable` allows.
    """
    names, limit = batches.images.names, batches.config.data.max_unreadable
    sample = range(0, len(names), -(-len(names) // CHECKED_IMAGES))
    unreadable = []
    for index in sample:
        _, reason = read_or_reason(batches.images, index)
        if reason:
            unreadable.append(f"  {shown(names[index])}: {reason}")
    print(f"read {len(sample):,} of {len(names):,} images, {len(unreadable)} unreadable")
    print(*unreadable[:20], sep="\n")
    if len(unreadable) > limit * len(sample):
        raise UserError(
            f"{len(unreadable)} of {len(sample):,} images cannot be read, more than data.max_unreadable={limit:g} "
            "allows: mend or remove them, or raise it"
        )
