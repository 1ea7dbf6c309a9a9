"""What may go wrong in a run, checked where it can be told clearly."""

import time

from accelerate import Accelerator

from dino.data import read_or_reason
from dino.errors import UserError
from dino.files import write_text
from dino.run import RunDirectory
from dino.training.loader import Batches
from dino.training.step import Step

CHECKED_IMAGES = 1000


def raise_if_broken(take_step: Step, batches: Batches, directory: RunDirectory | None) -> None:
    """Raise a `UserError` if a loss or gradient was not finite since the start; every process must call this.

    No such step has changed the student, and no checkpoint is written after it.
    """
    steps = [step for step in take_step.accelerator.gather(take_step.first_broken[None]).tolist() if step >= 0]
    if not steps:
        return
    step = min(steps)  # the same for all processes, though only one may have met it
    names = batches.names(step)
    listed = ""
    if directory is not None:
        listing = directory.path / "broken_batch.txt"
        listed = f"; all {len(names)} in {listing}"
        if take_step.accelerator.is_main_process:
            write_text(listing, "\n".join(names) + "\n")
    raise UserError(
        f"the loss or its gradient is NaN or infinite at step {step + 1} (batch: {', '.join(names[:3])} …{listed}). "
        "Its update was left out, and the checkpoints before it are whole. Usual ways on: a lower optim.lr, a "
        "longer optim.warmup_steps, optim.clip_grad=1, or train.precision=fp32"
    )


def rehearse(take_step: Step, batches: Batches, accelerator: Accelerator) -> None:
    """`--dry-run`: read up to 1,000 images spread over the pool, then take two steps on the real shapes."""
    if accelerator.is_main_process:
        _check_images(batches)
    accelerator.wait_for_everyone()
    for step, micro_batches in enumerate(batches, batches.start):
        began = time.perf_counter()
        losses = [value for name, value in take_step(step, micro_batches).items() if name.startswith("loss/")]
        accelerator.print(f"step {step + 1}: loss {float(sum(losses)):.4f}, {time.perf_counter() - began:.2f} s")
    raise_if_broken(take_step, batches, directory=None)
    accelerator.print("dry run: everything is in order; nothing was written")


def _check_images(batches: Batches) -> None:
    names, limit = batches.images.names, batches.config.data.max_unreadable
    sample = range(0, len(names), -(-len(names) // CHECKED_IMAGES))
    unreadable = []
    for index in sample:
        _, reason = read_or_reason(batches.images, index)
        if reason:
            unreadable.append(f"  {names[index]}: {reason}")
    print(f"read {len(sample):,} of {len(names):,} images, {len(unreadable)} unreadable")
    print(*unreadable[:20], sep="\n")
    if len(unreadable) > limit * len(sample):
        raise UserError(
            f"{len(unreadable)} of {len(sample):,} images cannot be read, more than data.max_unreadable={limit:g} "
            "allows: mend or remove them, or raise it"
        )
