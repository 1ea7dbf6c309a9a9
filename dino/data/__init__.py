"""Images in: folders, archives and data sets, and the order in which a run visits them."""

from dino.data.decode import UnreadableImage
from dino.data.pool import Images, fingerprint, open_images, stamp, visits
from dino.data.resident import Canvas, ResidentImages, estimated_bytes
from dino.data.sampler import EpochStream, MicroBatches

__all__ = [
    "Canvas",
    "EpochStream",
    "Images",
    "MicroBatches",
    "ResidentImages",
    "UnreadableImage",
    "estimated_bytes",
    "fingerprint",
    "open_images",
    "stamp",
    "visits",
]
