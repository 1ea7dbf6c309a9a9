"""What methods train: a backbone with a head for class tokens, and perhaps one for patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino.methods.masks import Masks
from dino.models import Backbone
from dino.models.linear import copy_weights


class Outputs(NamedTuple):
    """What a network makes of crops of several sizes.

    Attributes:
        tokens: (ΣB, D) class tokens of all crops.
        logits: (ΣB, K) of them.
        patch_logits: (M, K') of the masked patches; None without masks.
        patches: (B_i, N_i, D) patch tokens of each size; None where they are not asked for.
    """

    tokens: Tensor
    logits: Tensor
    patch_logits: Tensor | None = None
    patches: list[Tensor] | None = None


class Network(nn.Module):
    """Backbone and heads.

    Args:
        head: of class tokens; of masked patches too, unless they have a `patch_head` of their own.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, patch_head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head

    def forward(
        self, crops: Sequence[Tensor], masks: Masks | None = None, hide: bool = False, patches: bool = False
    ) -> Outputs:
        """Logits of class tokens and, of the first crops, of masked patches.

        Args:
            crops: (B_i, C, H_i, W_i), one batch for each size.
            masks: of the first crops of the first size.
            hide: replace the masked patches by the mask token, for the student; the teacher sees them.
            patches: give the patch tokens of all crops too.
        """
        device = crops[0].device.type
        if self.training and torch.is_autocast_enabled(device):
            copy_weights(self, torch.get_autocast_dtype(device))
        hidden = masks.hidden if masks is not None and hide else None
        sizes = len(crops) if patches else int(masks is not None)  # what is not needed is not computed
        class_tokens, patch_tokens = self.backbone.encode_crops(crops, hidden, patches_of=sizes)
        tokens, patch_logits = torch.cat(class_tokens), None
        if masks is None:
            logits = self.head(tokens)
        else:
            masked = patch_tokens[0].flatten(0, 1)[masks.rows]
            if self.patch_head is not None:
                logits, patch_logits = self.head(tokens), self.patch_head(masked)
            else:
                logits, patch_logits = self.head(torch.cat([tokens, masked])).split([len(tokens), len(masked)])
        return Outputs(tokens, logits, patch_logits, patch_tokens if patches else None)


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
