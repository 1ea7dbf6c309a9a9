"""Every setting of a pre-training run: type, default and meaning, in one place.

Values that depend on the data set or the batch may be `auto`; `dino.config.auto` resolves them once and says why.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
KINDS = (AUTO, "folder", "zip", "omniglot", "omniglot_train", "digits", "manifest")


def setting(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its meaning (for `--help`) and, for names, the values it may take."""
    metadata = {"meaning": meaning, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    root: str = setting("", "folder of images (searched recursively), a .zip of one, or a manifest.parquet of curation")
    kind: str = setting(
        AUTO, "how root is read; auto: by what it is; omniglot_train: without the drawings kept for testing", KINDS
    )
    channels: int | str = setting(AUTO, "channels of an image; auto: 1 for omniglot and digits, else 3")
    cache: str = setting(
        AUTO,
        "device: decode all images once and keep them on the device as uint8; none: decode them as they are needed; "
        "auto: device for small sets",
        (AUTO, "device", "none"),
    )
    workers: int | str = setting(AUTO, "processes per training process that decode and crop; auto: by CPU cores")
    rebalance_every: int | str = setting(
        0,
        "steps between two rebalancings of the draws by clusters of the teacher's features; 0: never; auto: 1 epoch",
    )
    max_unreadable: float = setting(0.01, "share of images that may be unreadable before the run fails")


@dataclass
class ViewsConfig:
    preset: str = setting(
        "dino", "augmentation as published for DINO or DINOv2, or for handwriting", ("dino", "dinov2", "line_art")
    )
    backend: str = setting(
        "device",
        "who changes the colours and strokes of crops: the device, whole batches at once, or the worker processes",
        ("device", "workers"),
    )
    global_size: int = setting(224, "side of a global crop in pixels")
    global_scale: list[float] = setting([0.4, 1.0], "least and greatest share of the image's area in a global crop")
    local_size: int = setting(96, "side of a local crop in pixels")
    local_scale: list[float] = setting([0.05, 0.4], "least and greatest share of the image's area in a local crop")
    local_crops: int = setting(8, "local crops per image; 0: global crops only")
    inverted_blur: bool = setting(
        False, "blur with the probabilities DINOv2's released weights were in effect trained with (0, 0.9, 0.5)"
    )
    affine: float | None = setting(
        None, "strength of small rotations, shears, shifts and changes of size; none: 1 for line_art, else 0"
    )
    stroke: float | None = setting(
        None, "greatest change of stroke width in pixels at each side; none: 0.5 for line_art, else 0"
    )
    mean: list[float] | None = setting(None, "channel means to subtract; none: ImageNet's for 3 channels, else 0.5")
    std: list[float] | None = setting(None, "channel deviations to divide by; none: ImageNet's for 3, else 0.5")


@dataclass
class ModelConfig:
    init: str | None = setting(
        None, "weights to start from: a released name, a run or a file; they decide the architecture; none: random"
    )
    arch: str = setting(
        "vit_small",
        "backbone",
        ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2", "resnet18", "resnet50"),
    )
    patch_size: int = setting(16, "side of a ViT patch in pixels")
    embed_dim: int | None = setting(None, "width of a ViT; none: the arch's own")
    depth: int | None = setting(None, "blocks of a ViT; none: the arch's own")
    num_heads: int | None = setting(None, "attention heads of a ViT; none: the arch's own")
    ffn: str = setting(AUTO, "feed-forward layer; auto: swiglu for giant2, else mlp", (AUTO, "mlp", "swiglu"))
    layer_scale: float = setting(0.0, "initial LayerScale; 0: none (DINO), 1e-5 (DINOv2)")
    registers: int = setting(0, "register tokens")
    drop_path: float = setting(0.1, "rate of the student's stochastic depth")
    drop_path_kind: str = setting(
        "sample",
        "sample: each by itself, from 0 at the first block to the rate at the last (DINO); subset: of a fixed share of "
        "the batch, which is then not computed, at every block (DINOv2)",
        ("sample", "subset"),
    )
    initialisation: str = setting(
        "published", "of random weights: published (std 0.02) or fan_in, for narrow networks", ("published", "fan_in")
    )
    position_size: int | None = setting(
        None, "side in pixels of the images whose grid of patches has positions; none: views.global_size"
    )
    position_interpolation: str = setting(
        "size", "how positions are resampled: size (register releases) or offset (plain releases)", ("size", "offset")
    )


@dataclass
class ObjectiveConfig:
    distill: str | None = setting(
        None,
        "frozen teacher to learn from: a released name, a run or a full checkpoint; none: the student's own average",
    )
    ibot_weight: float = setting(0.0, "weight of the masked-patch loss; 0: none (DINO), 1 (DINOv2)")
    koleo_weight: float = setting(0.0, "weight of KoLeo, which spreads features out; 0: none (DINO), 0.1 (DINOv2)")
    koleo_scope: str = setting(
        "process", "where KoLeo looks for neighbours: in a process's own micro-batch, or in all", ("process", "all")
    )
    mask_share: float = setting(0.5, "share of the global crops that are masked")
    mask_ratio: list[float] = setting([0.1, 0.5], "least and greatest share of a masked crop's patches")
    prototypes: int | str = setting(AUTO, "outputs of the DINO head, K; auto: by number of images")
    head_layers: int = setting(3, "layers of the head's MLP")
    head_hidden: int = setting(2048, "width of the head's MLP")
    head_bottleneck: int = setting(256, "width of the head's L2-normalised bottleneck")
    ibot_head: str = setting("shared", "head of the patches: the DINO head or one of their own", ("shared", "separate"))
    ibot_prototypes: int | None = setting(None, "outputs of a separate patch head; none: as the DINO head")
    ibot_head_hidden: int | None = setting(None, "width of its MLP; none: as the DINO head")
    ibot_head_bottleneck: int | None = setting(None, "width of its bottleneck; none: as the DINO head")
    norm_last_layer: bool = setting(True, "keep prototypes at unit length (steadier); false may gain with long runs")
    student_temperature: float = setting(0.1, "temperature of the student's softmax")
    teacher_temperature: float | str = setting(AUTO, "the teacher's, after warm-up; auto: by number of images")
    teacher_temperature_start: float = setting(0.04, "the teacher's at the first step")
    teacher_temperature_warmup: int | str = setting(AUTO, "steps from start to final; auto: 10 % of the run")
    centering: str = setting(
        AUTO,
        "what keeps the teacher from collapsing: centre (EMA of its logits) or sinkhorn; auto: by number of images",
        (AUTO, "centre", "sinkhorn"),
    )
    center_momentum: float = setting(0.9, "EMA rate of the centre")
    sinkhorn_iterations: int = setting(3, "Sinkhorn-Knopp iterations")
    momentum: float | str = setting(AUTO, "EMA rate of the teacher at the first step; auto: by images and batch")
    momentum_end: float | str = setting(AUTO, "and at the last; auto: 1.0, or constant on a small data set")


@dataclass
class OptimConfig:
    name: str = setting("adamw", "optimizer; sgd (momentum 0.9) for DINO's ResNet-50", ("adamw", "sgd"))
    lr: float | str = setting(AUTO, "peak learning rate; auto: by batch size")
    lr_end: float = setting(1e-6, "learning rate of the last step")
    warmup_steps: int | str = setting(AUTO, "steps of linear warm-up; auto: 10 epochs, at most 10 % of the run")
    weight_decay: float = setting(0.04, "weight decay of the first step")
    weight_decay_end: float = setting(0.4, "weight decay of the last step (cosine)")
    betas: list[float] = setting([0.9, 0.999], "AdamW's two EMA rates")
    layer_decay: float = setting(1.0, "factor of the learning rate from each block to the one before; 0.9 (DINOv2)")
    patch_embed_lr: float = setting(1.0, "further factor of the patch embedding's; 0.2 (DINOv2)")
    decay_tokens: bool = setting(True, "decay class token, registers and positions too, as published")
    clip_grad: float = setting(3.0, "largest gradient norm; 0: no clipping")
    clip_scope: str = setting(
        "global",
        "norm of all gradients together, of each parameter (as DINO does), or of backbone and heads (as DINOv2 does)",
        ("global", "parameter", "module"),
    )
    freeze_backbone_steps: int | str = setting(
        AUTO, "steps during which only heads learn; auto: 10 % of the run, at most 1000, with model.init; else 0"
    )
    freeze_last_layer_steps: int | str = setting(AUTO, "steps during which the prototypes stand still; auto: 1 epoch")


@dataclass
class Phase:
    """Part of a run with crops of its own sizes."""

    begin: float = setting(1.0, "share of the run's steps that are before it")
    global_size: int = setting(224, "side of a global crop in pixels")
    local_size: int = setting(96, "side of a local crop in pixels")


@dataclass
class TrainConfig:
    batch_size: int = setting(256, "images per optimizer step over all processes and micro-batches")
    accumulation: int = setting(1, "micro-batches per optimizer step")
    epochs: float = setting(100.0, "passes over the images, when steps is auto")
    steps: int | str = setting(AUTO, "optimizer steps; auto: from epochs")
    phases: list[Phase] = setting(
        [],
        "crops of other sizes from some point on, for example [{begin: 0.9, global_size: 448, local_size: 192}]; "
        "positions are interpolated, schedules go on",
    )
    precision: str = setting(
        AUTO, "auto: the launcher's, else bf16 on CUDA and fp32 on CPU", (AUTO, "fp32", "bf16", "fp16")
    )
    seed: int = setting(0, "seed of weights, order and views")
    checkpoint_every: int | str = setting(AUTO, "steps between checkpoints; auto: 10 a run, at most 1000 apart")
    keep_checkpoints: int = setting(3, "newest checkpoints that are kept")
    resume: str = setting(AUTO, "auto: go on from the newest checkpoint; never; or the path of a checkpoint")
    time_limit: float | None = setting(None, "minutes after which the run checkpoints and ends; none: no limit")
    shard: bool = setting(
        False, "share parameters, gradients and moments of a large ViT among processes, which otherwise each hold all"
    )
    checkpoint_blocks: bool = setting(
        False, "keep only the input of each transformer block and compute the rest again for the gradient: less memory"
    )
    compile: bool = setting(False, "compile each transformer block (needs a C++ compiler; pays on GPUs)")
    cpu_threads: int | str = setting(AUTO, "CPU threads of a training process; auto: cores / local processes")


@dataclass
class MonitorConfig:
    log_every: int = setting(10, "steps between two logged lines")
    health_every: int | str = setting(
        AUTO, "steps between two looks at the run's health; 0: never; auto: 100 a run, at most 100 steps apart"
    )


@dataclass
class TrackingConfig:
    backends: list[str] = setting([], "trackers besides metrics.jsonl, by Accelerate's names: wandb, tensorboard …")
    project: str = setting("dino", "project name for the trackers")
    name: str | None = setting(None, "run name for the trackers; none: the run directory's")


@dataclass
class RunConfig:
    dir: str = setting("runs/pretrain", "directory of the run: config, metrics, checkpoints, backbone, report")


@dataclass
class Config:
    """The whole tree. A leaf is addressed as `group.key`, e.g. `train.batch_size`."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
