"""Views made for a whole batch at once, on the device or, up to the crops, by a worker process for its one image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dino.data import Canvas
from dino.views.crop import crop_batch, crop_singly, draw_boxes, taps_of
from dino.views.draws import Numbers
from dino.views.ops import AUGMENTATIONS, Augmentation, Draw, Prepared, Stage
from dino.views.plan import Part, Upload, apply, apply_parts, in_one_part, in_parts_for_a_cache, to_bytes
from dino.views.view import Group, MultiCrop


class Plan(NamedTuple):
    """What makes the crops of one size: boxes on host and device, changes of images before and of crops after."""

    boxes: np.ndarray
    on_device: Prepared
    moves: list[tuple[Augmentation, Prepared]]
    parts: list[Part]


class DeviceViews:
    """All views of a batch of images, as a function of one key an image.

    Args:
        singly: crop image by image with torch's kernel for bytes, as is best for one image on a CPU; otherwise only
            where images on a CPU are not moved before.
    """

    def __init__(self, spec: MultiCrop, singly: bool = False):
        self.views, self.groups, self.singly = spec.views, spec.groups, singly

    def crop(self, canvas: Canvas, keys: np.ndarray) -> list[Tensor]:
        """Crops by size, (V·B, C, size, size) uint8, view by view: moved, cropped, resized and flipped.

        Args:
            canvas: B images.
            keys: (B,) uint64, one an image; see `dino.views.draws.sample_key`.
        """
        numbers, upload = Numbers(keys, range(len(self.views))), Upload()
        boxes = draw_boxes(numbers, self.views, canvas.sizes)
        plans = []
        for group in self.groups:
            sizes = {"sizes": np.tile(canvas.sizes, (len(group.views), 1))}
            moves = []
            for augmentation, draw in draws_of(Stage.IMAGE, group, numbers).items():
                moves.append((augmentation, upload.add(augmentation.prepare(draw | sizes, group.views[0]))))
            parts = in_one_part(draws_of(Stage.CROP, group, numbers), group.views[0], upload)
            of_group = boxes[group.indices.start : group.indices.stop].reshape(-1, 4)
            plans.append(Plan(of_group, upload.add({"boxes": of_group.astype(float)}), moves, parts))
        upload.send(canvas.pixels.device)
        return [self._crop(canvas, group, plan) for group, plan in zip(self.groups, plans, strict=True)]

    def photometric(self, crops: Sequence[Tensor], keys: np.ndarray) -> list[Tensor]:
        """Photometric augmentation of crops by size, as `crop` makes them of the same keys; they are left alone."""
        numbers, upload, device = Numbers(keys, range(len(self.views))), Upload(), crops[0].device
        in_parts = in_parts_for_a_cache if device.type == "cpu" else in_one_part
        plans = []
        for group in self.groups:
            plans.append(in_parts(draws_of(Stage.PHOTOMETRIC, group, numbers), group.views[0], upload))
        upload.send(device)
        return [
            apply_parts(pixels, parts, group.views[0])
            for pixels, parts, group in zip(crops, plans, self.groups, strict=True)
        ]

    def _crop(self, canvas: Canvas, group: Group, plan: Plan) -> Tensor:
        view = group.views[0]
        pixels = move(canvas, plan.moves, len(group.views)) if plan.moves else canvas.pixels
        if self.singly or (pixels.device.type == "cpu" and not plan.moves):
            crops = crop_singly(to_bytes(pixels), plan.boxes, view.size)
        else:
            taps = taps_of(plan.boxes, view.size)
            crops = to_bytes(crop_batch(pixels.float(), plan.on_device["boxes"], view.size, taps))
        for part in plan.parts:
            crops = apply(crops, part.steps, view)
        return crops


def draws_of(stage: Stage, group: Group, numbers: Numbers) -> dict[Augmentation, Draw]:
    """Augmentations of a stage that some view of a group asks for, in order, with what is drawn for them, (V·B, …)."""
    draws, of_group = {}, numbers.of(group.indices)
    for name, augmentation in AUGMENTATIONS.items():
        amount = np.array([view.amounts.get(name, 0.0) for view in group.views])[:, None]
        if augmentation.stage is stage and amount.any():
            draw = augmentation.draw(of_group, amount)
            draws[augmentation] = {key: values.reshape(-1, *values.shape[2:]) for key, values in draw.items()}
    return draws


def move(canvas: Canvas, moves: Sequence[tuple[Augmentation, Prepared]], views: int) -> Tensor:
    """B images, changed as drawn for each view: (V·B, C, H, W) fp32, view by view, in whole levels."""
    canvas = Canvas(
        pixels=canvas.pixels.float().repeat(views, 1, 1, 1),
        background=canvas.background.float().repeat(views, 1),
        sizes=np.tile(canvas.sizes, (views, 1)),
    )
    for augmentation, draw in moves:
        canvas = canvas._replace(pixels=augmentation.apply_to_images(canvas, draw))
    return canvas.pixels.round_()
