"""What a view is: a crop of some size, and how much of each augmentation it gets."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

SHAPES = (3 / 4, 4 / 3)  # of crops before they are resized, width to height


@dataclass(frozen=True)
class View:
    """One kind of crop, and what is done to it.

    Attributes:
        size: side in pixels after the crop has been resized.
        scale: least and greatest fraction of the image's area.
        amounts: of each augmentation by its name in `dino.views.ops`, a probability or a strength; 0 where not named.
        blur_kernel: side of the blur's kernel in pixels, odd.
    """

    size: int
    scale: tuple[float, float]
    amounts: Mapping[str, float] = field(default_factory=dict)
    blur_kernel: int = 9


class Group(NamedTuple):
    """Views of one size, which are made together, and which of an image's views they are."""

    indices: range
    views: tuple[View, ...]


@dataclass(frozen=True)
class MultiCrop:
    """The views of one image, in order; the first `len(globals_)` of them are what the teacher sees."""

    globals_: tuple[View, ...]
    locals_: tuple[View, ...]

    @property
    def views(self) -> tuple[View, ...]:
        """All of them, in order."""
        return self.globals_ + self.locals_

    @property
    def enough(self) -> float:
        """Pixels of an image of which the smallest and narrowest crop is not enlarged to the size of its view."""
        return max(view.size**2 / (view.scale[0] * SHAPES[0]) for view in self.views)

    @property
    def groups(self) -> list[Group]:
        """Views by size, in order; local crops of the global size join the global ones."""
        groups, start = [], 0
        for _, run in itertools.groupby(self.views, key=attrgetter("size")):
            views = tuple(run)
            groups.append(Group(range(start, start + len(views)), views))
            start += len(views)
        return groups
