"""What benchmarks of training share: our step as a run builds it, and the official one with the same weights."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import kit
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from dino.config.auto import PoolFacts, resolve
from dino.config.schema import Config
from dino.distributed import forget_earlier_runs
from dino.methods import METHODS
from dino.training import launch
from dino.training.normalise import Normalise
from dino.training.optimizer import build_optimizer
from dino.training.schedules import optimizer_schedules
from dino.training.settings import load
from dino.training.step import Step

PRESETS = {
    "dino": ["objective.centering=center", "optim.clip_scope=parameter"],
    "dinov2": [
        *("objective.ibot_weight=1", "objective.koleo_weight=0.1", "objective.centering=sinkhorn"),
        "objective.norm_last_layer=false",
        *("model.registers=4", "model.layer_scale=0.00001", "model.drop_path=0.3", "model.drop_path_kind=subset"),
        *("optim.layer_decay=0.9", "optim.patch_embed_lr=0.2", "optim.clip_scope=module"),
    ],
}
COMMON = (
    *("views.global_size=224", "views.local_size=96", "views.local_crops=8", "model.patch_size=16"),
    *("model.position_interpolation=offset", "objective.freeze_last_layer_steps=0", "optim.clip_grad=3"),
    *("objective.teacher_temperature=0.04", "objective.teacher_temperature_start=0.04", "train.steps=100"),
)


class Built(NamedTuple):
    """Our step, and a batch for it."""

    config: Config
    step: Step
    optimizer: torch.optim.Optimizer
    views: list[Tensor]


def parser(description: str) -> argparse.ArgumentParser:
    parser = kit.parser(description, rounds=5)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2, help="images; each has 2 crops of 224 and 8 of 96 pixels")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--preset", choices=PRESETS, default="dino")
    parser.add_argument("settings", nargs="*", help="more of the trainer's settings, as train.compile=true")
    return parser


def build(arguments: argparse.Namespace, precision: str, device: torch.device, *more: str) -> Built:
    """What a run builds, without one."""
    texts = [*COMMON, *PRESETS[arguments.preset], f"model.arch={arguments.arch}"]
    texts += [f"objective.prototypes={arguments.prototypes}", f"train.batch_size={arguments.batch}"]
    config = load(None, [*texts, *arguments.settings, *more])
    config = resolve(config, PoolFacts(images=10**6, channels=3, kind="folder"))[0]
    forget_earlier_runs()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    torch.manual_seed(0)
    method: Any = METHODS[config.objective.name](config)
    launch.place(accelerator, method, config.train)
    optimizer = build_optimizer(method.student, config.optim)
    method.prepare(None, device)
    prepared = launch.prepare(accelerator, method, optimizer)
    normalise = Normalise(config.views.mean or (), config.views.std or ()).to(device)
    step = Step(accelerator, config, method, prepared, normalise, optimizer_schedules(config))
    shapes = [(2 * arguments.batch, 3, 224, 224), (8 * arguments.batch, 3, 96, 96)]
    views = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in shapes]
    return Built(config, step, optimizer, views)


class Official:
    """main_dino.py's step, from `train_one_epoch`, with our weights."""

    def __init__(self, arguments: argparse.Namespace, built: Built, precision: str):
        self.utils = kit.official(arguments.official, "utils")
        networks, method = kit.official(arguments.official, "vision_transformer"), built.step.method
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        made = []
        for ours, rate in ((method.student, built.config.model.drop_path), (method.teacher, 0.0)):
            backbone = networks.__dict__[arguments.arch](patch_size=16, drop_path_rate=rate)
            head = networks.DINOHead(backbone.embed_dim, arguments.prototypes)
            made.append(self.utils.MultiCropWrapper(backbone, head).to(built.views[0].device))
            made[-1].load_state_dict(ours.state_dict())
        self.student, self.teacher = made
        self.teacher.requires_grad_(False)
        loss = kit.official(arguments.official, "main_dino").DINOLoss
        self.criterion = loss(arguments.prototypes, 10, 0.04, 0.04, 0, 100).to(built.views[0].device)
        self.optimizer = torch.optim.AdamW(self.utils.get_params_groups(self.student), lr=1e-6)
        device, half = built.views[0].device.type, precision == "bf16"
        self.autocast: Any = lambda: torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
        self.crops = []
        for crops in built.step._batches([built.views])[0].crops:
            self.crops += crops.split(arguments.batch)

    def check(self, built: Built, tolerance: float) -> None:
        """The same logits and the same loss, without stochastic depth."""
        method, networks = built.step.method, (self.student, self.teacher, built.step.method.student)
        for network in networks:
            network.eval()
        with torch.no_grad():
            (batch,) = built.step._batches([built.views])
            with method.autocast():
                logits = method.forward(batch.crops).logits
            ours = method.losses(batch, method.targets([batch], 0)[0])["loss/dino"]
            self.targets()
            self.forward()
            self.loss()
        kit.same(logits.float(), self.of_student.float(), 20 * tolerance, "logits")
        kit.same(ours, self.total, tolerance, "loss")
        for network in networks:
            network.train()

    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "teacher": self.targets,
            "student": self.forward,
            "loss": self.loss,
            "backward": lambda: self.total.backward(),
            "clip": lambda: self.utils.clip_gradients(self.student, 3.0),
            "optimizer": self.update,
            "average": self.average,
        }

    def step(self) -> None:
        for part in self.parts().values():
            part()

    def targets(self) -> None:
        with torch.no_grad(), self.autocast():
            self.of_teacher = self.teacher(self.crops[:2])

    def forward(self) -> None:
        with self.autocast():
            self.of_student = self.student(self.crops)

    def loss(self) -> None:
        with self.autocast():
            self.total = self.criterion(self.of_student, self.of_teacher, 0)
        self.total.item()  # as it is looked at in every step

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def average(self) -> None:
        for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            teacher.data.mul_(0.996).add_((1 - 0.996) * student.detach().data)
