"""A step of DINO and DINOv2 written from the papers: one crop, one patch and one pair of views at a time.

In double precision, with torch's own AdamW and clipping. It takes from the project the first weights and which patches
are hidden, and nothing else.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.config.schema import Config

BLOCK = [
    *(f"{layer}.{kind}" for layer in ("norm1", "norm2", "attn.qkv", "attn.proj") for kind in ("weight", "bias")),
    *(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2", "w12", "w3") for kind in ("weight", "bias")),
    *("ls1.gamma", "ls2.gamma"),
]
Weights = dict[str, Tensor]  # by the project's names


def cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def hidden_patches(method: Any, number: int, config: Config) -> Tensor:
    """(2, B, N) bool, as a method of the project draws them for a step; none without a loss of patches."""
    batch, side = config.train.batch_size, config.views.global_size // config.model.patch_size
    if method.draw_masks is None:
        return torch.zeros(2, batch, side * side, dtype=torch.bool)
    return method.draw_masks(number, range(batch), (side, side)).hidden.unflatten(0, (2, -1))


class Reference:
    """Caron et al. 2021, algorithm 1, and Oquab et al. 2023, §4, of a student and a teacher."""

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module):
        self.config = config
        self.student = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in student.named_parameters()}
        self.teacher = {name: value.detach().clone() for name, value in teacher.named_parameters()}
        self.trained = {name: value for name, value in self.student.items() if value.requires_grad}
        groups = [{"params": [value], "name": name} for name, value in self.trained.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1, fused=False, foreach=False)
        self.centers = {"class": 0.0, "patch": 0.0}

    def step(self, number: int, views: list[Tensor], hidden: Tensor) -> dict[str, float]:
        """Losses and gradient norm of one step; rates as the `tiny` config says: 1 step of warm-up, 10 in all.

        Args:
            hidden: (2, B, N) bool, which patches of the global crops are masked.
        """
        objective = self.config.objective
        self.set_rates(number)
        momentum, temperature = cosine(0.9, 1.0, number / 9), 0.04 + min(number / 2, 1) * (0.07 - 0.04)
        crops = [[self.pixels(image) for image in view] for view in views]
        with torch.no_grad():
            outputs = [[self.vit(self.teacher, crop) for crop in view] for view in crops[:2]]
            class_logits = torch.stack([self.head(self.teacher, "head", token) for of in outputs for token, _ in of])
            patches = torch.stack([patches for view in outputs for _, patches in view])[hidden.flatten(0, 1)]
            patch_logits = self.head(self.teacher, self.patch_head, patches)
            class_targets = self.targets(class_logits, "class", temperature).unflatten(0, (2, -1))
            patch_targets = iter(self.targets(patch_logits, "patch", temperature)) if len(patches) else iter(())
        student = [
            [self.vit(self.student, crop, hidden[v, b] if v < 2 else None) for b, crop in enumerate(view)]
            for v, view in enumerate(crops)
        ]

        losses = {"loss/dino": self.dino(student, class_targets)}
        if objective.ibot_weight:
            losses["loss/ibot"] = objective.ibot_weight * self.ibot(student, hidden, patch_targets)
        if objective.koleo_weight:
            losses["loss/koleo"] = objective.koleo_weight * self.koleo(student)
        norm = self.update(number, sum(losses.values()))
        with torch.no_grad():
            for name, value in self.teacher.items():
                value.copy_(momentum * value + (1 - momentum) * self.student[name])
        self.centers["class"] = 0.9 * self.centers["class"] + 0.1 * class_logits.mean(dim=0)
        if len(patches):
            self.centers["patch"] = 0.9 * self.centers["patch"] + 0.1 * patch_logits.mean(dim=0)
        return {name: loss.item() for name, loss in losses.items()} | {"health/gradient_norm": norm}

    def set_rates(self, number: int) -> None:
        """Layer-wise: γ to the power of the layers above; heads and last norm are layer L+1, block i is i+1."""
        optim, last = self.config.optim, self.config.model.depth + 1
        lr = 0.005 if number == 0 else cosine(0.01, 1e-6, (number - 1) / 8)
        for group in self.optimizer.param_groups:
            name, layer = group["name"], last
            if name.startswith("backbone.blocks."):
                layer = int(name.split(".")[2]) + 1
            elif name.startswith("backbone.") and not name.startswith("backbone.norm"):
                layer = 0
            factor = optim.layer_decay ** (last - layer) * (optim.patch_embed_lr if "patch_embed" in name else 1)
            group["lr"] = lr * factor
            group["weight_decay"] = cosine(0.04, 0.4, number / 9) if group["params"][0].ndim > 1 else 0.0

    def update(self, number: int, loss: Tensor) -> float:
        """The student's step; gives the gradient's norm before clipping."""
        optim = self.config.optim
        self.optimizer.zero_grad()
        loss.backward()
        for name, value in self.trained.items():
            if "last_layer" in name and number < self.config.objective.freeze_last_layer_steps:
                value.grad = None
            if name.startswith("backbone.") and number < optim.freeze_backbone_steps:
                value.grad = None
        norm = torch.cat([value.grad.flatten() for value in self.trained.values() if value.grad is not None]).norm()
        for scope in ("backbone.", "head.", "patch_head.") if optim.clip_scope == "module" else ("",):
            part = [value for name, value in self.trained.items() if name.startswith(scope)]
            nn.utils.clip_grad_norm_(part, optim.clip_grad)
        self.optimizer.step()
        return norm.item()

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

    def targets(self, logits: Tensor, kind: str, temperature: float) -> Tensor:
        """(N, K): centered (Caron et al. 2021, eq. 4), or balanced in three rounds (Caron et al. 2020)."""
        if self.config.objective.centering == "center":
            return F.softmax((logits - self.centers[kind]) / temperature, dim=1)
        q = torch.exp(logits / temperature)
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

    def head(self, of: Weights, name: str, x: Tensor) -> Tensor:
        """(…, D) to (…, K)."""
        last = 2 * (self.config.objective.head_layers - 1)
        for layer in range(0, last + 1, 2):
            x = F.linear(x, of[f"{name}.mlp.{layer}.weight"], of[f"{name}.mlp.{layer}.bias"])
            x = F.gelu(x) if layer < last else x / x.norm(dim=-1, keepdim=True)
        v, g = of[f"{name}.last_layer.weight_v"], of[f"{name}.last_layer.weight_g"]
        return x @ (g * v / v.norm(dim=1, keepdim=True)).T

    def vit(self, of: Weights, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
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

    def block(self, of: dict[str, Tensor | None], x: Tensor) -> Tensor:
        """Pre-norm attention, head by head, and feed-forward layer, (T, D) to (T, D)."""
        normed = F.layer_norm(x, x.shape[1:], of["norm1.weight"], of["norm1.bias"], eps=1e-6)
        qkv = F.linear(normed, of["attn.qkv.weight"], of["attn.qkv.bias"])
        queries, keys, values = (part.chunk(self.config.model.num_heads, dim=1) for part in qkv.chunk(3, dim=1))
        heads = [
            (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1) @ v for q, k, v in zip(queries, keys, values, strict=True)
        ]
        scale = [1.0 if of[name] is None else of[name] for name in ("ls1.gamma", "ls2.gamma")]
        x = x + scale[0] * F.linear(torch.cat(heads, dim=1), of["attn.proj.weight"], of["attn.proj.bias"])
        normed = F.layer_norm(x, x.shape[1:], of["norm2.weight"], of["norm2.bias"], eps=1e-6)
        if self.config.model.ffn == "swiglu":
            gate, value = F.linear(normed, of["mlp.w12.weight"], of["mlp.w12.bias"]).chunk(2, dim=1)
            fed = F.linear(gate * gate.sigmoid() * value, of["mlp.w3.weight"], of["mlp.w3.bias"])
        else:
            fed = F.gelu(F.linear(normed, of["mlp.fc1.weight"], of["mlp.fc1.bias"]))
            fed = F.linear(fed, of["mlp.fc2.weight"], of["mlp.fc2.bias"])
        return x + scale[1] * fed
