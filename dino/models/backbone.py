"""What every backbone offers, and what is known of each family of backbones.

A new backbone is a file with one class of each, and a line in `dino.models.registry`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from dino.config.schema import Config, ModelConfig
from dino.models.preprocess import Preprocess


class Spec(Protocol):
    """What determines a backbone's parameters and function: a frozen dataclass, saved beside the weights."""

    @property
    def in_chans(self) -> int:
        """Channels of the images."""


class Backbone(nn.Module):
    """A network from images to features, with the interface of DINOv2's hub models.

    Attributes:
        spec: what it is.
        embed_dim: D, the width of its features.
        patch_size: sides of images must be multiples of it.
        depth: of how many of the last blocks `get_intermediate_layers` gives tokens; 1: of the last only.
        has_patches: whether it has patch tokens that can be masked, and attention maps.
        preprocess: what its weights expect; set by `load_backbone`.
        description: what is known of the making of its weights; set by `load_backbone`.
    """

    spec: Any
    embed_dim: int
    patch_size: int = 1
    depth: int = 1
    has_patches: bool = False
    preprocess: Preprocess
    description: dict[str, Any]

    def forward(self, images: Tensor | Sequence[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        """(B, C, H, W), or a list of such batches of any sizes, to class tokens (B, D), or a list of them.

        Args:
            masks, is_training: as DINOv2's hub models have them: with `is_training` all of `forward_features` is given,
                and only then are there masks.
        """
        if is_training:
            return self.forward_features(images, masks)
        if isinstance(images, Tensor):
            return self.encode_crops([images])[0][0]
        return self.encode_crops(images)[0]

    def encode_crops(
        self, crops: Sequence[Tensor], masks: Tensor | None = None, patches_of: int = 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Class tokens of crops of several sizes, in one pass, and patch tokens of as many sizes as are asked for.

        Args:
            crops: (B_i, C, H_i, W_i), one batch for each size.
            masks: (B', N) bool, true where a patch of the first B' crops is replaced by the mask token; with
                `has_patches` only.
            patches_of: of how many sizes, from the first, patch tokens are given; what is not needed is not computed.

        Returns:
            Class tokens (B_i, D) of each size; patch tokens (B_i, N_i, D) of each of the first `patches_of` sizes.
        """
        raise NotImplementedError

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        """`x_norm_clstoken` (B, D), `x_norm_regtokens` (B, R, D) and `x_norm_patchtokens` (B, N, D) of images."""
        (class_token,), (patches,) = self.encode_crops([images], masks, patches_of=1)
        return {"x_norm_clstoken": class_token, "x_norm_regtokens": patches[:, :0], "x_norm_patchtokens": patches}

    def get_intermediate_layers(self, images: Tensor, n: int | Sequence[int] = 1, **options: Any) -> tuple[Any, ...]:
        """Patch tokens after chosen blocks; with `depth` above 1 only."""
        raise NotImplementedError(f"{self.title} has no blocks to choose from")

    def class_attention(self, images: Tensor) -> Tensor:
        """(B, heads, h, w): how much the class token attends to each patch; with `has_patches` only."""
        raise NotImplementedError(f"{self.title} has no attention")

    @property
    def transformer_blocks(self) -> list[Any]:
        """The blocks that are compiled, sharded and recomputed one by one; none in a network of another kind."""
        return []

    @property
    def title(self) -> str:
        """What it is, in a few words for a table."""
        return str(self.spec)


class Family(ABC):
    """What is to be known of a family of backbones: how its settings, networks and files hang together.

    Attributes:
        name: of the family in files.
        title: of the family in messages.
        archs: values of `model.arch`.
        spec_type: dataclass of its specs.
        has_patches: see `Backbone`.
        has_blocks: whether its backbones have `transformer_blocks`.
    """

    name: str
    title: str
    archs: tuple[str, ...]
    spec_type: type
    has_patches: bool = False
    has_blocks: bool = False

    @abstractmethod
    def spec(self, config: Config, mask_token: bool) -> Any:
        """The backbone that a run's settings describe, which are resolved.

        Args:
            mask_token: whether patches will be masked.
        """

    @abstractmethod
    def build(self, spec: Any, model: ModelConfig | None = None, drop_path: float = 0.0) -> Backbone:
        """A backbone with random weights from torch's random state.

        Args:
            model: how weights are initialised and paths dropped; None: by the defaults.
            drop_path: rate of stochastic depth.
        """

    @abstractmethod
    def settings(self, spec: Any, model: ModelConfig) -> dict[str, object]:
        """The settings, by `group.key`, that describe a spec; as `model` has them, where that says the same."""

    def infer(self, tensors: Mapping[str, Tensor], num_heads: int | None, source: str) -> Any | None:
        """The spec of another project's backbone from its tensors; None: it is of another family.

        Args:
            num_heads: attention heads, where something besides the tensors tells.
            source: of the tensors, for messages.

        Raises:
            UserError: it is of this family, but not one that can be read.
        """
        return None

    def problems(self, config: Config) -> Iterator[str]:
        """What is wrong with the settings of a run with this backbone."""
        return iter(())

    def describe(self, spec: Any) -> dict[str, Any]:
        """A spec as it is written into files."""
        return dataclasses.asdict(spec)
