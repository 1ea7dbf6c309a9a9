"""The views that a config's `views` describe: the published presets, and what settings change of them."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dino.config.schema import CHOICES, ViewsConfig
from dino.views.ops import AUGMENTATIONS
from dino.views.view import MultiCrop, View


@dataclass(frozen=True)
class Preset:
    """Amounts of augmentations, by name, of the first and second global crop and of local crops.

    Attributes:
        blur_kernel: in pixels.
        jitter: which of the kinds of `dino.views.ops` is meant by jitter.
    """

    first: Mapping[str, float]
    second: Mapping[str, float]
    local: Mapping[str, float]
    blur_kernel: int = 9
    jitter: str = "jitter"


COLOURS = {"flip": 0.5, "jitter": 0.8, "grey": 0.2}
FIRST, SECOND, LOCAL = {**COLOURS, "blur": 1.0}, {**COLOURS, "blur": 0.1, "solarize": 0.2}, {**COLOURS, "blur": 0.5}
LINES = {"affine": 1.0, "stroke": 0.5}
PRESETS = {
    # Caron et al. 2021, main_dino.py: PIL's blur is as wide as sigma asks; 13 pixels hold three sigma of 2.
    "dino": Preset(FIRST, SECOND, LOCAL, blur_kernel=13),
    # Oquab et al. 2023, augmentations.py
    "dinov2": Preset(FIRST, SECOND, LOCAL),
    # Grill et al. 2020, table 6, which DINO took over; without local crops.
    "byol": Preset(FIRST, SECOND, LOCAL, blur_kernel=23),
    # Chen et al. 2020, appendix A; SwAV's too, for crops of all sizes (Caron et al. 2020, appendix A).
    "simclr": Preset(LOCAL, LOCAL, LOCAL, blur_kernel=23, jitter="jitter_strong"),
    "swav": Preset(LOCAL, LOCAL, LOCAL, blur_kernel=23, jitter="jitter_strong"),
    # Chen, Fan, Girshick & He 2020, §3: MoCo's colours, and SimCLR's blur.
    "moco_v2": Preset(LOCAL, LOCAL, LOCAL, blur_kernel=23, jitter="jitter_moco"),
    # Handwriting and drawings: no colour, no flips, small affine changes, strokes of varying width.
    "line_art": Preset(LINES, LINES, LINES),
}
CHOICES["views.preset"] = PRESETS
# With these DINOv2's released weights were in effect trained: its transform took p for 1 − p (dinov2 PR 342, dinov3
# issue 286).
INVERTED_BLUR = (0.0, 0.9, 0.5)


def view_spec(views: ViewsConfig) -> MultiCrop:
    """Two global crops and `local_crops` local ones, with a preset's augmentations but for what `views` sets."""
    preset, changes = PRESETS[views.preset], _changes(views)
    amounts = [{**of_preset, **changes} for of_preset in (preset.first, preset.second, preset.local)]
    if views.inverted_blur and "blur" not in changes:
        for of_view, blur in zip(amounts, INVERTED_BLUR, strict=True):
            if "blur" in of_view:
                of_view["blur"] = blur
    for of_view in amounts:
        if "jitter" in of_view:
            of_view[preset.jitter] = of_view.pop("jitter")
    global_scale = (views.global_scale[0], views.global_scale[1])
    local_scale = (views.local_scale[0], views.local_scale[1])
    first = View(views.global_size, global_scale, amounts[0], preset.blur_kernel)
    second = View(views.global_size, global_scale, amounts[1], preset.blur_kernel)
    local = View(views.local_size, local_scale, amounts[2], preset.blur_kernel)
    return MultiCrop((first, second), (local,) * views.local_crops)


def _changes(views: ViewsConfig) -> dict[str, float]:
    """Amounts that settings give instead of the preset's; `views.augment` has the last word."""
    own = {name: getattr(views, name, None) for name in AUGMENTATIONS}  # those that have a setting of their own
    return {name: amount for name, amount in own.items() if amount is not None} | views.augment


def problems_of_views(views: ViewsConfig) -> Iterator[str]:
    """What is wrong with `views.augment`: names of no augmentation, with the nearest one, and amounts out of range."""
    for name, amount in views.augment.items():
        if name not in AUGMENTATIONS:
            nearest = difflib.get_close_matches(name, AUGMENTATIONS, n=1, cutoff=0.0)[0]
            known = ", ".join(AUGMENTATIONS)
            yield f"views.augment: '{name}' is none of the augmentations {known}; did you mean '{nearest}'?"
        elif not 0 <= amount <= AUGMENTATIONS[name].limit:
            yield f"views.augment: {name} must lie between 0 and {AUGMENTATIONS[name].limit:g}, got {amount:g}"
