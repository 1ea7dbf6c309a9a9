"""Turns by 90°, 180° or 270°, for images that have no upright: satellites, microscopes, plots seen from above.

| number | decides |
|---|---|
| rotate | whether |
| turns | by how many quarters of a circle, each of the three as likely |
"""

import numpy as np
from torch import Tensor

from dino.views.draws import Numbers
from dino.views.ops.augmentation import Augmentation, Draw, Prepared, Stage, put
from dino.views.view import View


class Rotate(Augmentation):
    """Amount: probability; at 0.75 all four directions are as likely."""

    name = "rotate"
    stage = Stage.CROP

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return super().draw(numbers, amount) | {"turns": 1 + (3 * numbers["turns"]).astype(int)}

    def prepare(self, draw: Draw, view: View) -> Draw:
        rows = {turns: np.flatnonzero(draw["turns"] == turns) for turns in (1, 2, 3)}
        return {f"rows {turns}": of_turns for turns, of_turns in rows.items() if len(of_turns)}

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        for turns in (1, 2, 3):
            rows = draw.get(f"rows {turns}")
            if rows is not None:
                put(pixels, rows, pixels.index_select(0, rows).rot90(turns, dims=(2, 3)))
        return pixels
