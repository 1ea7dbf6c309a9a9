"""What can be set of DINO and DINOv2, and what `auto` becomes there."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dino.config.auto import PoolFacts, Rule
from dino.config.schema import AUTO, Auto, Config, setting
from dino.methods.losses import TERMS
from dino.models import BACKBONES


@dataclass
class Settings:
    """Of DINO and DINOv2."""

    name: str = setting("dino", "method of learning; the other settings of this group are its own")
    distill: str | None = setting(
        None,
        "frozen teacher to learn from: a released name, a run or a full checkpoint; none: the student's own average",
    )
    ibot_weight: float = setting(
        0.0, "weight of the masked-patch loss; 0: none (DINO), 1 (DINOv2)", low=0, below=math.inf
    )
    koleo_weight: float = setting(
        0.0, "weight of KoLeo, which spreads features out; 0: none (DINO), 0.1 (DINOv2)", low=0, below=math.inf
    )
    koleo_scope: str = setting(
        "process", "where KoLeo looks for neighbours: in a process's own micro-batch, or in all", ("process", "all")
    )
    terms: dict[str, float] = setting(
        {}, "further loss terms with their weights, for example {gram: 0.1}: names of dino.methods.losses.TERMS", low=0
    )
    mask_fraction: float = setting(
        0.5, "fraction of the global crops that are masked", above=0, high=1, was="objective.mask_share"
    )
    mask_ratio: list[float] = setting(
        [0.1, 0.5], "least and greatest fraction of a masked crop's patches", low=0, high=1
    )
    prototypes: Auto[int] = setting(AUTO, "outputs of the DINO head, K; auto: by number of images", low=1)
    head_layers: int = setting(3, "layers of the head's MLP", low=1)
    head_hidden: int = setting(2048, "width of the head's MLP", low=1)
    head_bottleneck: int = setting(256, "width of the head's L2-normalised bottleneck", low=1)
    ibot_head: str = setting("shared", "head of the patches: the DINO head or one of their own", ("shared", "separate"))
    ibot_prototypes: int | None = setting(None, "outputs of a separate patch head; none: as the DINO head", low=1)
    ibot_head_hidden: int | None = setting(None, "width of a separate patch head's MLP; none: as the DINO head", low=1)
    ibot_head_bottleneck: int | None = setting(
        None, "width of a separate patch head's bottleneck; none: as the DINO head", low=1
    )
    norm_last_layer: bool = setting(True, "keep prototypes at unit length (steadier); false may gain with long runs")
    student_temperature: float = setting(0.1, "temperature of the student's softmax", above=0)
    teacher_temperature: Auto[float] = setting(
        AUTO, "temperature of the teacher's softmax after warm-up; auto: by the length of the run", above=0
    )
    teacher_temperature_start: float = setting(0.04, "temperature of the teacher's softmax at the first step", above=0)
    teacher_temperature_warmup: Auto[int] = setting(
        AUTO, "over which the teacher's temperature changes; auto: 10 % of the run", low=0, unit="steps"
    )
    centering: str = setting(
        AUTO,
        "what keeps the teacher from collapsing: center (EMA of its logits) or sinkhorn; auto: sinkhorn",
        (AUTO, "center", "sinkhorn"),
        new_names={"centre": "center"},
    )
    center_momentum: float = setting(0.9, "EMA rate of the center", low=0, high=1)
    sinkhorn_iterations: int = setting(3, "Sinkhorn-Knopp iterations", low=1)
    teacher_momentum: Auto[float] = setting(
        AUTO,
        "EMA rate of the teacher at the first step; auto: by images, batch and length of the run",
        low=0,
        high=1,
        was="objective.momentum",
    )
    teacher_momentum_end: Auto[float] = setting(
        AUTO,
        "EMA rate of the teacher at the last step; auto: constant in short runs, 1.0 in long ones",
        low=0,
        high=1,
        was="objective.momentum_end",
    )
    freeze_last_layer_steps: Auto[int] = setting(
        AUTO,
        "during which the prototypes stand still; auto: 1 epoch",
        low=0,
        unit="steps",
        was="optim.freeze_last_layer_steps",
    )


def problems(config: Config) -> Iterator[str]:
    """What cannot work in these settings together."""
    objective = config.objective
    for key in ("ibot_prototypes", "ibot_head_hidden", "ibot_head_bottleneck"):
        if getattr(objective, key) is not None and objective.ibot_head != "separate":
            yield f"objective.{key} is of a head of its own: it needs objective.ibot_head=separate"
    for name in objective.terms:
        if name not in TERMS:
            known = ", ".join(TERMS) or "none yet"
            yield f"objective.terms: there is no term '{name}' (there are: {known}); docs/extending.md adds one"
    ratio = objective.mask_ratio
    if len(ratio) != 2 or ratio[0] > ratio[1]:
        yield f"objective.mask_ratio must be two fractions of the patches, 0 <= least <= greatest <= 1, got {ratio}"
    arch = config.model.arch
    if objective.ibot_weight and arch in BACKBONES and not BACKBONES[arch].has_patches:
        yield f"objective.ibot_weight needs patches, which model.arch={arch} has not: use a ViT, or 0"


def _prototypes(config: Config, pool: PoolFacts) -> tuple[int, str]:
    # Through what was best for 1,797 digits and 19,280 drawings (1,024 and 4,096) and is published for ImageNet.
    nearest = 2 ** round(math.log2(8 * pool.images**0.64))
    return min(65536, max(256, nearest)), f"8 · {pool.images:,} images^0.64 (65,536 for ImageNet), power of two"


def _centering(config: Config, pool: PoolFacts) -> tuple[str, str]:
    return "sinkhorn", "as DINOv2; EMA centering learns less on small sets"


def _length(config: Config) -> float:
    """How far this run is from a short one to a long one: 0 up to 10,000 steps, 1 from 100,000, even in between."""
    return min(1.0, max(0.0, math.log10(config.train.steps / 10_000)))


def _teacher_temperature(config: Config, pool: PoolFacts) -> tuple[float, str]:
    temperature = round(0.04 + 0.03 * _length(config), 4)
    return temperature, f"{config.train.steps:,} steps: from 0.04 for up to 10,000 to 0.07 for over 100,000"


def _temperature_warmup(config: Config, pool: PoolFacts) -> tuple[int, str]:
    return config.train.steps // 10, "10 % of the run (DINO: 30 of 300 epochs)"


def _teacher_momentum(config: Config, pool: PoolFacts) -> tuple[float, str]:
    """The teacher remembers 1 / (1 - momentum) steps."""
    by_length = min(250.0, 3 * math.sqrt(config.train.steps))
    by_images = min(2000.0, pool.images / (5 * config.train.batch_size))
    memory = max(10.0, by_length, by_images)
    return round(1 - 1 / memory, 6), f"memory of {memory:.0f} steps: 3 · √steps up to 250, or a fifth of an epoch"


def _teacher_momentum_end(config: Config, pool: PoolFacts) -> tuple[float, str]:
    start = config.objective.teacher_momentum
    end = round(start + (1 - start) * _length(config), 6)
    return (
        end,
        f"{config.train.steps:,} steps: constant up to 10,000, to 1 for over 100,000 (a still teacher stops learning)",
    )


def _freeze_last_layer(config: Config, pool: PoolFacts) -> tuple[int, str]:
    epoch = pool.images // config.train.batch_size
    return min(epoch, config.train.steps // 10), "1 epoch, at most 10 % of the run"


AUTO_RULES: dict[str, Rule] = {
    "objective.prototypes": _prototypes,
    "objective.centering": _centering,
    "objective.teacher_temperature": _teacher_temperature,
    "objective.teacher_temperature_warmup": _temperature_warmup,
    "objective.teacher_momentum": _teacher_momentum,
    "objective.teacher_momentum_end": _teacher_momentum_end,
    "objective.freeze_last_layer_steps": _freeze_last_layer,
}
REMEDIES = {  # published, for what the verdict may find; it leaves out what is so already
    "uniform": "a lower objective.teacher_temperature (0.02), objective.centering=sinkhorn, half of optim.lr with a "
    "longer optim.warmup_steps, on small sets fewer objective.prototypes, objective.teacher_momentum=0.99",
    "peaked": "objective.centering=sinkhorn, a faster center (objective.center_momentum=0.9), a higher "
    "objective.teacher_temperature (0.07)",
    "worse": "a lower optim.lr, a higher objective.teacher_momentum, milder views",
}
FEWEST_PROTOTYPES = 8


def doubts(config: Config) -> Iterator[str]:
    """What keeps runs from learning, each seen in benchmarks/verdicts.py (docs/health.md)."""
    objective = config.objective
    if objective.teacher_temperature >= objective.student_temperature:
        yield (
            f"objective.teacher_temperature={objective.teacher_temperature:g} is not below "
            f"objective.student_temperature={objective.student_temperature:g}: targets must be the sharper ones"
        )
    if objective.centering == "center" and objective.center_momentum == 1:
        yield "with objective.center_momentum=1 the center never moves: all images may come to have one target"
    if objective.teacher_momentum < 0.5 and objective.distill is None:
        yield f"with objective.teacher_momentum={objective.teacher_momentum:g} the teacher averages over no steps"
    if objective.prototypes < FEWEST_PROTOTYPES:
        yield f"objective.prototypes={objective.prototypes} tell no more kinds of images apart"
