"""Views made for a whole batch at once, on the device or, up to the crops, by a worker process for its one image."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dino.data import Canvas
from dino.views.crop import crop_batch, crop_singly, draw_boxes
from dino.views.draws import Numbers
from dino.views.ops import AUGMENTATIONS, Augmentation, Draw, Stage
from dino.views.view import Group, MultiCrop, View


class DeviceViews:
    """All views of a batch of images, as a function of one key an image.

    Args:
        singly: crop image by image with torch's kernel for bytes, as is best for one image on a CPU; otherwise only
            where images on a CPU are not moved before.
    """

    def __init__(self, spec: MultiCrop, singly: bool = False):
        self.groups, self.singly = spec.groups, singly

    def crop(self, canvas: Canvas, keys: np.ndarray) -> list[Tensor]:
        """Crops by size, (V·B, C, size, size) uint8, view by view: moved, cropped, resized and flipped.

        Args:
            canvas: B images.
            keys: (B,) uint64, one an image; see `dino.views.draws.sample_key`.
        """
        return [self._crop(canvas, group, Numbers(keys, group.indices)) for group in self.groups]

    def photometric(self, crops: Sequence[Tensor], keys: np.ndarray) -> list[Tensor]:
        """Photometric augmentation of crops by size, as `crop` makes them of the same keys; they are left alone."""
        augmented = []
        for pixels, group in zip(crops, self.groups, strict=True):
            draws = list(draws_of(Stage.PHOTOMETRIC, group, Numbers(keys, group.indices)))
            augmented.append(to_bytes(apply(draws, pixels.float(), group.views[0])) if draws else pixels)
        return augmented

    def _crop(self, canvas: Canvas, group: Group, numbers: Numbers) -> Tensor:
        view = group.views[0]
        boxes = draw_boxes(numbers, group.views, canvas.sizes).reshape(-1, 4)
        moves = list(draws_of(Stage.IMAGE, group, numbers))
        pixels = move(canvas, moves, len(group.views)) if moves else canvas.pixels
        if self.singly or (pixels.device.type == "cpu" and not moves):
            crops = crop_singly(to_bytes(pixels), boxes, view.size)
        else:
            crops = to_bytes(crop_batch(pixels.float(), boxes, view.size))
        return apply(draws_of(Stage.CROP, group, numbers), crops, view)


def draws_of(stage: Stage, group: Group, numbers: Numbers) -> Iterator[tuple[Augmentation, Draw]]:
    """Augmentations of a stage that some view of a group asks for, in order, with what is drawn for them, (V·B, …)."""
    for name, augmentation in AUGMENTATIONS.items():
        amount = np.array([view.amounts.get(name, 0.0) for view in group.views])[:, None]
        if augmentation.stage is stage and amount.any():
            draw = augmentation.draw(numbers, amount)
            yield augmentation, {key: values.reshape(-1, *values.shape[2:]) for key, values in draw.items()}


def move(canvas: Canvas, moves: Sequence[tuple[Augmentation, Draw]], views: int) -> Tensor:
    """B images, changed as drawn for each view: (V·B, C, H, W) fp32, view by view, in whole levels."""
    canvas = Canvas(
        pixels=canvas.pixels.float().repeat(views, 1, 1, 1),
        background=canvas.background.float().repeat(views, 1),
        sizes=np.tile(canvas.sizes, (views, 1)),
    )
    for augmentation, draw in moves:
        canvas = canvas._replace(pixels=augmentation.apply_to_images(canvas, draw))
    return canvas.pixels.round_()


def apply(draws: Iterable[tuple[Augmentation, Draw]], pixels: Tensor, view: View) -> Tensor:
    """Crops (n, C, size, size), overwritten, with each augmentation done to those for which it was drawn."""
    for augmentation, draw in draws:
        indices = np.flatnonzero(draw["applied"])
        if len(indices):
            rows = torch.from_numpy(indices).to(pixels.device)
            selected = {name: values[indices] for name, values in draw.items()}
            pixels = pixels.index_copy_(0, rows, augmentation.apply(pixels[rows], selected, view))
    return pixels


def to_bytes(pixels: Tensor) -> Tensor:
    """Levels to the nearest ones of uint8."""
    return pixels if pixels.dtype == torch.uint8 else pixels.round_().clamp_(0, 255).to(torch.uint8)
