"""torchvision's ResNet-18 and ResNet-50 behind the same interface as the Vision Transformer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import Tensor, nn

from dino.config.schema import Config, ModelConfig
from dino.errors import UserError
from dino.models.backbone import Backbone, Family

CONSTRUCTORS = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}


@dataclass(frozen=True)
class ResNetSpec:
    """What determines a ResNet's parameters; saved beside its weights."""

    arch: str = "resnet50"
    in_chans: int = 3


class ResNet(Backbone):
    """A torchvision ResNet without its classifier; parameter names are torchvision's.

    The pooled features stand for the class token and the last feature map for the patch tokens. BatchNorm makes its
    statistics of one micro-batch of one crop size: accumulation changes them, as with any BatchNorm network.
    """

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

    @property
    def title(self) -> str:
        return self.spec.arch

    def encode_crops(
        self, crops: Sequence[Tensor], masks: Tensor | None = None, patches_of: int = 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `Backbone.encode_crops`. Sizes go through one after the other, each with BatchNorm statistics of its own.

        Raises:
            ValueError: masks, for which there is no token.
        """
        if masks is not None:
            raise ValueError("a ResNet has no mask token")
        feature_maps = [self._feature_map(batch) for batch in crops]
        patches = [features.flatten(2).transpose(1, 2) for features in feature_maps[:patches_of]]
        return [features.mean(dim=(2, 3)) for features in feature_maps], patches

    def _feature_map(self, images: Tensor) -> Tensor:
        images = images.to(next(self.parameters()).dtype)
        for module in self.children():
            images = module(images)
        return images


class ResNetFamily(Family):
    """torchvision's ResNets, which have but one setting: which of them."""

    name, title = "resnet", "ResNet"
    archs = tuple(CONSTRUCTORS)
    spec_type = ResNetSpec

    def spec(self, config: Config, mask_token: bool) -> ResNetSpec:
        return ResNetSpec(config.model.arch, config.data.channels)

    def build(self, spec: ResNetSpec, model: ModelConfig | None = None, drop_path: float = 0.0) -> ResNet:
        return ResNet(spec)

    def settings(self, spec: ResNetSpec, model: ModelConfig) -> dict[str, Any]:
        return {"model.arch": spec.arch}

    def infer(self, tensors: Mapping[str, Tensor], num_heads: int | None, source: str) -> ResNetSpec | None:
        if "conv1.weight" not in tensors or "layer1.0.conv1.weight" not in tensors:
            return None
        arch = "resnet50" if "layer1.0.conv3.weight" in tensors else "resnet18"
        if tensors["conv1.weight"].ndim != 4:
            raise UserError(f"{source}: conv1.weight has {tensors['conv1.weight'].ndim} dimensions, not 4")
        return ResNetSpec(arch, tensors["conv1.weight"].shape[1])
