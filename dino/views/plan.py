"""Which crops are changed together, and how: worked out on the host, where it was drawn, and moved in one copy.

A GPU changes all crops of a size at once. A CPU takes as many as its cache holds, and those together with which
the same is done: they are then changed in place, and only what that takes is computed.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.views.ops import Augmentation, Draw, Prepared
from dino.views.ops.augmentation import put
from dino.views.view import View

CACHED = 2**19  # values that a CPU takes at once: more makes fewer and longer steps, but none in its cache
LEAST = 2**16  # values for which it is worth to start a step of their own


class Upload:
    """Arrays on their way to a device, all in one copy; what `add` gives is filled by `send`."""

    def __init__(self) -> None:
        self.waiting: list[Prepared] = []

    def add(self, arrays: Draw) -> Prepared:
        """Tensors of the same names, fractions in fp32, once they are sent."""
        tensors: Prepared = {}
        for name, values in arrays.items():
            narrow = np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else np.int64)
            tensors[name] = torch.from_numpy(narrow)
        self.waiting.append(tensors)
        return tensors

    def send(self, device: torch.device) -> None:
        """On a GPU nothing waits for it: the copy is from pinned memory."""
        if device.type == "cpu":
            return
        flat = [tensor for tensors in self.waiting for tensor in tensors.values()]
        size = sum(aligned(tensor.nbytes) for tensor in flat)
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        content, start = packed.numpy(), 0
        for tensor in flat:
            content[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
            start += aligned(tensor.nbytes)
        moved, start = packed.to(device, non_blocking=True), 0
        for tensors in self.waiting:
            for name, tensor in tensors.items():
                tensors[name] = moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                start += aligned(tensor.nbytes)


def aligned(size: int) -> int:
    """Bytes up to where numbers of 64 bits may begin."""
    return -(-size // 8) * 8


class Step(NamedTuple):
    """An augmentation of some crops of a part: of a slice of them, or of those that `draw["rows"]` names."""

    augmentation: Augmentation
    rows: slice | None
    draw: Prepared


class Part(NamedTuple):
    """Crops that are changed together: where among all of a size they are (None: these are all), and what is done."""

    rows: np.ndarray | None
    steps: list[Step]


Draws = Mapping[Augmentation, Draw]  # in order, each (n, …), all with `applied`


def in_one_part(draws: Draws, view: View, upload: Upload) -> list[Part]:
    """All crops of a size at once."""
    steps = []
    for augmentation, draw in draws.items():
        rows = np.flatnonzero(draw["applied"])
        if len(rows):
            selected = {name: values[rows] for name, values in draw.items()}
            steps.append(_step(augmentation, selected, rows, view, upload))
    return [Part(None, steps)] if steps else []


def in_parts_for_a_cache(draws: Draws, view: View, upload: Upload, channels: int) -> list[Part]:
    """Those crops of a size that are changed at all."""
    if not draws:
        return []
    kinds = np.stack([augmentation.kinds(draw, view) for augmentation, draw in draws.items()])
    by_variety = np.argsort(kinds.max(axis=1), kind="stable")
    order = np.lexsort(kinds[by_variety])
    order = order[kinds[:, order].any(axis=0)]
    values, parts = channels * view.size**2, []
    for alike in runs(order, kinds[by_variety[-1], order], LEAST // values):
        for rows in np.split(alike, range(max(1, CACHED // values), len(alike), max(1, CACHED // values))):
            steps = []
            for (augmentation, draw), of_rows in zip(draws.items(), kinds[:, rows], strict=True):
                changed = np.argsort(of_rows, kind="stable")
                changed = changed[of_rows[changed] > 0]
                for same in runs(changed, of_rows[changed], LEAST // values):
                    selected = {name: numbers[rows[same]] for name, numbers in draw.items()}
                    steps.append(_step(augmentation, selected, same, view, upload))
            parts.append(Part(rows, steps))
    return parts


def runs(rows: np.ndarray, kinds: np.ndarray, least: int) -> list[np.ndarray]:
    """Rows by their kind, which is sorted; kinds of less than `least` rows together with the next ones."""
    if len(rows) == 0:
        return []
    cuts = [0]
    for end in (np.flatnonzero(np.diff(kinds)) + 1).tolist():
        if end - cuts[-1] >= least:
            cuts.append(end)
    return [np.sort(run) for run in np.split(rows, cuts[1:])]


def _step(augmentation: Augmentation, draw: Draw, rows: np.ndarray, view: View, upload: Upload) -> Step:
    prepared = augmentation.prepare({name: values for name, values in draw.items() if name != "applied"}, view)
    if rows[-1] - rows[0] < len(rows):
        return Step(augmentation, slice(int(rows[0]), int(rows[-1]) + 1), upload.add(prepared))
    return Step(augmentation, None, upload.add({**prepared, "rows": rows}))


def apply(pixels: Tensor, steps: Iterable[Step], view: View) -> Tensor:
    """Crops (n, C, size, size), overwritten, with each step done."""
    for augmentation, rows, draw in steps:
        if rows is None:
            selected = pixels.index_select(0, draw["rows"])
            put(pixels, draw["rows"], augmentation.apply(selected, draw, view))
        else:
            selected = pixels[rows]
            changed = augmentation.apply(selected, draw, view)
            if len(selected) == len(pixels) and changed.is_contiguous():
                pixels = changed
            elif changed is not selected:
                selected.copy_(changed)
    return pixels


def apply_parts(pixels: Tensor, parts: Iterable[Part], view: View) -> Tensor:
    """Crops (n, C, size, size) with each part changed in fp32; `pixels` are left alone, and so is their type."""
    changed = pixels
    for rows, steps in parts:
        if rows is None:
            return to_levels(apply(pixels.to(torch.float32, copy=True), steps, view), pixels.dtype)
        changed = pixels.clone() if changed is pixels else changed
        indices = torch.from_numpy(rows)
        put(changed, indices, to_levels(apply(pixels.index_select(0, indices).float(), steps, view), pixels.dtype))
    return changed


def to_levels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels, which are overwritten, within 0 … 255: to the nearest ones of uint8, or in fp32 as they are."""
    if dtype != torch.uint8:
        return pixels.clamp_(0, 255)
    if pixels.dtype == torch.uint8:
        return pixels
    levels = pixels.round_().clamp_(0, 255)
    if levels.device.type == "cpu":  # by NumPy six times as fast
        return torch.from_numpy(levels.numpy().astype(np.uint8))
    return levels.to(torch.uint8)
