"""Images in: folders, archives and data sets, and the order in which a run reads them."""

from dino.data.decode import UnreadableImage
from dino.data.pool import Pool, fingerprint, open_images, read_or_reason, samples_per_epoch, stamp
from dino.data.resident import Canvas, ResidentImages, estimated_bytes
from dino.data.sampler import EpochStream, MicroBatches

__all__ = [
    "Canvas",
    "EpochStream",
    "MicroBatches",
    "Pool",
    "ResidentImages",
    "UnreadableImage",
    "estimated_bytes",
    "fingerprint",
    "open_images",
    "read_or_reason",
    "samples_per_epoch",
    "stamp",
]
