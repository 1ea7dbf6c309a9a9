"""DINO (Caron et al. 2021), and with masked patches and KoLeo DINOv2's objective (Oquab et al. 2023, §4).

The student's class tokens of all crops predict the teacher's of the global crops. The teacher is a moving average of
the student, and its targets are centered or balanced so that they cannot become the same for all images. With
`ibot_weight` the student also predicts patches that are hidden from it (Zhou et al. 2022); with `koleo_weight` class
tokens of different images are pushed apart (Sablayrolles et al. 2019). In a distillation the targets come from a
frozen teacher instead (dino/methods/distill.py).
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from dino.config.schema import Config
from dino.data import Pool
from dino.errors import UserError
from dino.methods.dino_settings import AUTO_RULES, REMEDIES, Settings, doubts, problems
from dino.methods.distill import FrozenTeacher
from dino.methods.ema import update_average
from dino.methods.heads import DINOHead
from dino.methods.losses import TERMS, Center, SinkhornKnopp, dino_loss, ibot_loss, koleo_loss
from dino.methods.masks import MaskDraw, Masks
from dino.methods.method import Batch, Curve, Method, Outside, Seen, drop_gradients
from dino.methods.network import Network, Outputs
from dino.methods.schedule import Schedule
from dino.models import Backbone, build_backbone, copy_weights


class Target(NamedTuple):
    """What a micro-batch of B images is compared with.

    Attributes:
        probabilities: (2, B, K) of the class tokens of the global views.
        masks: of these 2·B crops; None without a masked-patch loss.
        patch_probabilities: (M, K') of the masked patches; None without.
        teacher: what further loss terms compare with; None without.
    """

    probabilities: Tensor
    masks: Masks | None
    patch_probabilities: Tensor | None
    teacher: Outputs | None


class DINO(Method):
    """Student, moving-average teacher and the targets' state; see the module."""

    Settings = Settings
    auto_rules = AUTO_RULES
    remedies = REMEDIES

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        super().__init__(config, initial, outside)
        self.student, self.teacher = build_networks(config, initial)
        self.result = self.teacher
        self.frozen: FrozenTeacher | None = outside.weights if outside is not None else None
        objective = config.objective
        self.centering = build_centering(objective, objective.prototypes)
        self.patch_centering = None
        if objective.ibot_weight:
            self.patch_centering = build_centering(objective, objective.ibot_prototypes or objective.prototypes)
        self.draw_masks = mask_draw(config)
        self.logits: tuple[Tensor, Tensor | None]  # the teacher's, from `targets` until `after_update`

    def prepare(self, images: Pool, device: torch.device) -> None:
        """A frozen teacher without heads has its prototypes made of the run's own images."""
        self.target_network = self.teacher
        if self.frozen is not None:
            self.target_network = self.frozen.network(self.config, images, device)

    def state(self) -> dict[str, nn.Module]:
        centerings = nn.ModuleDict({"dino": self.centering})
        if self.patch_centering is not None:
            centerings["ibot"] = self.patch_centering
        return {"student": self.student, "teacher": self.teacher, "targets": centerings}

    @torch.no_grad()
    def targets(self, batches: list[Batch], step: int) -> list[Target]:
        """The teacher sees the global crops of all micro-batches first, so that its targets are balanced over all."""
        terms = self.config.objective.terms
        masks = [self._masks(batch, step) for batch in batches]
        outputs = []
        for batch, batch_masks in zip(batches, masks, strict=True):
            with self.autocast():
                outputs.append(self.target_network([batch.global_crops], batch_masks, patches=bool(terms)))
        tokens = _joined([output.tokens for output in outputs])
        logits = _joined([output.logits for output in outputs])
        if self.frozen is not None:  # what is watched is the result, not the frozen teacher
            tokens = self._own_tokens(batches)
        temperature = self.schedules["teacher/temperature"](step)
        probabilities = self.centering.probabilities(logits, temperature)
        self.seen = Seen(tokens, logits, probabilities)
        of_batches = probabilities.split([len(batch.rows) for batch in batches], dim=1)
        patch_logits, of_patches = None, [None] * len(batches)
        if self.patch_centering is not None:
            patch_logits = torch.cat([output.patch_logits for output in outputs]).float()
            patch_probabilities = self.patch_centering.probabilities(patch_logits, temperature)
            of_patches = patch_probabilities.split([len(output.patch_logits) for output in outputs])
        self.logits = logits, patch_logits
        teachers = outputs if terms else [None] * len(batches)
        return [Target(*parts) for parts in zip(of_batches, masks, of_patches, teachers, strict=True)]

    def losses(self, batch: Batch, target: Target) -> dict[str, Tensor]:
        objective, images = self.config.objective, len(batch.rows)
        with self.autocast():
            hides = self.frozen is None
            output = self.forward(batch.crops, target.masks, hide=hides, patches=bool(objective.terms))
        logits = rearrange(output.logits, "(v b) k -> v b k", b=images)
        losses = {"loss/dino": dino_loss(logits, target.probabilities, objective.student_temperature)}
        if target.masks is not None and target.patch_probabilities is not None:
            assert output.patch_logits is not None
            masked = ibot_loss(
                output.patch_logits,
                target.patch_probabilities,
                target.masks.weights,
                crops=2 * images,
                temperature=objective.student_temperature,
            )
            losses["loss/ibot"] = objective.ibot_weight * masked
        if objective.koleo_weight:
            first, second = output.tokens[: 2 * images].chunk(2)
            over_processes = objective.koleo_scope == "all"
            spread = koleo_loss(first, over_processes) + koleo_loss(second, over_processes)
            losses["loss/koleo"] = objective.koleo_weight * spread
        for name, weight in objective.terms.items():
            assert target.teacher is not None
            losses[f"loss/{name}"] = weight * TERMS[name](output, target.teacher, batch)
        return losses

    def before_update(self, step: int) -> None:
        """Prototypes stand still at first: an untrained student would only pull them together (Caron et al., C)."""
        if step < self.config.objective.freeze_last_layer_steps:
            for head in (self.student.head, self.student.patch_head):
                if isinstance(head, DINOHead):
                    drop_gradients(head.last_layer)

    def after_update(self, step: int) -> None:
        update_average(self.teacher, self.student, self.schedules["teacher/momentum"](step))
        logits, patch_logits = self.logits
        self.centering.update(logits.flatten(0, 1))
        if self.patch_centering is not None and patch_logits is not None:
            self.patch_centering.update(patch_logits)

    @torch.no_grad()
    def look(self, batches: list[Batch], step: int) -> None:
        self.teacher.eval()
        self.targets(batches, step)
        self.teacher.train()

    def _masks(self, batch: Batch, step: int) -> Masks | None:
        if self.draw_masks is None:
            return None
        patch_size = self.config.model.patch_size
        rows, columns = (side // patch_size for side in batch.crops[0].shape[-2:])
        return self.draw_masks(step, batch.rows, (rows, columns)).to(batch.crops[0].device)

    def _own_tokens(self, batches: list[Batch]) -> Tensor:
        tokens = []
        for batch in batches:
            with self.autocast():
                tokens.append(self.teacher([batch.global_crops]).tokens)
        return _joined(tokens)

    @classmethod
    def outside(cls, config: Config) -> Outside | None:
        if config.objective.distill is None:
            return None
        teacher = FrozenTeacher(config.objective.distill)
        return Outside(teacher.settings(config), f"objective.distill={teacher.name}", teacher)

    def checkpoint_facts(self) -> dict[str, Any]:
        return {"frozen_teacher": self.frozen.digest if self.frozen is not None else ""}

    def check_state(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """The frozen teacher must be the one that the run began with."""
        mine = self.checkpoint_facts()["frozen_teacher"]
        before = facts.get("frozen_teacher", facts.get("guide", mine))  # guide: in checkpoints of earlier versions
        if before != mine:
            raise UserError(
                f"objective.distill={self.config.objective.distill} is not what {checkpoint} was made with (a run that "
                "has been trained on since?): put the earlier weights back, or start a new run in another run.dir"
            )

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        return problems(config)

    @classmethod
    def doubts(cls, config: Config) -> Iterator[str]:
        return doubts(config)

    @classmethod
    def describe(cls, config: Config) -> str:
        weights = {
            "iBOT": config.objective.ibot_weight,
            "KoLeo": config.objective.koleo_weight,
        } | config.objective.terms
        return " + ".join(["DINO", *(f"{weight:g} {name}" for name, weight in weights.items() if weight)])

    @classmethod
    def facts(cls, config: Config) -> dict[str, str]:
        objective = config.objective
        return super().facts(config) | {"targets": f"{objective.prototypes} prototypes, {objective.centering}"}

    @classmethod
    def outputs(cls, config: Config) -> int | None:
        return config.objective.prototypes

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        return {
            "loss/dino": Curve("loss of class tokens", blank=math.log(config.objective.prototypes)),
            "loss/ibot": Curve("loss of masked patches"),
            "loss/koleo": Curve("KoLeo"),
            **{f"loss/{name}": Curve(name) for name in config.objective.terms},
        }

    @classmethod
    def make_schedules(cls, config: Config) -> dict[str, Schedule]:
        objective, steps = config.objective, config.train.steps
        temperature = objective.teacher_temperature
        return {
            "teacher/momentum": Schedule(objective.teacher_momentum, objective.teacher_momentum_end, steps),
            "teacher/temperature": Schedule(
                peak=temperature,
                end=temperature,
                steps=steps,
                start=objective.teacher_temperature_start,
                warmup=objective.teacher_temperature_warmup,
            ),
        }


def build_networks(config: Config, initial: Backbone | None = None) -> tuple[Network, Network]:
    """Student and teacher with the same weights; the teacher has no stochastic depth and takes no gradient.

    Args:
        initial: the backbone that both begin with; None: random weights. Heads are random.
    """
    hides_patches = config.objective.ibot_weight > 0 and config.objective.distill is None

    def network(drop_path: float) -> Network:
        backbone = build_backbone(config, drop_path, mask_token=hides_patches)
        return Network(backbone, *build_heads(config.objective, backbone.embed_dim))

    student, teacher = network(config.model.drop_path), network(0.0)
    if initial is not None:
        copy_weights(initial, student.backbone, str(config.model.init))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def build_heads(objective: Settings, width: int) -> tuple[DINOHead, DINOHead | None]:
    """The head of class tokens (D = `width`) and, where patches do not share it, theirs."""
    head = DINOHead(
        width,
        objective.prototypes,
        objective.head_layers,
        objective.head_hidden,
        objective.head_bottleneck,
        objective.norm_last_layer,
    )
    if not objective.ibot_weight or objective.ibot_head == "shared":
        return head, None
    patch_head = DINOHead(
        width,
        objective.ibot_prototypes or objective.prototypes,
        objective.head_layers,
        objective.ibot_head_hidden or objective.head_hidden,
        objective.ibot_head_bottleneck or objective.head_bottleneck,
        objective.norm_last_layer,
    )
    return head, patch_head


def build_centering(objective: Settings, prototypes: int) -> Center | SinkhornKnopp:
    """What turns a head's logits into targets; its state (the center) is part of a checkpoint."""
    if objective.centering == "sinkhorn":
        return SinkhornKnopp(objective.sinkhorn_iterations)
    return Center(prototypes, objective.center_momentum)


def mask_draw(config: Config) -> MaskDraw | None:
    """Masks as the config describes them; None without a masked-patch loss."""
    objective, train = config.objective, config.train
    if not objective.ibot_weight:
        return None
    low, high = objective.mask_ratio
    return MaskDraw(train.seed, train.batch_size, objective.mask_fraction, (low, high))


def _joined(outputs: list[Tensor]) -> Tensor:
    """(2·b, D) of each micro-batch to (2, B, D) fp32 of all."""
    return torch.cat([rearrange(output, "(g b) d -> g b d", g=2) for output in outputs], dim=1).float()
