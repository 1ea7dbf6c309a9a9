"""A step of DINOv2 (DINO, iBOT, KoLeo, layer-wise rates) against the papers' equations, one crop at a time.

In double precision, as in test_step.py; the reference takes from the project the first weights and which patches are
hidden, and nothing else.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from dino.training.targets import Targets
from test_step import Trainer, assert_same, build, packed, views_of_batch, weights
from torch import Tensor, nn

from dino.config.schema import Config
from dino.data.sampler import EpochStream, MicroBatches
from dino.methods.ema import update_teacher
from dino.methods.losses import Centre, dino_loss
from dino.methods.network import Network, Normalise, build_networks
from dino.training.optimizer import build_optimizer, clip_gradients, set_rates
from dino.training.schedules import schedules
from dino.training.step import Step

DINOV2 = {
    "objective.ibot_weight": 0.8,
    "objective.koleo_weight": 0.3,
    "optim.layer_decay": 0.8,
    "optim.patch_embed_lr": 0.2,
    "train.batch_size": 4,
}
SEPARATE = {
    "objective.ibot_head": "separate",
    "objective.ibot_prototypes": 20,
    "objective.ibot_head_hidden": 16,
    "objective.ibot_head_bottleneck": 6,
}
SINKHORN = {"objective.centering": "sinkhorn"}
BY_MODULE = {"optim.clip_scope": "module", "optim.clip_grad": 0.05}
ARCHITECTURE = {"model.registers": 4, "model.layer_scale": 0.1, "model.ffn": "swiglu"}

OPTIONS = {
    "shared head": {},
    "shared head, Sinkhorn": SINKHORN,
    "separate heads": SEPARATE,
    "separate heads, Sinkhorn": SEPARATE | SINKHORN,
    "separate heads of equal size": {"objective.ibot_head": "separate"},
    "registers": {"model.registers": 4},
    "LayerScale": {"model.layer_scale": 0.1},
    "SwiGLU": {"model.ffn": "swiglu"},
    "no local crops": {"views.local_crops": 0},
    "local crops of the global size": {"views.local_size": 16},
    "all crops masked": {"objective.mask_fraction": 1.0, "objective.mask_ratio": "[0.0,1.0]"},
    "one masked crop": {"objective.mask_fraction": 0.1},
    "one patch a crop": {  # those masked are then all alike, which KoLeo's definition has no number for
        "objective.koleo_weight": 0,
        "views.global_size": 8,
        "views.local_crops": 0,
        "model.patch_size": 8,
    },
    "no KoLeo": {"objective.koleo_weight": 0},
    "KoLeo without masks": {"objective.ibot_weight": 0},
    "tight clipping": {"optim.clip_grad": 0.05},
    "clipping by module": BY_MODULE,
    "clipping by module, separate heads": SEPARATE | BY_MODULE,
    "learned prototype lengths": SEPARATE | {"objective.norm_last_layer": False},
    "prototypes that stand still at first": SEPARATE | {"objective.freeze_last_layer_steps": 2},
    "backbone that stands still at first": {"optim.freeze_backbone_steps": 1},
    "backbone that stands still at first, clipping by module": BY_MODULE | {"optim.freeze_backbone_steps": 1},
    "two micro-batches": {"train.accumulation": 2},
    "everything": SEPARATE | SINKHORN | BY_MODULE | ARCHITECTURE | {"train.accumulation": 2},
}


class Reference:
    """Oquab et al. 2023, §4, with its published surroundings; torch's own AdamW and clipping.

    Networks are dictionaries of weights, by the project's names.
    """

    def __init__(self, config: Config, student: Network, teacher: Network):
        self.config = config
        self.student = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in named(student)}
        self.teacher = {name: p.detach().clone() for name, p in named(teacher)}
        self.trained = {name: value for name, value in self.student.items() if value.requires_grad}
        groups = [{"params": [value], "name": name} for name, value in self.trained.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1, fused=False, foreach=False)
        self.centres = {"class": 0.0, "patch": 0.0}

    def rate_factor(self, name: str) -> float:
        """γ to the power of the layers above: heads and last norm are layer L+1, block i is i+1, the input is 0."""
        optim, last = self.config.optim, self.config.model.depth + 1
        layer = last
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("backbone.") and not name.startswith("backbone.norm"):
            layer = 0
        return optim.layer_decay ** (last - layer) * (optim.patch_embed_lr if "patch_embed" in name else 1)

    def step(self, number: int, views: list[Tensor], hidden: Tensor) -> tuple[dict[str, float], float]:
        """Losses and gradient norm of one step; rates as the `tiny` config says: 1 step of warm-up, 10 in all.

        Args:
            hidden: (2, B, N) bool, which patches of the global crops are masked.
        """
        lr = 0.005 if number == 0 else cosine(0.01, 1e-6, (number - 1) / 8)
        momentum, temperature = cosine(0.9, 1.0, number / 9), 0.04 + min(number / 2, 1) * (0.07 - 0.04)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.rate_factor(group["name"])
            group["weight_decay"] = cosine(0.04, 0.4, number / 9) if group["params"][0].ndim > 1 else 0.0

        crops = [[self.pixels(image) for image in view] for view in views]
        with torch.no_grad():
            seen = [[self.vit(self.teacher, crop) for crop in view] for view in crops[:2]]
            class_scores = torch.stack([self.head(self.teacher, "head", token) for view in seen for token, _ in view])
            patches = torch.stack([patches for view in seen for _, patches in view])[hidden.flatten(0, 1)]
            patch_scores = self.head(self.teacher, self.patch_head, patches)
            class_targets = self.targets(class_scores, "class", temperature).unflatten(0, (2, -1))
            patch_targets = iter(self.targets(patch_scores, "patch", temperature)) if len(patches) else iter(())
        student = [
            [self.vit(self.student, crop, hidden[v, b] if v < 2 else None) for b, crop in enumerate(view)]
            for v, view in enumerate(crops)
        ]

        losses = {"loss/dino": self.dino(student, class_targets)}
        if self.config.objective.ibot_weight:
            losses["loss/ibot"] = self.config.objective.ibot_weight * self.ibot(student, hidden, patch_targets)
        if self.config.objective.koleo_weight:
            losses["loss/koleo"] = self.config.objective.koleo_weight * self.koleo(student)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, value in self.trained.items():
            optim = self.config.optim
            if "last_layer" in name and number < self.config.objective.freeze_last_layer_steps:
                value.grad = None
            if name.startswith("backbone.") and number < optim.freeze_backbone_steps:
                value.grad = None
        norm = torch.cat([value.grad.flatten() for value in self.trained.values() if value.grad is not None]).norm()
        scopes = ("backbone.", "head.", "patch_head.") if self.config.optim.clip_scope == "module" else ("",)
        for scope in scopes:
            part = [value for name, value in self.trained.items() if name.startswith(scope)]
            nn.utils.clip_grad_norm_(part, self.config.optim.clip_grad)
        self.optimizer.step()

        with torch.no_grad():
            for name, mine in self.teacher.items():
                mine.copy_(momentum * mine + (1 - momentum) * self.student[name])
        self.centres["class"] = 0.9 * self.centres["class"] + 0.1 * class_scores.mean(dim=0)
        if len(patches):
            self.centres["patch"] = 0.9 * self.centres["patch"] + 0.1 * patch_scores.mean(dim=0)
        return {name: loss.item() for name, loss in losses.items()}, norm.item()

    def dino(self, student: list, targets: Tensor) -> Tensor:
        """Caron et al. 2021, eq. 3; all pairs of views weigh the same."""
        terms = [
            -(targets[g, b] * F.log_softmax(self.head(self.student, "head", token) / 0.1, dim=0)).sum()
            for g in range(2)
            for v, view in enumerate(student)
            if v != g
            for b, (token, _) in enumerate(view)
        ]
        return torch.stack(terms).mean()

    def ibot(self, student: list, hidden: Tensor, targets: Tensor) -> Tensor:
        """Zhou et al. 2022, eq. 2: the mean over a crop's masked patches; over all global crops, masked or not."""
        of_crops = []
        for v, b in ((v, b) for v in range(2) for b in range(hidden.shape[1])):
            _, patches = student[v][b]
            terms = [
                -(next(targets) * F.log_softmax(self.head(self.student, self.patch_head, patch) / 0.1, dim=0)).sum()
                for patch, is_hidden in zip(patches, hidden[v, b], strict=True)
                if is_hidden
            ]
            of_crops.append(sum(terms) / max(len(terms), 1) + torch.zeros(()))
        return torch.stack(of_crops).mean()

    def koleo(self, student: list) -> Tensor:
        """Of the class tokens before the head, by view; neighbours are sought in a micro-batch."""
        parts, total = self.config.train.accumulation, 0.0
        size = len(student[0]) // parts
        for view in student[:2]:
            for first in range(0, len(view), size):
                unit = [token / token.norm() for token, _ in view[first : first + size]]
                for i, one in enumerate(unit):
                    nearest = min((one - other).norm() for j, other in enumerate(unit) if j != i)
                    total = total - nearest.log() / size
        return total / parts

    def targets(self, scores: Tensor, kind: str, temperature: float) -> Tensor:
        if self.config.objective.centering == "centre":
            return F.softmax((scores - self.centres[kind]) / temperature, dim=1)
        q = torch.exp(scores / temperature)
        for _ in range(3):
            q = q / q.sum(dim=0, keepdim=True)
            q = q / q.sum(dim=1, keepdim=True)
        return q

    def pixels(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.config.views.mean, self.config.views.std))
        return (image.double() / 255 - mean) / std

    @property
    def patch_head(self) -> str:
        return "patch_head" if self.config.objective.ibot_head == "separate" else "head"

    def head(self, of: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        """(…, D) to (…, K)."""
        last = 2 * (self.config.objective.head_layers - 1)
        for layer in range(0, last + 1, 2):
            x = F.linear(x, of[f"{name}.mlp.{layer}.weight"], of[f"{name}.mlp.{layer}.bias"])
            x = F.gelu(x) if layer < last else x / x.norm(dim=-1, keepdim=True)
        v, g = of[f"{name}.last_layer.weight_v"], of[f"{name}.last_layer.weight_g"]
        return x @ (g * v / v.norm(dim=1, keepdim=True)).T

    def vit(self, of: dict[str, Tensor], image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(C, H, W) to the class token (D,) and patches (N, D) after the last norm."""
        of = {name.removeprefix("backbone."): value for name, value in of.items()}
        model, registers = self.config.model, self.config.model.registers
        embedded = F.conv2d(image, of["patch_embed.proj.weight"], of["patch_embed.proj.bias"], stride=model.patch_size)
        patches = list(embedded.flatten(1).T)
        if hidden is not None:
            patches = [of["mask_token"][0] if hide else patch for patch, hide in zip(patches, hidden, strict=True)]
        first, positions = of["pos_embed"][0].split([1, of["pos_embed"].shape[1] - 1])
        if len(positions) != len(patches):
            table = positions.T.unflatten(1, (math.isqrt(len(positions)), -1))[None]
            table = F.interpolate(table, size=embedded.shape[1:], mode="bicubic", antialias=True)
            positions = table[0].flatten(1).T
        x = torch.cat([of["cls_token"][0] + first, *([of["register_tokens"][0]] if registers else [])])
        x = torch.cat([x, torch.stack(patches) + positions])
        for block in range(model.depth):
            x = self.block({name: of.get(f"blocks.{block}.{name}") for name in BLOCK}, x)
        x = F.layer_norm(x, x.shape[1:], of["norm.weight"], of["norm.bias"], eps=1e-6)
        return x[0], x[1 + registers :]

    def block(self, of: dict[str, Tensor], x: Tensor) -> Tensor:
        """Pre-norm attention, head by head, and feed-forward layer, (T, D) to (T, D)."""
        normed = F.layer_norm(x, x.shape[1:], of["norm1.weight"], of["norm1.bias"], eps=1e-6)
        qkv = F.linear(normed, of["attn.qkv.weight"], of["attn.qkv.bias"])
        queries, keys, values = (part.chunk(self.config.model.num_heads, dim=1) for part in qkv.chunk(3, dim=1))
        attended = torch.cat(
            [
                (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1) @ v
                for q, k, v in zip(queries, keys, values, strict=True)
            ],
            dim=1,
        )
        scale = [1.0 if of[name] is None else of[name] for name in ("ls1.gamma", "ls2.gamma")]
        x = x + scale[0] * F.linear(attended, of["attn.proj.weight"], of["attn.proj.bias"])
        normed = F.layer_norm(x, x.shape[1:], of["norm2.weight"], of["norm2.bias"], eps=1e-6)
        if self.config.model.ffn == "swiglu":
            gate, value = F.linear(normed, of["mlp.w12.weight"], of["mlp.w12.bias"]).chunk(2, dim=1)
            fed = F.linear(gate * gate.sigmoid() * value, of["mlp.w3.weight"], of["mlp.w3.bias"])
        else:
            fed = F.gelu(F.linear(normed, of["mlp.fc1.weight"], of["mlp.fc1.bias"]))
            fed = F.linear(fed, of["mlp.fc2.weight"], of["mlp.fc2.bias"])
        return x + scale[1] * fed


BLOCK = [
    *(f"{layer}.{kind}" for layer in ("norm1", "norm2", "attn.qkv", "attn.proj") for kind in ("weight", "bias")),
    *(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2", "w12", "w3") for kind in ("weight", "bias")),
    *("ls1.gamma", "ls2.gamma"),
]


def named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters())


def cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def hidden_patches(trainer: Trainer, number: int) -> Tensor:
    """(2, B, N) bool."""
    config = trainer.step.config
    side = config.views.global_size // config.model.patch_size
    if trainer.step.draw_masks is None:
        return torch.zeros(2, config.train.batch_size, side * side, dtype=torch.bool)
    masks = trainer.step.draw_masks(number, range(config.train.batch_size), (side, side))
    return masks.hidden.unflatten(0, (2, -1))


def gradients_of_steps(trainer: Trainer) -> list[dict[str, Tensor]]:
    """A list to which every step adds the gradients that the optimizer gets, by parameter."""
    found: list[dict[str, Tensor]] = []

    def keep(*_) -> None:
        found.append({name: p.grad.clone() for name, p in named(trainer.student) if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep)
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_three_steps_are_dinov2(option, accelerator, tiny):
    config = tiny(DINOV2 | OPTIONS[option])
    trainer = build(accelerator, config)
    reference, gradients = Reference(config, trainer.student, trainer.teacher), gradients_of_steps(trainer)
    for number in range(3):
        views = views_of_batch(config, number)
        expected, norm = reference.step(number, views, hidden_patches(trainer, number))
        found = trainer.step(number, packed(views, config.train.accumulation))
        assert found.pop("health/gradient_norm").item() == pytest.approx(norm, rel=1e-4)
        assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5)
        learned = {name: value.grad for name, value in reference.trained.items() if value.grad is not None}
        assert gradients[-1].keys() == learned.keys()
        errors = {
            name: ((gradients[-1][name] - gradient).norm() / gradient.norm()).item()
            for name, gradient in learned.items()
        }
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
    # Adam divides by the gradient's size: where that all but vanishes, fp32 losses tell by up to 1 % of a step.
    assert_same(dict(named(trainer.student)), reference.student, rtol=1e-4, atol=1e-4)
    assert_same(dict(named(trainer.teacher)), reference.teacher, rtol=1e-4, atol=1e-5)
    for centre, kind in ((trainer.targets.dino, "class"), (trainer.targets.ibot, "patch")):
        if isinstance(centre, Centre):
            torch.testing.assert_close(centre.center[0].double(), reference.centres[kind], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("option", ["shared head", "separate heads, Sinkhorn", "one masked crop"])
def test_micro_batches_equal_one_large_batch(option, parts, fresh_accelerate, tiny):
    """Without KoLeo, which looks for neighbours in a micro-batch; also where a micro-batch has no masked crop."""
    found = []
    for accumulation in (1, parts):
        changes = {"train.accumulation": accumulation, "train.batch_size": 8, "objective.koleo_weight": 0}
        config = tiny(DINOV2 | OPTIONS[option] | changes)
        trainer = build(Accelerator(cpu=True, mixed_precision="no"), config)
        losses = [
            {
                name: value.item()
                for name, value in trainer.step(n, packed(views_of_batch(config, n), accumulation)).items()
            }
            for n in range(3)
        ]
        found.append((losses, weights(trainer.student), weights(trainer.teacher), weights(trainer.targets)))
    (whole_losses, *whole), (parts_losses, *in_parts) = found
    for one, other in zip(parts_losses, whole_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in zip(whole, in_parts, strict=True):
        assert_same(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (3, 2), (2, 3)])
def test_masks_are_those_of_the_images_places(processes, accumulation, accelerator, tiny, monkeypatch):
    """Every process draws, for each micro-batch, the masks of the images that the sampler gives it."""
    config = tiny(DINOV2 | {"train.accumulation": accumulation, "train.batch_size": 12})
    trainer = build(accelerator, config)
    monkeypatch.setattr(type(accelerator), "num_processes", processes)
    stream = EpochStream(12, 12, seed=0)
    for rank in range(processes):
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        asked = []
        monkeypatch.setattr(
            trainer.step, "draw_masks", lambda step, images, *_, asked=asked: asked.append(images) or NO_MASKS
        )
        size = 12 // (processes * accumulation)
        views = [view[:size].repeat(accumulation, 1, 1, 1) for view in views_of_batch(config, 0)]
        trainer.step(0, packed(views, accumulation))
        places = [
            [stream.batch(0).index(image) for image in part]
            for part in MicroBatches(stream, 0, 1, rank, processes, accumulation)
        ]
        assert [list(images) for images in asked] == places


NO_MASKS = SimpleNamespace(to=lambda device: None)


class PlainDINO:
    """A step of DINO, without anything of DINOv2: the project's parts in the order of Caron et al.'s algorithm 1."""

    def __init__(self, config: Config):
        torch.manual_seed(0)
        self.config = config
        self.student, self.teacher = build_networks(config)
        self.centre = Targets(config).dino
        self.optimizer = build_optimizer(self.student, config.optim)
        self.normalise, self.schedules = Normalise(config.views.mean, config.views.std), schedules(config)

    def scores(self, network: Network, crops: list[Tensor], views: int) -> Tensor:
        return network.head(torch.cat(network.backbone(crops))).unflatten(0, (views, -1))

    def step(self, number: int, views: list[Tensor]) -> float:
        plan = self.schedules
        set_rates(self.optimizer, plan.lr(number), plan.weight_decay(number))
        crops = [self.normalise(crop) for crop in packed(views)[0]]
        with torch.no_grad():
            seen = self.scores(self.teacher, crops[:1], 2)
        targets = self.centre.probabilities(seen, plan.temperature(number))
        loss = dino_loss(self.scores(self.student, crops, len(views)), targets, 0.1)
        loss.backward()
        clip_gradients(self.student.parameters(), self.config.optim.clip_grad, self.config.optim.clip_scope)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_teacher(self.teacher, self.student, plan.momentum(number))
        self.centre.update(seen.flatten(0, 1))
        return loss.item()


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_without_masks_and_koleo_it_is_dino_to_the_bit(centering, accelerator, tiny):
    """In fp32, as runs are; whatever is said of masks and of patches' heads, and with stochastic depth."""
    common = {"objective.centering": centering, "model.drop_path": 0.3}
    unused = {"objective.mask_fraction": 0.9, "objective.mask_ratio": "[0.2,0.3]", "objective.koleo_scope": "all"}
    off = {"objective.ibot_weight": 0, "objective.koleo_weight": 0}
    plain, config = PlainDINO(tiny(common)), tiny(common | unused | SEPARATE | off)
    torch.manual_seed(0)
    student, teacher = build_networks(config)
    targets, optimizer = Targets(config), build_optimizer(student, config.optim)
    wrapped, prepared = accelerator.prepare(student, optimizer)
    normalise = Normalise(config.views.mean, config.views.std)
    take_step = Step(accelerator, config, wrapped, teacher, targets, prepared, normalise, schedules(config))
    for number in range(3):
        views = views_of_batch(config, number)
        torch.manual_seed(number)
        expected = plain.step(number, views)
        torch.manual_seed(number)
        found = take_step(number, packed(views))
        assert found.pop("health/gradient_norm") > 0
        assert {name: loss.item() for name, loss in found.items()} == {"loss/dino": expected}
    assert_same(weights(student), weights(plain.student), rtol=0, atol=0)
    assert_same(weights(teacher), weights(plain.teacher), rtol=0, atol=0)
    assert_same(weights(targets.dino), weights(plain.centre), rtol=0, atol=0)
    assert targets.ibot is None
