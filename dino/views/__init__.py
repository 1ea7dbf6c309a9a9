"""Multi-crop views of an image, as a function of (seed, epoch, image).

    spec = view_spec(config.views)              # what views there are
    views = DeviceViews(spec)
    crops = views.crop(canvas, keys)            # images on the device: crops by size, (V·B, C, size, size) uint8
    crops = views.photometric(crops, keys)      # and their photometric augmentation, of the same type and shapes

A pool that does not fit on the device is decoded and cropped by the workers of a DataLoader over `ViewsDataset(images,
spec, seed)`, whose items are asked for by (epoch, index) and `collate` makes a `Batch` of; `batch.crops`, moved to the
device, and `batch.keys` are then what `photometric` takes. Augmentations are in `ops/`, one a file.
"""

from dino.views.device import DeviceViews
from dino.views.spec import view_spec
from dino.views.view import MultiCrop, View
from dino.views.workers import Batch, ViewsDataset, canvas_of, collate

__all__ = ["Batch", "DeviceViews", "MultiCrop", "View", "ViewsDataset", "canvas_of", "collate", "view_spec"]
