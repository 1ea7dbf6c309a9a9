"""Every setting of a pre-training run: type, default, bounds and meaning, in one place.

A leaf is addressed as `group.key`, e.g. `train.batch_size`. The group `objective` is that of the method that
`objective.name` chooses: a dataclass in the method's own file.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dino.config.setting import AUTO, CHOICES, Auto, setting
from dino.config.views import ViewsConfig


@dataclass
class DataConfig:
    root: str = setting("", "folder, archive, list, shards, manifest.parquet …; several as [a, b]: see docs/data.md")
    kind: str = setting(
        AUTO, "how data.root is read; auto: by what it is; omniglot_train: without the drawings kept for testing"
    )
    channels: Auto[int] = setting(AUTO, "channels of an image; auto: 1 for omniglot and digits, else 3", low=1)
    bits: str = setting(
        "8",
        "grey levels that are kept: 8 (others are scaled to these), 16, or float: numbers as files have them (TIFF, "
        ".npy, DICOM), which data.range makes levels",
        ("8", "16", "float"),
    )
    range: list[float] | None = setting(
        None,
        "numbers that become black and white, beyond which is cut off; none: 0 and 65535, of float measured once",
    )
    labels: str | None = setting(
        None,
        "where an image's class stands, for online k-NN: folders, folders:1 (from the top), folders:-1 (its own), a "
        "column's name, or a table: labels.csv, labels.csv:column; none: where the source finds it",
    )
    order: str = setting(
        "random", "random, or shards: one after the other, mixed within data.window images", ("random", "shards")
    )
    window: int = setting(2048, "data.order=shards: images that are mixed with each other", low=1)
    cache: str = setting(
        AUTO,
        "device: decode all images once and keep them on the device as uint8; none: decode them as they are needed; "
        "auto: device for small sets",
        (AUTO, "device", "none"),
    )
    workers: Auto[int] = setting(
        AUTO, "worker processes of each training process that decode and crop; auto: by CPU cores", low=0
    )
    rebalance_every: Auto[int] = setting(
        0,
        "steps between two updates of the sampling weights by clusters of the teacher's features; 0: never; "
        "auto: 1 epoch",
        low=0,
        unit="steps",
    )
    verify: str = setting(
        "size",
        "besides names, what images of a run that goes on are compared by: size, or content, for which all are read",
        ("size", "content"),
    )
    max_unreadable: float = setting(
        0.01, "fraction of the images that may be unreadable before the run fails", low=0, high=1
    )
    max_pixels: int = setting(64_000_000, "images of more pixels are not decoded", low=1)
    max_bytes: int = setting(256 * 2**20, "image files of more bytes are not read, packed or not", low=1)


@dataclass
class ModelConfig:
    init: str | None = setting(
        None, "weights to start from: a released name, a run or a file; they decide the architecture; none: random"
    )
    arch: str = setting("vit_small", "backbone")
    patch_size: int = setting(16, "side of a ViT's patch", low=1, unit="pixels")
    embed_dim: int | None = setting(None, "width of a ViT; none: the arch's own", low=1)
    depth: int | None = setting(None, "blocks of a ViT; none: the arch's own", low=1)
    num_heads: int | None = setting(None, "attention heads of a ViT; none: the arch's own", low=1)
    ffn: str = setting(AUTO, "feed-forward layer; auto: swiglu for giant2, else mlp", (AUTO, "mlp", "swiglu"))
    layer_scale: float = setting(0.0, "initial LayerScale; 0: none (DINO), 1e-5 (DINOv2)")
    registers: int = setting(0, "register tokens", low=0)
    drop_path: float = setting(0.1, "rate of the student's stochastic depth", low=0, below=1)
    drop_path_kind: str = setting(
        "sample",
        "sample: each by itself, from 0 at the first block to the rate at the last (DINO); subset: of a fixed fraction "
        "of the batch, which is then not computed, at every block (DINOv2)",
        ("sample", "subset"),
    )
    weight_init: str = setting(
        "published",
        "how random weights are drawn: published (std 0.02: DINO), dinov2 (the same, tokens near 0), or fan_in, for "
        "narrow networks",
        ("published", "dinov2", "fan_in"),
        was="model.initialisation",
    )
    positions: str = setting(
        "learned",
        "how a ViT knows where a patch lies: by a learned table, or by rotating queries and keys (RoPE)",
        ("learned", "rotary"),
    )
    stem: str = setting(
        "patch",
        "how a ViT makes tokens of pixels: each patch by itself, or by small convolutions before (conv), which learn "
        "faster in short runs",
        ("patch", "conv"),
    )
    position_size: int | None = setting(
        None, "side of the images whose grid of patches has positions; none: views.global_size", unit="pixels"
    )
    position_interpolation: str = setting(
        "size", "how positions are resampled: size (register releases) or offset (plain releases)", ("size", "offset")
    )


@dataclass
class OptimConfig:
    name: str = setting(
        "adamw",
        "optimizer; sgd (momentum 0.9) for DINO's ResNet-50; muon: for the matrices of transformer blocks Muon, at "
        "AdamW's rate and decay, else AdamW: learns faster in short runs; lars: for batches of thousands (SimCLR)",
        ("adamw", "sgd", "muon", "lars"),
    )
    lr: Auto[float] = setting(AUTO, "peak learning rate; auto: by batch size", above=0)
    lr_end: float = setting(1e-6, "learning rate of the last step")
    warmup_steps: Auto[int] = setting(
        AUTO, "linear warm-up of the learning rate; auto: 10 epochs, at most 10 % of the run", low=0, unit="steps"
    )
    weight_decay: float = setting(0.04, "weight decay of the first step")
    weight_decay_end: float = setting(0.4, "weight decay of the last step (cosine)")
    betas: list[float] = setting([0.9, 0.999], "AdamW's two EMA rates", low=0, below=1)
    layer_decay: float = setting(
        1.0,
        "factor of the learning rate from each block to the one before; 0.9 (DINOv2)",
        low=0,
        below=float("inf"),
    )
    patch_embed_lr: float = setting(
        1.0, "factor of the patch embedding's learning rate; 0.2 (DINOv2)", low=0, below=float("inf")
    )
    decay_tokens: bool = setting(True, "decay class token, registers and positions too, as published")
    clip_grad: float = setting(3.0, "largest gradient norm; 0: no clipping", low=0)
    clip_scope: str = setting(
        "global",
        "norm of all gradients together, of each parameter (as DINO does), or of backbone and heads (as DINOv2 does)",
        ("global", "parameter", "module"),
    )
    freeze_backbone_steps: Auto[int] = setting(
        AUTO,
        "during which only heads learn; auto: 10 % of the run, at most 1000, with model.init; else 0",
        low=0,
        unit="steps",
    )


@dataclass
class Phase:
    """Part of a run with crops of its own sizes."""

    begin: float = setting(1.0, "fraction of the run's steps that are before it")
    global_size: int = setting(224, "side of a global crop", unit="pixels")
    local_size: int = setting(96, "side of a local crop", unit="pixels")


@dataclass
class TrainConfig:
    batch_size: int = setting(256, "images per optimizer step over all processes and micro-batches", low=1)
    accumulation: int = setting(1, "micro-batches per optimizer step", low=1)
    epochs: float = setting(100.0, "passes over the images, where train.steps is auto", above=0, below=float("inf"))
    steps: Auto[int] = setting(AUTO, "optimizer steps; auto: from train.epochs", low=1)
    phases: list[Phase] = setting(
        [],
        "crops of other sizes from some point on, for example [{begin: 0.9, global_size: 448, local_size: 192}]; "
        "positions are interpolated, schedules go on",
    )
    precision: str = setting(
        AUTO,
        "auto: the launcher's, else bf16 on CUDA and fp32 on CPU; fastest: bf16 where the device has units for it, on "
        "CPUs too, else fp32",
        (AUTO, "fastest", "fp32", "bf16", "fp16"),
    )
    seed: int = setting(0, "seed of weights, order and views", low=0, below=2**63)
    checkpoint_every: Auto[int] = setting(
        AUTO, "steps between two checkpoints; auto: 10 a run, at most 1000 apart", low=1, unit="steps"
    )
    keep_checkpoints: int = setting(3, "newest checkpoints that are kept", low=1)
    keep_best: str | None = setting(
        None,
        "metric of metrics.jsonl (loss/… or health/…) at whose best value, the least of a loss, else the greatest, the "
        "backbone is kept in RUN/best; none: only the newest is kept",
    )
    resume: str = setting(AUTO, "auto: go on from the newest checkpoint; newest_whole: undamaged one; never; or a path")
    time_limit: float | None = setting(
        None, "after which the run saves a checkpoint and ends; none: no limit", unit="minutes"
    )
    fsdp: bool = setting(
        False,
        "shard parameters, gradients and moments of a large ViT over the processes, which otherwise each hold all",
        was="train.shard",
    )
    activation_checkpointing: bool = setting(
        False,
        "keep only the input of each transformer block and compute the rest again for the gradient: less memory",
        was="train.checkpoint_blocks",
    )
    compile: bool = setting(False, "compile each transformer block (needs a C++ compiler; pays on GPUs)")
    cpu_threads: Auto[int] = setting(
        AUTO, "CPU threads of a training process; auto: cores / processes on the machine", low=1
    )


@dataclass
class MonitorConfig:
    log_every: int = setting(10, "steps between two lines of metrics.jsonl", low=1, unit="steps")
    health_every: Auto[int] = setting(
        AUTO,
        "steps between two looks at the run's health; 0: never; auto: 100 a run, at most 100 steps apart",
        low=0,
        unit="steps",
    )


@dataclass
class TrackingConfig:
    backends: list[str] = setting([], "trackers besides metrics.jsonl, by Accelerate's names: wandb, tensorboard …")
    project: str = setting("dino", "project name for the trackers")
    name: str | None = setting(None, "run name for the trackers; none: the run directory's")
    artifacts: bool = setting(True, "send the backbone, or a curation's manifest, to W&B when it is done")


@dataclass
class RunConfig:
    dir: str = setting("runs/pretrain", "directory of the run: config, metrics, checkpoints, backbone, report")


def method_settings(name: str = "dino") -> Any:
    """Default settings of a method; KeyError where no method has that name."""
    return CHOICES["objective.name"][name].Settings()


@dataclass
class Config:
    """The whole tree."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: Any = dataclasses.field(default_factory=method_settings)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
