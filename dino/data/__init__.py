"""Images in: folders, archives and data sets, and the order in which a run reads them."""

from dino.data.formats import Limits, UnreadableImage
from dino.data.pool import Pool, fingerprint, open_images, read_or_reason, samples_per_epoch, stamp
from dino.data.resident import Canvas, ResidentImages, decoded
from dino.data.sampler import EpochStream, MicroBatches

__all__ = [
    "Canvas",
    "EpochStream",
    "Limits",
    "MicroBatches",
    "Pool",
    "ResidentImages",
    "UnreadableImage",
    "decoded",
    "fingerprint",
    "open_images",
    "read_or_reason",
    "samples_per_epoch",
    "stamp",
]
