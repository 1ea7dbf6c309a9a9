"""Images in: folders, archives and data sets, and the order in which a run reads them."""

from dino.data.formats import Limits, UnreadableImage
from dino.data.levels import Levels
from dino.data.measured import mean_and_std, measured_range
from dino.data.opening import open_images, pool_of
from dino.data.pool import Pool, fingerprint, read_or_reason, samples_per_epoch, stamp
from dino.data.resident import Canvas, ResidentImages, decoded
from dino.data.sampler import EpochStream, MicroBatches

__all__ = [
    "Canvas",
    "EpochStream",
    "Levels",
    "Limits",
    "MicroBatches",
    "Pool",
    "ResidentImages",
    "UnreadableImage",
    "decoded",
    "fingerprint",
    "mean_and_std",
    "measured_range",
    "open_images",
    "pool_of",
    "read_or_reason",
    "samples_per_epoch",
    "stamp",
]
