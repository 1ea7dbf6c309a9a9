"""What code written for the hub models of DINO and DINOv2 asks a ViT for, by the names that it has there."""

from typing import Any

import torch
from torch import Tensor

from dino.models.backbone import Backbone


class HubModel(Backbone):
    """A ViT's base: names of the official models that say the same as others here."""

    def prepare_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, 1+R+N, D)."""
        raise NotImplementedError

    def last_attention(self, images: Tensor, queries: int | None = None) -> Tensor:
        """(B, C, H, W) to (B, heads, queries, 1+R+N)."""
        raise NotImplementedError

    @property
    def n_blocks(self) -> int:
        """Number of transformer blocks."""
        return self.depth

    @property
    def num_heads(self) -> int:
        """Attention heads of each block."""
        return self.spec.num_heads

    @property
    def num_register_tokens(self) -> int:
        """R."""
        return self.spec.registers

    def prepare_tokens_with_masks(self, images: Tensor, masks: Any = None) -> Tensor:
        """(B, C, H, W) to (B, 1+R+N, D); masks (B, N) bool."""
        return self.prepare_tokens(images, masks)

    @torch.no_grad()
    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, heads, 1+R+N, 1+R+N): of each token in the last block, over all tokens, as in DINO."""
        return self.last_attention(images)
