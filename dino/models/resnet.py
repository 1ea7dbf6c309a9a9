"""torchvision's ResNet-18 and ResNet-50 behind the same interface as the Vision Transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import Tensor, nn

from dino.models.preprocess import Preprocess

CONSTRUCTORS = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}


@dataclass(frozen=True)
class ResNetSpec:
    """What determines a ResNet's parameters; saved beside its weights."""

    arch: str = "resnet50"
    in_chans: int = 3


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier; parameter names are torchvision's.

    The pooled features stand for the class token and the last feature map for the patch tokens. BatchNorm makes its
    statistics of one micro-batch of one crop size: accumulation changes them, as with any BatchNorm network.
    """

    preprocess: Preprocess  # these two are set by load_backbone
    description: dict[str, Any]

    def __init__(self, spec: ResNetSpec):
        super().__init__()
        self.spec = spec
        network = CONSTRUCTORS[spec.arch](weights=None)
        self.embed_dim = self.num_features = network.fc.in_features
        if spec.in_chans != 3:
            network.conv1 = nn.Conv2d(spec.in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        for name, module in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """(B, C, H, W), or a list of batches, to pooled features (B, D), or a list of them."""
        if isinstance(images, Tensor):
            return self._feature_map(images).mean(dim=(2, 3))
        return [self._feature_map(batch).mean(dim=(2, 3)) for batch in images]

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """`x_norm_clstoken` (B, D), `x_norm_patchtokens` (B, h·w, D) and an empty `x_norm_regtokens` (B, 0, D)."""
        features = self._feature_map(images)
        patches = features.flatten(2).transpose(1, 2)
        return {
            "x_norm_clstoken": features.mean(dim=(2, 3)),
            "x_norm_regtokens": patches[:, :0],
            "x_norm_patchtokens": patches,
        }

    def _feature_map(self, images: Tensor) -> Tensor:
        for module in self.children():
            images = module(images)
        return images
