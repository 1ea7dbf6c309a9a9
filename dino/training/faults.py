"""What may go wrong in a run, checked where it can be told clearly."""

from dino.errors import UserError
from dino.files import write_text
from dino.run import RunDirectory
from dino.training.loader import Batches
from dino.training.step import Step


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
