"""Distillation: a student learns from a frozen teacher that is trained already (`objective.distill`).

As DINOv2's S, B and L were made from its g (Oquab et al. 2023, §5): the same losses with the frozen network's targets,
no patch hidden from the student, and a moving average of the student as the result. The frozen network's heads come
with it where there are any: in a run's checkpoint, or a full checkpoint of DINO's or DINOv2's. Releases have none; then
their own tokens of randomly chosen images become the prototypes.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from dino.config import read as configuration
from dino.config.read import Config
from dino.data import Images, UnreadableImage
from dino.errors import UserError
from dino.evaluation.features import weights_digest
from dino.methods.heads import DINOHead
from dino.methods.network import Network, build_networks
from dino.models import Backbone, ResNet, load_backbone
from dino.models.weights.load import directory_of, load_heads, load_strictly
from dino.training.checkpoint import whole_checkpoints
from dino.training.initial import follow

Head = DINOHead | nn.Module
BATCH = 64  # images at a time, whose tokens become prototypes


class TokenPrototypes(nn.Module):
    """Cosine similarities to given tokens, all less their mean: a head for a backbone that has none.

    Args:
        tokens: (K, D), the prototypes-to-be.
    """

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.mean: Tensor
        self.prototypes: Tensor
        self.register_buffer("mean", tokens.mean(dim=0))
        self.register_buffer("prototypes", F.normalize(tokens - self.mean, dim=1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) to (B, K)."""
        return F.normalize(tokens.float() - self.mean, dim=1) @ self.prototypes.T


class Guide:
    """The frozen teacher that `objective.distill` names.

    Attributes:
        backbone: frozen.
        digest: of the backbone's weights.
        head, patch_head: of class tokens and of patches, from the same source; None where that has none.
    """

    def __init__(self, name: str):
        self.name, self.backbone = name, load_backbone(name)
        self.head, self.patch_head = _heads_of_run(directory_of(name)) or _heads_of_file(name, self.backbone)
        self.digest = weights_digest(self.backbone)

    def settings(self, config: Config) -> dict[str, object]:
        """The settings that it decides.

        Raises:
            UserError: it cannot teach this student.
        """
        backbone, objective = self.backbone, config.objective
        values: dict[str, object] = {"data.channels": backbone.spec.in_chans}
        values |= {f"views.{key}": list(getattr(backbone.preprocess, key)) for key in ("mean", "std")}
        if self.head is not None:
            values["objective.prototypes"] = self.head.prototypes
        if objective.ibot_weight:
            if isinstance(backbone, ResNet) or backbone.patch_size != config.model.patch_size:
                raise UserError(
                    f"objective.ibot_weight compares patches: model.patch_size={config.model.patch_size} must be that "
                    f"of {self.name}, or the weight 0"
                )
            if self.head is None or self.patch_head is not None:
                values["objective.ibot_head"] = "separate"
            if self.patch_head is not None:
                values["objective.ibot_prototypes"] = self.patch_head.prototypes
            elif self.head is not None and objective.ibot_head == "separate":
                values["objective.ibot_prototypes"] = self.head.prototypes  # its one head scores patches too
        patch = getattr(backbone, "patch_size", 1)
        sizes = {"views.global_size": config.views.global_size}
        sizes |= {f"train.phases[{i}].global_size": phase.global_size for i, phase in enumerate(config.train.phases)}
        for key, size in sizes.items():
            if size % patch:
                raise UserError(f"{key}={size} is not divisible by {self.name}'s {patch}")
        return values

    def network(self, config: Config, images: Images, device: torch.device | str = "cpu") -> Network:
        """Backbone and heads, frozen, on the device; needs a resolved config."""
        self.backbone.to(device)
        objective = config.objective
        head: Head | None = self.head
        patch_head: Head | None = self.patch_head
        if head is None:
            patches = (objective.ibot_prototypes or int(objective.prototypes)) if objective.ibot_weight else 0
            head, patch_head = self._prototypes(config, images, int(objective.prototypes), patches)
        return Network(self.backbone, head, patch_head).to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def _prototypes(
        self, config: Config, images: Images, classes: int, patches: int
    ) -> tuple[TokenPrototypes, TokenPrototypes | None]:
        """Class tokens of as many images, drawn by the run's seed, and one patch token after another of the same."""
        device = next(self.backbone.parameters()).device
        preprocess = replace(self.backbone.preprocess, image_size=config.views.global_size, resize=None)
        generator = np.random.default_rng((config.train.seed, classes))
        order, needed = generator.permutation(len(images.names)), max(classes, patches)
        visits = itertools.cycle(order.tolist())  # over all once more, where there are fewer images than prototypes
        tokens: list[Tensor] = []
        of_patches: list[Tensor] = []
        bar = tqdm(total=needed, desc="prototypes", unit="image", leave=False)
        asked = 0
        while bar.n < needed and (tokens or asked < len(order)):
            chosen = list(itertools.islice(visits, min(BATCH, needed - bar.n)))
            asked += len(chosen)
            pixels = []
            for index in chosen:
                try:
                    pixels.append(preprocess(images.read(int(index))))
                except UnreadableImage:
                    continue
            bar.update(len(pixels))
            if pixels:
                found = self.backbone.forward_features(torch.stack(pixels).to(device))
                tokens.append(found["x_norm_clstoken"])
                place = torch.from_numpy(generator.integers(found["x_norm_patchtokens"].shape[1], size=len(pixels)))
                of_patches.append(found["x_norm_patchtokens"][torch.arange(len(pixels)), place.to(device)])
        bar.close()
        if not tokens:
            raise UserError(f"none of {len(order)} images can be read: there is nothing to make prototypes of")
        drawn = torch.cat(tokens)
        return (
            TokenPrototypes(drawn[:classes]),
            TokenPrototypes(torch.cat(of_patches)[:patches]) if patches else None,
        )


