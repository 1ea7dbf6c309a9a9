"""A map-style data set of the user's own, handed in from Python: whatever has `len()` and `[index]`."""

import hashlib
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.data.decode import to_tensor
from dino.data.formats import UnreadableImage, reason_of
from dino.data.picture import picture_array
from dino.data.sources.source import Source, packed
from dino.errors import UserError

LABELLED_BY_READING = 10_000  # items, up to which a data set without `targets` is read for its labels
STAMPED = 16  # items whose pixels stand for all in the stamp


class MapStyle(Protocol):
    """A data set as torch.utils.data means it.

    An item is a PIL image, or uint8 pixels as an array (H, W, C) or a tensor (C, H, W), either of them also the other
    way round where `channels` tells; or a tuple of one of these and a label.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource(Source):
    """The items of a data set in its own order.

    Labels are its `targets`, named by its `classes`, as torchvision's data sets have them; else those of its items, for
    which it is read as a whole if it has at most 10,000. `channels=auto` are those of the first item where that is an
    array or a tensor, else 3. Raises `UserError` where it is empty or its first item is no image.
    """

    def __init__(self, dataset: MapStyle, channels: int | str = "auto"):
        if not len(dataset):
            raise UserError("the data set is empty")
        self.dataset = dataset
        first = _image(dataset[0])
        if not isinstance(first, Image.Image) and not _is_pixels(first):
            raise UserError(
                f"an item of the data set is, or begins with, a PIL image or uint8 pixels; here it is "
                f"{_described(first)}: leave out what turns images into fractions (ToTensor, Normalize)"
            )
        self.channels = _channels(first) if channels == "auto" else int(channels)
        self.names = packed(f"{index:08d}" for index in range(len(dataset)))
        labels = _labels(dataset)
        self.labels = None if labels is None or len(set(labels)) < 2 else packed(labels.tolist()).dictionary_encode()

    def read(self, index: int) -> Tensor:
        try:
            image = _image(self.dataset[index])
            if isinstance(image, Image.Image):
                return to_tensor(picture_array(image, self.channels), self.channels)
            if not _is_pixels(image):
                raise UnreadableImage(f"it is neither a PIL image nor uint8 pixels, but {_described(image)}")
            return to_tensor(np.array(_channels_last(image, self.channels), order="C"), self.channels)
        except UnreadableImage:
            raise
        except Exception as error:  # what a data set raises where a file of its own is broken, only it knows
            raise UnreadableImage(reason_of(error)) from error

    def stamp(self) -> str:
        """Of the number of items, and the pixels of a few of them."""
        digest = hashlib.sha256(str(len(self.dataset)).encode())
        for index in range(0, len(self.dataset), -(-len(self.dataset) // STAMPED)):
            try:
                digest.update(self.read(index).numpy().tobytes())
            except UnreadableImage as reason:
                digest.update(str(reason).encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


def _image(item: Any) -> Any:
    return item[0] if isinstance(item, tuple | list) else item


def _is_pixels(image: Any) -> bool:
    return getattr(image, "dtype", None) in (torch.uint8, np.uint8) and image.ndim in (2, 3)


def _described(image: Any) -> str:
    return f"{image.dtype} of {tuple(image.shape)}" if hasattr(image, "dtype") else f"a {type(image).__name__}"


def _channels(image: Any) -> int:
    """The convention of the type says which end of the shape it is, unless only the other end is that short."""
    if isinstance(image, Image.Image):
        return 3
    if image.ndim == 2:
        return 1
    conventional, other = image.shape[-1], image.shape[0]
    if isinstance(image, Tensor):
        conventional, other = other, conventional
    return other if conventional > 4 >= other else conventional


def _channels_last(image: Any, channels: int) -> np.ndarray:
    """Pixels in either layout as (H, W, C)."""
    array = np.asarray(image)
    if array.ndim == 2:
        return array[:, :, None]
    first, last = array.shape[0] == channels, array.shape[-1] == channels
    is_channels_first = isinstance(image, Tensor) if first == last else first
    return array.transpose(1, 2, 0) if is_channels_first else array


def _labels(dataset: Any) -> np.ndarray | None:
    """(N,) class names; None where the data set has none."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch.utils.data.Subset
        labels_of_whole = _labels(dataset.dataset)
        return None if labels_of_whole is None else labels_of_whole[np.asarray(dataset.indices)]
    targets = getattr(dataset, "targets", None)
    values = np.asarray(_targets_of_items(dataset) if targets is None else targets)
    if values.shape != (len(dataset),) or values.dtype.kind not in "iuU":
        return None
    classes = np.asarray(getattr(dataset, "classes", ()))
    if values.dtype.kind != "U" and classes.ndim == 1 and values.min() >= 0 and values.max() < len(classes):
        values = classes[values]
    return values.astype(str)


def _targets_of_items(dataset: MapStyle) -> list[Any]:
    """Of a small data set whose items are pairs; nothing of any other."""
    if len(dataset) > LABELLED_BY_READING or not isinstance(dataset[0], tuple | list):
        return []
    try:
        return [dataset[index][1] for index in range(len(dataset))]
    except Exception:  # an item that cannot be read, or is no pair, has no label: then the data set has none
        return []
