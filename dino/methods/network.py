"""Student and teacher as a config describes them: a backbone with a head for class tokens, and one for patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dino.config.read import Config
from dino.methods.heads import DINOHead
from dino.methods.masks import Masks
from dino.models import Backbone, ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.models.vit import Size
from dino.training.initial import copy_weights, vit_size


class Outputs(NamedTuple):
    """What a network makes of crops of several sizes.

    Attributes:
        tokens: (ΣB, D) class tokens of all crops.
        scores: (ΣB, K) of them.
        patch_scores: (M, K') of the masked patches; None without masks.
    """

    tokens: Tensor
    scores: Tensor
    patch_scores: Tensor | None = None


class Network(nn.Module):
    """Backbone and heads.

    Args:
        head: of class tokens; of masked patches too, unless they have a `patch_head` of their own.
    """

    def __init__(self, backbone: VisionTransformer | ResNet, head: nn.Module, patch_head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head

    def forward(self, crops: Sequence[Tensor], masks: Masks | None = None, hide: bool = False) -> Outputs:
        """Scores of class tokens and, of the first crops, of masked patches.

        Args:
            crops: (B_i, C, H_i, W_i), one batch for each size.
            masks: of the first crops of the first size.
            hide: replace the masked patches by the mask token, for the student; the teacher sees them.
        """
        if masks is None:
            tokens = torch.cat(self.backbone(list(crops)))
            return Outputs(tokens, self.head(tokens))
        backbone = cast(VisionTransformer, self.backbone)
        class_tokens, patches = backbone.with_patches(crops, masks.hidden if hide else None)
        tokens, masked = torch.cat(class_tokens), patches.flatten(0, 1)[masks.rows]
        if self.patch_head is not None:
            return Outputs(tokens, self.head(tokens), self.patch_head(masked))
        scores, patch_scores = self.head(torch.cat([tokens, masked])).split([len(tokens), len(masked)])
        return Outputs(tokens, scores, patch_scores)


class Normalise(nn.Module):
    """uint8 pixels to floating point with the mean and deviation the weights are trained for."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        deviations = torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviations))
        self.register_buffer("shift", torch.tensor(mean).view(-1, 1, 1) / deviations)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to fp32."""
        return pixels.float() * self.scale - self.shift


@contextmanager
def as_used(backbone: Backbone) -> Iterator[None]:
    """A teacher as others will use it: its BatchNorm takes in no statistics, and no size is compiled for."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        backbone.train(was_training)


def build_backbone(config: Config, drop_path: float = 0.0) -> VisionTransformer | ResNet:
    """A backbone with random weights from torch's random state; needs a resolved config."""
    model, channels = config.model, int(config.data.channels)
    if model.arch.startswith("resnet"):
        return ResNet(ResNetSpec(model.arch, channels))
    subset = model.drop_path_kind == "subset"
    return VisionTransformer(vit_spec(config), drop_path, model.initialisation, subset)  # type: ignore[arg-type]


def vit_spec(config: Config) -> ViTSpec:
    """The ViT that `config.model` describes."""
    model, size = config.model, cast(Size, vit_size(config.model))
    return ViTSpec(
        **size._asdict(),
        patch_size=model.patch_size,
        image_size=model.position_size or config.views.global_size,
        in_chans=int(config.data.channels),
        ffn=model.ffn,  # type: ignore[arg-type]  # checked by config.check
        layer_scale=model.layer_scale,
        registers=model.registers,
        mask_token=config.objective.ibot_weight > 0 and config.objective.distill is None,
        position_interpolation=model.position_interpolation,  # type: ignore[arg-type]
    )


def build_networks(config: Config, initial: Backbone | None = None) -> tuple[Network, Network]:
    """Student and teacher with the same weights; the teacher has no stochastic depth and takes no gradient.

    Args:
        initial: the backbone that both begin with; None: random weights. Heads are random.
    """

    def network(drop_path: float) -> Network:
        backbone = build_backbone(config, drop_path)
        return Network(backbone, *build_heads(config, backbone.embed_dim))

    student, teacher = network(config.model.drop_path), network(0.0)
    if initial is not None:
        copy_weights(initial, student.backbone, str(config.model.init))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def build_heads(config: Config, width: int) -> tuple[DINOHead, DINOHead | None]:
    """The head of class tokens (D = `width`) and, where patches do not share it, theirs."""
    objective = config.objective
    sizes = (int(objective.prototypes), objective.head_layers, objective.head_hidden, objective.head_bottleneck)
    head = DINOHead(width, *sizes, objective.norm_last_layer)
    if not objective.ibot_weight or objective.ibot_head == "shared":
        return head, None
    own = (objective.ibot_prototypes, objective.head_layers, objective.ibot_head_hidden, objective.ibot_head_bottleneck)
    sizes = tuple(mine or shared for mine, shared in zip(own, sizes, strict=True))  # type: ignore[assignment]
    return head, DINOHead(width, *sizes, objective.norm_last_layer)
