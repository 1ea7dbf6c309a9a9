"""Where images come from: one file a source, and the table that `data.kind` chooses from.

To add one: write a class with what `Source` asks for in a file of its own, and give it a line here.
"""

from dino.config.schema import CHOICES
from dino.data.sources import digits, folder, omniglot, zip
from dino.data.sources.dataset import DatasetSource, MapStyle
from dino.data.sources.source import Kind, Source

SOURCES: dict[str, Kind] = {
    "folder": folder.KIND,
    "zip": zip.KIND,
    "omniglot": omniglot.KIND,
    "omniglot_train": omniglot.TRAINING_KIND,
    "digits": digits.KIND,
}

CHOICES["data.kind"] = ("auto", *SOURCES, "manifest", "dataset")  # the last: handed in from Python

__all__ = ["SOURCES", "DatasetSource", "Kind", "MapStyle", "Source"]
