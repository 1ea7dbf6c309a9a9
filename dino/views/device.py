"""Views made for a whole batch at once, on the device or, up to the crops, by a worker process for its one image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.data import Canvas
from dino.views.crop import Resampling, crop_batch, crop_singly, draw_boxes, resampling_of, taps_of
from dino.views.draws import Numbers
from dino.views.ops import AUGMENTATIONS, Augmentation, Draw, Prepared, Stage
from dino.views.plan import CACHED, Part, Upload, apply, apply_parts, in_one_part, in_parts_for_a_cache, to_levels
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
        """Crops by size, (V·B, C, size, size) of the canvas's type, view by view: moved, cropped, resized and flipped.

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
        plans = []
        for group, pixels in zip(self.groups, crops, strict=True):
            draws, view = draws_of(Stage.PHOTOMETRIC, group, numbers), group.views[0]
            if device.type == "cpu":
                plans.append(in_parts_for_a_cache(draws, view, upload, pixels.shape[1]))
            else:
                plans.append(in_one_part(draws, view, upload))
        upload.send(device)
        return [
            apply_parts(pixels, parts, group.views[0])
            for pixels, parts, group in zip(crops, plans, self.groups, strict=True)
        ]

    def _crop(self, canvas: Canvas, group: Group, plan: Plan) -> Tensor:
        view, on_cpu, boxes = group.views[0], canvas.pixels.device.type == "cpu", plan.boxes
        resampling = None
        if not self.singly and (plan.moves or not on_cpu):
            taps = taps_of(boxes, view.size)
            resampling = resampling_of(plan.on_device["boxes"], view.size, taps, *canvas.pixels.shape[2:])
        if plan.moves:
            most = CACHED // (4 * canvas.pixels[0].numel()) if on_cpu else len(boxes)
            crops = []
            for start in range(0, len(boxes), max(1, most)):
                rows = slice(start, start + max(1, most))
                of_rows = None if resampling is None else Resampling(*(weights[rows] for weights in resampling))
                moved = self._moved(canvas, plan, rows)
                crops.append(crop(moved, boxes[rows], view.size, of_rows, canvas.pixels.dtype))
            cropped = torch.cat(crops)
        else:
            cropped = crop(canvas.pixels, boxes, view.size, resampling, canvas.pixels.dtype)
        for part in plan.parts:
            cropped = apply(cropped, part.steps, view)
        return cropped

    def _moved(self, canvas: Canvas, plan: Plan, rows: slice) -> Tensor:
        """For some of the V·B crops an image that was moved for each: fp32, in whole levels where the canvas is."""
        images = torch.arange(len(plan.boxes), device=canvas.pixels.device)[rows] % len(canvas.pixels)
        part = Canvas(
            canvas.pixels.index_select(0, images).float(),
            canvas.background.index_select(0, images).float(),
            np.resize(canvas.sizes, (len(plan.boxes), 2))[rows],
        )
        for augmentation, draw in plan.moves:
            moved = augmentation.apply_to_images(part, {name: values[rows] for name, values in draw.items()})
            part = part._replace(pixels=moved)
        return part.pixels.round_() if canvas.pixels.dtype == torch.uint8 else part.pixels


def crop(pixels: Tensor, boxes: np.ndarray, size: int, resampling: Resampling | None, dtype: torch.dtype) -> Tensor:
    """Crops of a type, by matrix products or, where there are none, singly."""
    if resampling is None:
        return to_levels(crop_singly(pixels if pixels.dtype == dtype else to_levels(pixels, dtype), boxes, size), dtype)
    return to_levels(crop_batch(pixels.float(), resampling), dtype)


def draws_of(stage: Stage, group: Group, numbers: Numbers) -> dict[Augmentation, Draw]:
    """Augmentations of a stage that some view of a group asks for, in order, with what is drawn for them, (V·B, …)."""
    draws, of_group = {}, numbers.of(group.indices)
    for name, augmentation in AUGMENTATIONS.items():
        amount = np.array([view.amounts.get(name, 0.0) for view in group.views])[:, None]
        if augmentation.stage is stage and amount.any():
            draw = augmentation.draw(of_group, amount)
            draws[augmentation] = {key: values.reshape(-1, *values.shape[2:]) for key, values in draw.items()}
    return draws
