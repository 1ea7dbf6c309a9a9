"""Multi-crop views of an image: what they are, and how worker processes make them."""

from dino.views.dataset import Batch, ViewsDataset, collate
from dino.views.spec import MultiCrop, View, multi_crop

__all__ = ["Batch", "MultiCrop", "View", "ViewsDataset", "collate", "multi_crop"]
