"""One optimizer step of DINO or DINOv2: teacher targets, student losses, gradients, update, moving average."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from dino.config.read import Config
from dino.methods.ema import update_teacher
from dino.methods.heads import DINOHead
from dino.methods.losses import dino_loss, ibot_loss, koleo_loss
from dino.methods.masks import MaskDraw, Masks
from dino.methods.network import Network, Normalise
from dino.training.initial import freeze
from dino.training.optimizer import clip_gradients, set_rates, step_unless
from dino.training.schedules import Schedules
from dino.training.sharding import is_sharded
from dino.training.targets import Targets, TeacherOutput


class MicroBatch(NamedTuple):
    """What a micro-batch of b images is to the objective.

    Attributes:
        crops: by size, (views·b, C, size, size) fp32, normalised, global views first.
        masks: of the 2·b global crops; None without a masked-patch loss.
    """

    crops: list[Tensor]
    masks: Masks | None


class Step:
    """Everything that moves once per optimizer step, and moves only there.

    Centre, teacher and schedules see optimizer steps, never micro-batches; the teacher looks at all micro-batches
    before the student sees the first, so that k micro-batches give what one large batch gives (up to rounding, and
    except for what BatchNorm, stochastic depth and KoLeo do per micro-batch).

    Args:
        student: as prepared by Accelerate (it may be wrapped); its parameters are those of `optimizer`.
        optimizer: of `build_optimizer`, as prepared by Accelerate.
        guide: a frozen network whose scores become the targets instead of the teacher's (distillation).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        student: torch.nn.Module,
        teacher: Network,
        targets: Targets,
        optimizer: torch.optim.Optimizer,
        normalise: Normalise,
        schedules: Schedules,
        guide: Network | None = None,
    ):
        self.accelerator, self.config, self.schedules = accelerator, config, schedules
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.targets, self.normalise, self.guide = targets, normalise, guide
        self.network: Network = accelerator.unwrap_model(student)
        self.first_broken = torch.full((), -1, device=accelerator.device)
        self.draw_masks = mask_draw(config)

    def __call__(self, step: int, micro_batches: list[list[Tensor]]) -> dict[str, Tensor]:
        """Take optimizer step number `step` (from 0).

        Args:
            micro_batches: each a list of crops by size, (views·B, C, size, size) uint8, global views first.

        Returns:
            Named scalars on the device. A loss or gradient that is not finite leaves the student and its optimizer as
            they were (the teacher follows them, finite); `first_broken` then holds the step at which it first came up.
            `teacher_output` holds what the teacher made of this step's images.
        """
        schedules = self.schedules
        set_rates(self.optimizer, schedules.lr(step), schedules.weight_decay(step))
        batches = self._prepare(step, micro_batches)

        tokens, logits, patch_logits = self._teacher_outputs(batches)
        temperature = schedules.temperature(step)
        targets = self.targets.dino.probabilities(logits, temperature)
        patch_targets = None
        if self.targets.ibot is not None and patch_logits is not None:
            patch_targets = self.targets.ibot.probabilities(patch_logits, temperature)
        losses = self._backward(batches, targets, patch_targets)

        if step < int(self.config.optim.freeze_last_layer_steps):
            for head in (self.network.head, self.network.patch_head):
                if isinstance(head, DINOHead):
                    freeze(head.last_layer)
        if step < int(self.config.optim.freeze_backbone_steps):
            freeze(self.network.backbone)
        norm = self._update(step, sum(losses.values(), torch.zeros_like(losses["loss/dino"])))
        update_teacher(self.teacher, self.network, schedules.momentum(step))
        self.targets.dino.update(logits.flatten(0, 1))
        if self.targets.ibot is not None and patch_logits is not None:
            self.targets.ibot.update(patch_logits)
        self.teacher_output = TeacherOutput(tokens, logits, targets)
        return {**losses, "health/gradient_norm": norm}

    @torch.no_grad()
    def look(self, step: int, micro_batches: list[list[Tensor]]) -> None:
        """Only let the teacher see a step's images, for `teacher_output`; as it is used, so nothing of it changes."""
        self.teacher.eval()
        tokens, logits, _ = self._teacher_outputs(self._prepare(step, micro_batches))
        self.teacher.train()
        targets = self.targets.dino.probabilities(logits, self.schedules.temperature(step))
        self.teacher_output = TeacherOutput(tokens, logits, targets)

    def _prepare(self, step: int, micro_batches: list[list[Tensor]]) -> list[MicroBatch]:
        device = self.accelerator.device
        return [
            MicroBatch(
                crops=[self.normalise(crop.to(device, non_blocking=True)) for crop in crops],
                masks=self._masks(step, index, crops),
            )
            for index, crops in enumerate(micro_batches)
        ]

    def _masks(self, step: int, micro_batch: int, crops: list[Tensor]) -> Masks | None:
        """Of this process's images in a micro-batch, by their places in the global batch."""
        if self.draw_masks is None:
            return None
        train, accelerator = self.config.train, self.accelerator
        size = train.batch_size // (accelerator.num_processes * train.accumulation)
        first = (micro_batch * accelerator.num_processes + accelerator.process_index) * size
        rows, columns = (side // self.config.model.patch_size for side in crops[0].shape[-2:])
        return self.draw_masks(step, range(first, first + size), (rows, columns)).to(accelerator.device)

    @torch.no_grad()
    def _teacher_outputs(self, batches: list[MicroBatch]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class tokens (2, B, D), scores (2, B, K) and those of masked patches (M, K'), of all micro-batches.

        In distillation tokens are the teacher's, which is the result, and scores those of the frozen guide.
        """
        views = 2 + self.config.views.local_crops
        images = [sum(map(len, batch.crops)) // views for batch in batches]
        source = self.guide or self.teacher
        with self.accelerator.autocast():
            outputs = [source([batch.crops[0][: 2 * b]], batch.masks) for batch, b in zip(batches, images, strict=True)]
        tokens, scores = (
            torch.cat([rearrange(output, "(g b) d -> g b d", g=2) for output in of_all], dim=1).float()
            for of_all in zip(*(output[:2] for output in outputs), strict=True)
        )
        if self.guide is not None:
            with self.accelerator.autocast():
                own = [self.teacher([batch.crops[0][: 2 * b]]) for batch, b in zip(batches, images, strict=True)]
            tokens = torch.cat([rearrange(output.tokens, "(g b) d -> g b d", g=2) for output in own], dim=1).float()
        of_patches = [output.patch_scores for output in outputs if output.patch_scores is not None]
        return tokens, scores, torch.cat(of_patches).float() if of_patches else None

    def _backward(self, batches: list[MicroBatch], targets: Tensor, patch_targets: Tensor | None) -> dict[str, Tensor]:
        """Gradients of the mean loss over all micro-batches; processes exchange them at the last only.

        Returns:
            The losses by name, each with its weight.
        """
        totals: dict[str, Tensor] = {}
        shares = targets.split(targets.shape[1] // len(batches), dim=1)
        of_patches: Sequence[Tensor | None] = [None] * len(batches)
        if patch_targets is not None:
            of_patches = patch_targets.split([len(batch.masks.rows) for batch in batches if batch.masks is not None])
        for index, (batch, target, patch_target) in enumerate(zip(batches, shares, of_patches, strict=True)):
            exchanges = index == len(batches) - 1 or is_sharded(self.network)  # whole gradients would not fit
            with contextlib.nullcontext() if exchanges else self.accelerator.no_sync(self.student):
                losses = self._losses(batch, target, patch_target)
                self.accelerator.backward(sum(losses.values()) / len(batches))
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / len(batches)
        return totals

    def _losses(self, batch: MicroBatch, targets: Tensor, patch_targets: Tensor | None) -> dict[str, Tensor]:
        """The student's losses on a micro-batch of b images, each with its weight, by the names of the metrics."""
        objective, views, images = self.config.objective, 2 + self.config.views.local_crops, targets.shape[1]
        with self.accelerator.autocast():
            output = self.student(batch.crops, batch.masks, hide=self.guide is None)
        scores = rearrange(output.scores, "(v b) k -> v b k", v=views)
        losses = {"loss/dino": dino_loss(scores, targets, objective.student_temperature)}
        if batch.masks is not None and patch_targets is not None:
            weights, temperature = batch.masks.weights, objective.student_temperature
            loss = ibot_loss(output.patch_scores, patch_targets, weights, 2 * images, temperature)
            losses["loss/ibot"] = objective.ibot_weight * loss
        if objective.koleo_weight:
            first, second = output.tokens[: 2 * images].chunk(2)
            everywhere = objective.koleo_scope == "all"
            spread = koleo_loss(first, everywhere) + koleo_loss(second, everywhere)
            losses["loss/koleo"] = objective.koleo_weight * spread
        return losses

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip and step, unless loss or gradient is not finite; returns the gradient's norm before clipping."""
        optim, scaler = self.config.optim, self.accelerator.scaler
        self.accelerator.unscale_gradients(self.optimizer)
        parts = self.network.children() if optim.clip_scope == "module" else [self.network]
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


def mask_draw(config: Config) -> MaskDraw | None:
    """Masks as the config describes them; None without a masked-patch loss."""
    if not config.objective.ibot_weight:
        return None
    low, high = config.objective.mask_ratio
    return MaskDraw(config.train.seed, config.train.batch_size, config.objective.mask_share, (low, high))
