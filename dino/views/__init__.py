"""Multi-crop views of an image: what they are, and how worker processes or the device make them."""

from dino.views.dataset import Batch, ViewsDataset, collate
from dino.views.device import DeviceViews
from dino.views.spec import MultiCrop, View, multi_crop

__all__ = ["Batch", "DeviceViews", "MultiCrop", "View", "ViewsDataset", "collate", "multi_crop"]
