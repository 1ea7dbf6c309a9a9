"""One optimizer step of DINO: teacher targets, student loss, gradients, update, moving average."""

import contextlib

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from dino.config import Config
from dino.objectives import Centre, SinkhornKnopp, dino_loss
from dino.training.health import TeacherOutput
from dino.training.network import Network, Normalise
from dino.training.optimizer import clip_gradients, set_rates, step_unless
from dino.training.schedules import Schedules
from dino.training.teacher import update_teacher


class Step:
    """Everything that moves once per optimizer step, and moves only there.

    Centre, teacher and schedules see optimizer steps, never micro-batches; the teacher looks at all micro-batches
    before the student sees the first, so that k micro-batches give what one large batch gives (up to rounding, and
    except for what BatchNorm and stochastic depth do per micro-batch).

    Args:
        student: as prepared by Accelerate (it may be wrapped); its parameters are those of `optimizer`.
        optimizer: of `build_optimizer`, as prepared by Accelerate.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        student: torch.nn.Module,
        teacher: Network,
        targets: Centre | SinkhornKnopp,
        optimizer: torch.optim.Optimizer,
        normalise: Normalise,
        schedules: Schedules,
    ):
        self.accelerator, self.config, self.schedules = accelerator, config, schedules
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.targets, self.normalise = targets, normalise
        self.network: Network = accelerator.unwrap_model(student)
        self.first_broken = torch.full((), -1, device=accelerator.device)

    def __call__(self, step: int, micro_batches: list[list[Tensor]]) -> dict[str, Tensor]:
        """Take optimizer step number `step` (from 0).

        Args:
            micro_batches: each a list of crops by size, (views·B, C, size, size) uint8, global views first.

        Returns:
            Named scalars on the device. A loss or gradient that is not finite leaves the student and its optimizer as
            they were (the teacher follows them, finite); `first_broken` then holds the step at which it first came up.
            `teacher_output` holds what the teacher made of this step's images.
        """
        schedules, device = self.schedules, self.accelerator.device
        set_rates(self.optimizer, schedules.lr(step), schedules.weight_decay(step))
        batches = [[self.normalise(crop.to(device, non_blocking=True)) for crop in crops] for crops in micro_batches]

        tokens, logits = self._teacher_outputs(batches)
        targets = self.targets.probabilities(logits, schedules.temperature(step))
        loss = self._backward(batches, targets)

        if step < int(self.config.optim.freeze_last_layer_steps):
            for parameter in self.network.head.last_layer.parameters():
                parameter.grad = None
        norm = self._update(step, loss)
        update_teacher(self.teacher, self.network, schedules.momentum(step))
        self.targets.update(logits.flatten(0, 1))
        self.teacher_output = TeacherOutput(tokens, logits, targets)
        return {"loss/dino": loss, "health/gradient_norm": norm}

    @torch.no_grad()
    def _teacher_outputs(self, batches: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Class tokens (2, B, D) and scores (2, B, K) of the global views of all micro-batches."""
        views = 2 + self.config.views.local_crops
        images = [sum(map(len, crops)) // views for crops in batches]
        with self.accelerator.autocast():
            outputs = [self.teacher([crops[0][: 2 * b]]) for crops, b in zip(batches, images, strict=True)]
        tokens, scores = (
            torch.cat([rearrange(output, "(g b) d -> g b d", g=2) for output in of_all], dim=1).float()
            for of_all in zip(*outputs, strict=True)
        )
        return tokens, scores

    def _backward(self, batches: list[list[Tensor]], targets: Tensor) -> Tensor:
        """Gradients of the mean loss over all micro-batches; processes exchange them at the last only."""
        views = 2 + self.config.views.local_crops
        images = targets.shape[1] // len(batches)
        total = torch.zeros((), device=targets.device)
        for index, (crops, target) in enumerate(zip(batches, targets.split(images, dim=1), strict=True)):
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.student):
                scores = rearrange(self.student(crops)[1], "(v b) k -> v b k", v=views)
                loss = dino_loss(scores, target, self.config.objective.student_temperature) / len(batches)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        return total

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip and step, unless loss or gradient is not finite; returns the gradient's norm before clipping."""
        optim, scaler = self.config.optim, self.accelerator.scaler
        self.accelerator.unscale_gradients(self.optimizer)
        norm = clip_gradients(self.network.parameters(), optim.clip_grad, optim.clip_scope)
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


def build_targets(config: Config) -> Centre | SinkhornKnopp:
    """What turns the teacher's scores into targets, as `objective.centering` says."""
    objective = config.objective
    if objective.centering == "sinkhorn":
        return SinkhornKnopp(objective.sinkhorn_iterations)
    return Centre(int(objective.prototypes), objective.center_momentum)
