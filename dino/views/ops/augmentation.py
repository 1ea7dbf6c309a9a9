"""What an augmentation is: what is drawn for each view, and how that is applied to a batch."""

from enum import Enum

import numpy as np
from torch import Tensor

from dino.data import Canvas
from dino.views.draws import Numbers
from dino.views.view import View

Draw = dict[str, np.ndarray]  # what chance decides, by name, each (V, B, …)
Prepared = dict[str, Tensor]  # what `Augmentation.prepare` makes of that, on the device


class Stage(Enum):
    """When an augmentation has its turn; within a stage, in the order of the registry."""

    IMAGE = "before the crop, on whole images"
    CROP = "after the crop, on uint8; by whoever crops"
    PHOTOMETRIC = "after that, on fp32; always on the device"


class Augmentation:
    """One augmentation. Its amount for a view is `view.amounts[name]`: a probability or a strength, up to `limit`."""

    name: str
    stage = Stage.PHOTOMETRIC
    limit = 1.0

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        """What chance decides; of crops, `applied` (bool) says which are changed at all.

        Unless said otherwise, the amount is the probability of that, and the number named as the augmentation decides.

        Args:
            numbers: uniform in [0, 1): `numbers[name]` is (V, B), and for one name the same whatever else is drawn.
            amount: (V, 1), of each view.
        """
        return {"applied": numbers[self.name] < amount}

    def kinds(self, draw: Draw, view: View) -> np.ndarray:
        """(n,): 0 where a crop is left alone; a CPU changes those of one kind together, which may take less."""
        return draw["applied"].astype(int)

    def prepare(self, draw: Draw, view: View) -> Draw:
        """What `apply` needs for the crops that are changed, worked out on the host: as drawn, unless said otherwise.

        Args:
            draw: as drawn for them, each (n, …); at stage IMAGE also the images' `sizes`, (n, 2).
            view: one of their views, which all have one size.
        """
        return draw

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        """Change crops.

        Args:
            pixels: (n, C, S, S), 0 … 255; may be overwritten.
            draw: as prepared for them.
            view: one of their views, which all have one size.
        """
        raise NotImplementedError

    def apply_to_images(self, canvas: Canvas, draw: Prepared) -> Tensor:
        """At stage IMAGE, change whole images instead: one for each of V·B views, (V·B, C, H, W) fp32.

        Args:
            canvas: V·B images, pixels and background in fp32; may be overwritten.
            draw: as prepared for them.
        """
        raise NotImplementedError


def put(pixels: Tensor, rows: Tensor, changed: Tensor) -> None:
    """Rows `changed` (n, …) in place of those of `pixels` at `rows` (n,)."""
    if pixels.device.type == "cpu":  # by NumPy up to eight times as fast
        pixels.numpy()[rows.numpy()] = changed.numpy()
    else:
        pixels.index_copy_(0, rows, changed)
