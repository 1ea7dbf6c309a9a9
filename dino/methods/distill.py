"""Distillation: a student learns from a frozen teacher that is trained already (`objective.distill`).

As DINOv2's S, B and L were made from its g (Oquab et al. 2023, §5): the same losses with the frozen network's targets,
no patch hidden from the student, and a moving average of the student as the result. The frozen network's heads come
with it where there are any: in a run's checkpoint, or a full checkpoint of DINO's or DINOv2's. Releases have none; then
their own tokens of randomly drawn images become the prototypes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dino.config.schema import Config
from dino.data import Pool, read_or_reason
from dino.errors import UserError
from dino.methods.heads import DINOHead
from dino.methods.network import Network
from dino.models import load_backbone
from dino.models.weights import directory_of, load_heads, load_strictly, weights_digest
from dino.run import RunDirectory

BATCH = 64  # images at a time, whose tokens become prototypes


class Heads(NamedTuple):
    """Of class tokens and of patches; None where there is none."""

    head: DINOHead | None = None
    patch_head: DINOHead | None = None


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


class FrozenTeacher:
    """The network that `objective.distill` names.

    Attributes:
        backbone: frozen.
        digest: of the backbone's weights.
        head, patch_head: of class tokens and of patches, from the same source; None where that has none.
    """

    def __init__(self, name: str):
        self.name, self.backbone = name, load_backbone(name)
        self.head, self.patch_head = _heads_of_run(directory_of(name)) or _heads_of_file(name)
        self.digest = weights_digest(self.backbone)

    def settings(self, config: Config) -> dict[str, object]:
        """The settings that it decides.

        Raises:
            UserError: it cannot teach this student.
        """
        backbone, patch_size = self.backbone, self.backbone.patch_size
        values: dict[str, object] = {"data.channels": backbone.spec.in_chans}
        values |= {f"views.{key}": list(getattr(backbone.preprocess, key)) for key in ("mean", "std")}
        if self.head is not None:
            values["objective.prototypes"] = self.head.prototypes
        if config.objective.ibot_weight:
            values |= self._patch_settings(config)
        sizes = {"views.global_size": config.views.global_size}
        for index, phase in enumerate(config.train.phases):
            sizes[f"train.phases[{index}].global_size"] = phase.global_size
        for key, size in sizes.items():
            if size % patch_size:
                raise UserError(f"{key}={size} is not divisible by {self.name}'s {patch_size}")
        return values

    def _patch_settings(self, config: Config) -> dict[str, object]:
        """Those of the masked-patch loss."""
        if not self.backbone.has_patches or self.backbone.patch_size != config.model.patch_size:
            raise UserError(
                f"objective.ibot_weight compares patches: model.patch_size={config.model.patch_size} must be that "
                f"of {self.name}, or the weight 0"
            )
        values: dict[str, object] = {}
        if self.head is None or self.patch_head is not None:
            values["objective.ibot_head"] = "separate"
        if self.patch_head is not None:
            values["objective.ibot_prototypes"] = self.patch_head.prototypes
        elif self.head is not None and config.objective.ibot_head == "separate":
            values["objective.ibot_prototypes"] = self.head.prototypes  # its one head sees patches too
        return values

    def network(self, config: Config, images: Pool, device: torch.device | str = "cpu") -> Network:
        """Backbone and heads, frozen, on the device; needs a resolved config."""
        self.backbone.to(device)
        objective = config.objective
        head: nn.Module | None = self.head
        patch_head: nn.Module | None = self.patch_head
        if head is None:
            patches = (objective.ibot_prototypes or objective.prototypes) if objective.ibot_weight else 0
            class_tokens, patch_tokens = self._tokens(config, images, objective.prototypes, patches)
            head = TokenPrototypes(class_tokens)
            patch_head = TokenPrototypes(patch_tokens) if patches else None
        return Network(self.backbone, head, patch_head).to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def _tokens(self, config: Config, images: Pool, classes: int, patches: int) -> tuple[Tensor, Tensor]:
        """(classes, D) class tokens of images drawn by the run's seed; (patches, D), a random patch token of each."""
        device = next(self.backbone.parameters()).device
        generator = np.random.default_rng((config.train.seed, classes))
        order = generator.permutation(len(images.names))
        class_tokens: list[Tensor] = []
        patch_tokens: list[Tensor] = []
        for pixels in self._batches(config, images, order, max(classes, patches)):
            features = self.backbone.forward_features(pixels.to(device))
            tokens = features["x_norm_patchtokens"]
            index = torch.from_numpy(generator.integers(tokens.shape[1], size=len(pixels)))
            class_tokens.append(features["x_norm_clstoken"])
            patch_tokens.append(tokens[torch.arange(len(pixels)), index.to(device)])
        if not class_tokens:
            raise UserError(f"none of {len(order)} images can be read: there is nothing to make prototypes of")
        return torch.cat(class_tokens)[:classes], torch.cat(patch_tokens)[:patches]

    def _batches(self, config: Config, images: Pool, order: np.ndarray, count: int) -> Iterator[Tensor]:
        """`count` images, preprocessed; over all once more where there are fewer, none where none can be read."""
        preprocess = replace(self.backbone.preprocess, image_size=config.views.global_size, resize=None)
        indices = itertools.cycle(order.tolist())
        asked = 0
        with tqdm(total=count, desc="prototypes", unit="image", leave=False) as bar:
            while bar.n < count and (bar.n or asked < len(order)):
                batch = list(itertools.islice(indices, min(BATCH, count - bar.n)))
                asked += len(batch)
                readable = [image for index in batch if (image := read_or_reason(images, index)[0]) is not None]
                bar.update(len(readable))
                if readable:
                    yield torch.stack([preprocess.of_levels(image) for image in readable])


def _heads_of_run(directory: Path | None) -> Heads | None:
    """Heads of a run's newest checkpoint; None where there is no run or no checkpoint."""
    if directory is None or (tensors := RunDirectory(directory).newest_tensors("teacher")) is None:
        return None
    return Heads(*(_head(tensors, (f"{name}.",), str(directory)) for name in ("head", "patch_head")))


def _heads_of_file(name: str) -> Heads:
    """Heads of a full checkpoint, by DINO's or DINOv2's names."""
    tensors = load_heads(name)
    return Heads(_head(tensors, ("head.", "dino_head."), name), _head(tensors, ("ibot_head.",), name))


def _head(tensors: dict[str, Tensor], prefixes: tuple[str, ...], source: str) -> DINOHead | None:
    """A head from the tensors that begin with one of the prefixes; its sizes show in their shapes."""
    own = {}
    for prefix, (key, tensor) in itertools.product(prefixes, tensors.items()):
        if key.startswith((f"{prefix}mlp.", f"{prefix}last_layer.")):
            name = key.removeprefix(prefix)
            name = name.replace("parametrizations.weight.original0", "weight_g")
            own[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    if not own:
        return None
    weights = [own[key] for key in sorted(own) if key.startswith("mlp.") and key.endswith(".weight")]
    prototypes = own["last_layer.weight_v"]
    head = DINOHead(weights[0].shape[1], len(prototypes), len(weights), weights[0].shape[0], prototypes.shape[1])
    load_strictly(head, own, f"{source} (head)")
    return head
