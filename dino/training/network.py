"""Student and teacher as a config describes them: a backbone with a DINO head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dino.config import Config
from dino.models import SIZES, DINOHead, ResNet, ResNetSpec, VisionTransformer, ViTSpec


class Network(nn.Module):
    """Backbone and head: crops of several sizes to class tokens and prototype scores."""

    def __init__(self, backbone: VisionTransformer | ResNet, head: DINOHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A list of (B_i, C, H_i, W_i) to class tokens (ΣB_i, D) and scores (ΣB_i, K)."""
        tokens = torch.cat(self.backbone(list(crops)))
        return tokens, self.head(tokens)


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


def build_backbone(config: Config, drop_path: float = 0.0) -> VisionTransformer | ResNet:
    """A backbone with random weights from torch's random state; needs a resolved config."""
    model, channels = config.model, int(config.data.channels)
    if model.arch.startswith("resnet"):
        return ResNet(ResNetSpec(model.arch, channels))
    return VisionTransformer(vit_spec(config), drop_path, model.initialisation)  # type: ignore[arg-type]


def vit_spec(config: Config) -> ViTSpec:
    """The ViT that `config.model` describes, with a position table of one global crop's grid."""
    model, size = config.model, SIZES[config.model.arch]
    return ViTSpec(
        embed_dim=model.embed_dim or size.embed_dim,
        depth=model.depth or size.depth,
        num_heads=model.num_heads or size.num_heads,
        patch_size=model.patch_size,
        image_size=config.views.global_size,
        in_chans=int(config.data.channels),
        ffn=model.ffn,  # type: ignore[arg-type]  # checked by config.check
        layer_scale=model.layer_scale,
        registers=model.registers,
        position_interpolation=model.position_interpolation,  # type: ignore[arg-type]
    )


def build_networks(config: Config) -> tuple[Network, Network]:
    """Student and teacher with the same random weights; the teacher has no stochastic depth and takes no gradient."""
    objective = config.objective

    def network(drop_path: float) -> Network:
        backbone = build_backbone(config, drop_path)
        head = DINOHead(
            backbone.embed_dim,
            int(objective.prototypes),
            objective.head_layers,
            objective.head_hidden,
            objective.head_bottleneck,
            objective.norm_last_layer,
        )
        return Network(backbone, head)

    student, teacher = network(config.model.drop_path), network(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher
