"""What methods train: a backbone with a head for class tokens, and perhaps one for patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dino.config.schema import Config
from dino.methods.masks import Masks
from dino.models import Backbone, ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.models.vit import SIZES, Size
from dino.models.weights import load_strictly


class Outputs(NamedTuple):
    """What a network makes of crops of several sizes.

    Attributes:
        tokens: (ΣB, D) class tokens of all crops.
        logits: (ΣB, K) of them.
        patch_logits: (M, K') of the masked patches; None without masks.
    """

    tokens: Tensor
    logits: Tensor
    patch_logits: Tensor | None = None


class Network(nn.Module):
    """Backbone and heads.

    Args:
        head: of class tokens; of masked patches too, unless they have a `patch_head` of their own.
    """

    def __init__(self, backbone: VisionTransformer | ResNet, head: nn.Module, patch_head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head

    def forward(self, crops: Sequence[Tensor], masks: Masks | None = None, hide: bool = False) -> Outputs:
        """Logits of class tokens and, of the first crops, of masked patches.

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
        logits, patch_logits = self.head(torch.cat([tokens, masked])).split([len(tokens), len(masked)])
        return Outputs(tokens, logits, patch_logits)


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


def build_backbone(config: Config, drop_path: float = 0.0, mask_token: bool = False) -> VisionTransformer | ResNet:
    """A backbone with random weights from torch's random state; needs a resolved config."""
    model, channels = config.model, config.data.channels
    if model.arch.startswith("resnet"):
        return ResNet(ResNetSpec(model.arch, channels))
    subset = model.drop_path_kind == "subset"
    return VisionTransformer(vit_spec(config, mask_token), drop_path, model.weight_init, subset)  # type: ignore[arg-type]


def vit_spec(config: Config, mask_token: bool = False) -> ViTSpec:
    """The ViT that `config.model` describes."""
    model, named = config.model, SIZES[config.model.arch]
    size = Size(model.embed_dim or named.embed_dim, model.depth or named.depth, model.num_heads or named.num_heads)
    return ViTSpec(
        **size._asdict(),
        patch_size=model.patch_size,
        image_size=model.position_size or config.views.global_size,
        in_chans=config.data.channels,
        ffn=model.ffn,  # type: ignore[arg-type]  # one of its choices
        layer_scale=model.layer_scale,
        registers=model.registers,
        mask_token=mask_token,
        position_interpolation=model.position_interpolation,  # type: ignore[arg-type]
    )


def copy_weights(backbone: Backbone, network: Backbone, source: str) -> None:
    """Give `network` the weights of `backbone`; its mask token, if it has one more or one fewer, is set aside."""
    state = dict(backbone.state_dict())
    expected = network.state_dict()
    if "mask_token" in expected:
        state.setdefault("mask_token", torch.zeros_like(expected["mask_token"]))
    else:
        state.pop("mask_token", None)
    load_strictly(network, state, source)
