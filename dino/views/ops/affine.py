"""Small affine changes: rotate, shear, shift and scale whole images before they are cropped.

| number | decides, at strength 1 |
|---|---|
| angle | rotation, uniform within ±10° |
| shear | uniform within ±10° |
| shift × 2 | down and right, uniform within ±5 % of height and width |
| zoom | factor, uniform between 0.9 and 1.1 |
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data import Canvas
from dino.views.draws import Numbers, between
from dino.views.ops.augmentation import Augmentation, Draw, Prepared, Stage
from dino.views.view import View


class Affine(Augmentation):
    """Amount: strength, by which all changes are multiplied."""

    name = "affine"
    stage = Stage.IMAGE
    limit = 4.0

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return {
            "angle": amount * np.radians(between(numbers["angle"], -10, 10)),
            "shear": amount * np.radians(between(numbers["shear"], -10, 10)),
            "shift": amount[..., None] * between(numbers["shift"], -0.05, 0.05),
            "zoom": 1 + amount * between(numbers["zoom"], -0.1, 0.1),
        }

    def prepare(self, draw: Draw, view: View) -> Draw:
        """`inverse`: from a point in the result, (x, y), to its source. Images are sheared, rotated, then scaled."""
        sine, cosine, slope = np.sin(draw["angle"]), np.cos(draw["angle"]), np.tan(draw["shear"])
        rows = [[cosine - slope * sine, sine + slope * cosine], [-sine, cosine]]
        inverse = (np.array(rows) / draw["zoom"]).transpose(2, 0, 1)
        return {"inverse": inverse, "centre": draw["sizes"] / 2, "shift": 2 * draw["shift"]}

    def apply_to_images(self, canvas: Canvas, draw: Prepared) -> Tensor:
        """About the images' centres, bilinear; what comes in is background."""
        pixels, background = canvas.pixels, canvas.background[:, :, None, None]
        device, (height, width) = pixels.device, pixels.shape[-2:]
        xx, xy, yx, yy = draw["inverse"].flatten(1).mT
        (centre_y, centre_x), (shift_y, shift_x) = draw["centre"].mT, draw["shift"].mT
        rows = torch.arange(height, device=device) + 0.5 - (centre_y * (1 + shift_y))[:, None]  # (n, H)
        columns = torch.arange(width, device=device) + 0.5 - (centre_x * (1 + shift_x))[:, None]
        grid = torch.empty(2, len(rows), height, width, device=device)  # in −1 … 1 over the canvas
        along, across = xx[:, None] * columns, xy[:, None] * rows + centre_x[:, None]
        torch.add((2 / width) * along[:, None, :], (2 / width) * across[:, :, None] - 1, out=grid[0])
        along, across = yx[:, None] * columns, yy[:, None] * rows + centre_y[:, None]
        torch.add((2 / height) * along[:, None, :], (2 / height) * across[:, :, None] - 1, out=grid[1])
        # Moved as the difference from the background: a fill by zeros would leave a dark seam where the image ends.
        difference = pixels.sub_(background)
        points = grid.permute(1, 2, 3, 0)
        moved = F.grid_sample(difference, points, mode="bilinear", padding_mode="zeros", align_corners=False)
        return moved.add_(background)
