"""One optimizer step of any method: targets, losses, gradients, update, and what moves afterwards."""

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dino.config.schema import Config
from dino.methods import Batch, Method
from dino.methods.method import drop_gradients
from dino.methods.schedule import Schedule
from dino.training.normalise import Normalise
from dino.training.optimizer import clip_gradients, set_rates, step_unless
from dino.training.sharding import is_sharded


class Step:
    """Everything that moves once per optimizer step, and moves only there.

    Schedules and what the method keeps see optimizer steps, never micro-batches; targets are made for all micro-batches
    before the student sees the first, so that k micro-batches give what one large batch gives (up to rounding, and
    except for what looks at a micro-batch as a whole: BatchNorm, stochastic depth, KoLeo).

    Args:
        method: its `forward` is the student as prepared by Accelerate.
        optimizer: of `build_optimizer`, as prepared by Accelerate.
        schedules: `optim/lr` and `optim/weight_decay`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        method: Method,
        optimizer: torch.optim.Optimizer,
        normalise: Normalise,
        schedules: dict[str, Schedule],
    ):
        self.accelerator, self.config, self.method = accelerator, config, method
        self.optimizer, self.normalise, self.schedules = optimizer, normalise, schedules
        self.first_broken = torch.full((), -1, device=accelerator.device)

    def __call__(self, step: int, micro_batches: list[list[Tensor]]) -> dict[str, Tensor]:
        """Take optimizer step number `step` (from 0).

        Args:
            micro_batches: each a list of crops by size, (views·B, C, size, size) uint8, global views first.

        Returns:
            Named scalars on the device. A loss or gradient that is not finite leaves the student and its optimizer as
            they were (an average follows them, finite); `first_broken` then holds the step at which it first came up.
        """
        set_rates(self.optimizer, self.schedules["optim/lr"](step), self.schedules["optim/weight_decay"](step))
        batches = self._batches(micro_batches)
        losses = self._backward(batches, self.method.targets(batches, step))
        self.method.before_update(step)
        if step < self.config.optim.freeze_backbone_steps:
            drop_gradients(self.method.student.backbone)
        norm = self._update(step, torch.stack(list(losses.values())).sum())
        self.method.after_update(step)
        return {**losses, "health/gradient_norm": norm}

    def look(self, step: int, micro_batches: list[list[Tensor]]) -> None:
        """Only let the method see a step's images; nothing of it changes."""
        self.method.look(self._batches(micro_batches), step)

    def _batches(self, micro_batches: list[list[Tensor]]) -> list[Batch]:
        """Normalised crops on the device, with the images' rows in the global batch."""
        train, accelerator = self.config.train, self.accelerator
        size = train.batch_size // (accelerator.num_processes * train.accumulation)
        batches = []
        for index, crops in enumerate(micro_batches):
            first = (index * accelerator.num_processes + accelerator.process_index) * size
            normalised = [self.normalise(crop.to(accelerator.device, non_blocking=True)) for crop in crops]
            batches.append(Batch(normalised, range(first, first + size)))
        return batches

    def _backward(self, batches: list[Batch], targets: list[Any]) -> dict[str, Tensor]:
        """Gradients of the mean loss over all micro-batches; processes exchange them at the last only.

        Returns:
            The losses by name, each with its weight.
        """
        totals: dict[str, Tensor] = {}
        for index, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            # Whole gradients of a sharded student would not fit: it exchanges them at every micro-batch.
            exchanges = index == len(batches) - 1 or is_sharded(self.method.student)
            with contextlib.nullcontext() if exchanges else self.accelerator.no_sync(self.method.forward):
                losses = self.method.losses(batch, target)
                self.accelerator.backward(sum(losses.values()) / len(batches))
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / len(batches)
        return totals

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip and step, unless loss or gradient is not finite; returns the gradient's norm before clipping."""
        optim, scaler, student = self.config.optim, self.accelerator.scaler, self.method.student
        self.accelerator.unscale_gradients(self.optimizer)
        parts = student.children() if optim.clip_scope == "module" else [student]
        norms = [clip_gradients(part.parameters(), optim.clip_grad, optim.clip_scope) for part in parts]
        norm = torch.stack([norm.to(loss.device) for norm in norms]).norm()
        if scaler is None:
            broken = ~(loss.isfinite() & norm.isfinite())
            step_unless(self.optimizer.optimizer, broken)  # type: ignore[attr-defined]
        else:
            # The scaler itself leaves out steps whose gradient overflowed, and lowers the scale: no fault of the run.
            broken = ~loss.isfinite()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.first_broken = torch.where((self.first_broken < 0) & broken, step, self.first_broken)
        return norm
