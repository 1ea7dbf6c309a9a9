"""Where images come from: one file a source, and the table that `data.kind` chooses from.

To add one: write a class with what `Source` asks for in a file of its own, and give it a line here.
"""

from dino.config.schema import CHOICES
from dino.data.sources import digits, folder, omniglot, parquet, remote, tar, zip
from dino.data.sources import list as path_list
from dino.data.sources.dataset import DatasetSource, MapStyle
from dino.data.sources.source import Kind, Source

SOURCES: dict[str, Kind] = {
    "tar": tar.KIND,  # these two before folders, of which they take those that hold theirs
    "parquet": parquet.KIND,
    "folder": folder.KIND,
    "zip": zip.KIND,
    "list": path_list.KIND,
    "remote": remote.KIND,
    "omniglot": omniglot.KIND,
    "omniglot_train": omniglot.TRAINING_KIND,
    "digits": digits.KIND,
}

CHOICES["data.kind"] = ("auto", *SOURCES, "several", "manifest", "dataset")  # the last: handed in from Python

__all__ = ["SOURCES", "DatasetSource", "Kind", "MapStyle", "Source"]