def follow_guide(config: Config) -> tuple[Config, Guide | None, dict[str, str]]:
    """Let the frozen teacher of `objective.distill`, if there is one, decide channels, normalisation and prototypes.

    Returns:
        The config, the teacher, and the reason of each setting that it decided.
    """
    if config.objective.distill is None:
        return config, None, {}
    guide = Guide(config.objective.distill)
    followed, reasons = follow(config, guide.settings(config), f"objective.distill={guide.name}")
    return followed, guide, reasons


def _heads_of_run(run: Path | None) -> tuple[DINOHead, DINOHead | None] | None:
    if run is None or not (run / "config.yaml").is_file() or not whole_checkpoints(run / "checkpoints"):
        return None
    _, teacher = build_networks(configuration.load(run / "config.yaml"))
    file = whole_checkpoints(run / "checkpoints")[-1] / "teacher.safetensors"
    load_strictly(teacher, load_file(file), str(file))
    return cast(tuple[DINOHead, DINOHead | None], (teacher.head, teacher.patch_head))


def _heads_of_file(name: str, backbone: Backbone) -> tuple[DINOHead | None, DINOHead | None]:
    """Heads of a full checkpoint, by DINO's or DINOv2's names."""
    found = load_heads(name)
    heads: list[DINOHead | None] = []
    for prefixes in (("head.", "dino_head."), ("ibot_head.",)):
        tensors = {
            key.removeprefix(prefix)
            .replace("parametrizations.weight.original0", "weight_g")
            .replace("parametrizations.weight.original1", "weight_v"): tensor
            for prefix in prefixes
            for key, tensor in found.items()
            if key.startswith(f"{prefix}mlp.") or key.startswith(f"{prefix}last_layer.")
        }
        heads.append(_build_head(tensors, name) if tensors else None)
    return heads[0], heads[1]


def _build_head(tensors: dict[str, Tensor], source: str) -> DINOHead:
    weights = [tensors[key] for key in sorted(tensors) if key.startswith("mlp.") and key.endswith(".weight")]
    prototypes = tensors["last_layer.weight_v"]
    head = DINOHead(weights[0].shape[1], len(prototypes), len(weights), weights[0].shape[0], prototypes.shape[1])
    load_strictly(head, tensors, f"{source} (head)")
    return head
