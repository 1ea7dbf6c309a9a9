"""What may go wrong in a run, checked where it can be told clearly."""

import time
from pathlib import Path

from accelerate import Accelerator

from dino.data import UnreadableImage
from dino.errors import UserError
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
            listing.write_text("\n".join(names) + "\n", encoding="utf-8", errors="surrogateescape")
    raise UserError(
        f"the loss or its gradient is NaN or infinite at step {step + 1} (batch: {', '.join(names[:3])} …{listed}). "
        "Its update was left out, and the checkpoints before it are whole. Usual ways on: a lower optim.lr, a "
        "longer optim.warmup_steps, optim.clip_grad=1, or train.precision=fp32"
    )


def refuse_other_images(there: str, here: str, checkpoint: Path) -> None:
    """Raise a `UserError` if a checkpoint was made with another set of images."""
    if there != here:
        raise UserError(
            f"the images are not those that {checkpoint} was made with (files were added, removed or renamed): "
            "restore them, or start a new run in another run.dir"
        )


def refuse_other_guide(there: str, here: str, name: str | None, checkpoint: Path) -> None:
    """Raise a `UserError` if a checkpoint was made with other weights by the name of `objective.distill`."""
    if there != here:
        raise UserError(
            f"objective.distill={name} is not what {checkpoint} was made with (a run that has been trained on since?): "
            "put the earlier weights back, or start a new run in another run.dir"
        )


def rehearse(take_step: Step, batches: Batches, accelerator: Accelerator) -> None:
    """`--dry-run`: read up to 1,000 images spread over the pool, then take two steps on the real shapes."""
    images = batches.images
    chosen = range(0, len(images.names), -(-len(images.names) // CHECKED_IMAGES))
    unreadable = []
    for index in chosen if accelerator.is_main_process else ():
        try:
            images.read(index)
        except UnreadableImage as reason:
            unreadable.append(f"  {images.names[index]}: {reason}")
    accelerator.print(f"read {len(chosen):,} of {len(images.names):,} images, {len(unreadable)} unreadable")
    accelerator.print(*unreadable[:20], sep="\n")
    if len(unreadable) > take_step.config.data.max_unreadable * len(chosen):
        raise UserError(
            f"{len(unreadable)} of {len(chosen):,} images cannot be read, more than "
            f"data.max_unreadable={take_step.config.data.max_unreadable:g} allows: mend or remove them, or raise it"
        )
    for step, micro_batches in enumerate(batches, batches.start):
        began = time.perf_counter()
        loss = float(take_step(step, micro_batches)["loss/dino"])
        accelerator.print(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - began:.2f} s")
    raise_if_broken(take_step, batches, batches.directory)
    accelerator.print("dry run: everything is in order; nothing was written")
