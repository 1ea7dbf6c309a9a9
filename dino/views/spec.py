"""What a view is: crop and augmentation by specification, and the published presets."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class View:
    """One kind of crop: how it is cut, and with which probability each augmentation is applied to it.

    Attributes:
        size: side in pixels after the crop has been resized.
        scale: least and greatest share of the image's area.
        flip: probability of a left-right flip.
        jitter: probability of colour jitter: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1.
        grey: probability of dropping colour.
        blur: probability of a Gaussian blur, sigma drawn from `blur_sigma`.
        blur_kernel: side of the blur's kernel in pixels, odd.
        solarize: probability of inverting pixels of 128 and above.
        affine: strength of small affine changes before the crop; at 1 rotate by up to 10°, shear by up to 10°, shift by
            up to 5 % and scale by up to 10 %.
        stroke: greatest change of stroke width, as the share of one pixel added to or taken from each side of a line.
    """

    size: int
    scale: tuple[float, float]
    flip: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 9
    solarize: float = 0.0
    affine: float = 0.0
    stroke: float = 0.0


@dataclass(frozen=True)
class MultiCrop:
    """The views of one image, in order; the first `len(globals_)` of them are what the teacher sees."""

    globals_: tuple[View, ...]
    locals_: tuple[View, ...]

    @property
    def views(self) -> tuple[View, ...]:
        """All of them, in order."""
        return self.globals_ + self.locals_


def multi_crop(
    preset: str,
    global_size: int,
    global_scale: tuple[float, float],
    local_size: int,
    local_scale: tuple[float, float],
    local_crops: int,
    inverted_blur: bool = False,
    affine: float | None = None,
    stroke: float | None = None,
) -> MultiCrop:
    """Two global crops and `local_crops` local ones with a preset's augmentations.

    Args:
        preset: `dino` (Caron et al. 2021, main_dino.py), `dinov2` (Oquab et al. 2023, augmentations.py), or `line_art`
            for handwriting and drawings: no colour, no flips, small affine changes, strokes of varying width.
        inverted_blur: use the blur probabilities 0, 0.9 and 0.5 (first global, second global, local crops), with which
            DINOv2's released weights were in effect trained because its transform took p for 1 − p, instead of the
            published 1.0, 0.1 and 0.5 (dinov2 PR 342, dinov3 issue 286).
        affine, stroke: instead of the preset's (1 and 0.5 for `line_art`, else 0).
    """
    if preset == "line_art":
        first = second = local = View(global_size, global_scale, affine=1.0, stroke=0.5)
    else:
        # DINO blurs with PIL, whose kernel is as wide as sigma asks; DINOv2 with 9 pixels. 13 hold three sigma of 2.
        kernel = 9 if preset == "dinov2" else 13
        common = View(global_size, global_scale, flip=0.5, jitter=0.8, grey=0.2, blur_kernel=kernel)
        blur = (0.0, 0.9, 0.5) if inverted_blur else (1.0, 0.1, 0.5)
        first = replace(common, blur=blur[0])
        second = replace(common, blur=blur[1], solarize=0.2)
        local = replace(common, blur=blur[2])
    local = replace(local, size=local_size, scale=local_scale)
    if affine is not None:
        first, second, local = (replace(view, affine=affine) for view in (first, second, local))
    if stroke is not None:
        first, second, local = (replace(view, stroke=stroke) for view in (first, second, local))
    return MultiCrop(globals_=(first, second), locals_=(local,) * local_crops)


def view_spec(views):
    return multi_crop(
        views.preset,
        views.global_size,
        (views.global_scale[0], views.global_scale[1]),
        views.local_size,
        (views.local_scale[0], views.local_scale[1]),
        views.local_crops,
        views.inverted_blur,
        views.affine,
        views.stroke,
    )
