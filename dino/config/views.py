"""The settings of `views`: which crops an image gives, and what is done to them."""

from dataclasses import dataclass

from dino.config.setting import Auto, setting


@dataclass
class ViewsConfig:
    preset: str = setting("dino", "augmentation as published for a method, or for handwriting (line_art)")
    global_size: int = setting(224, "side of a global crop", unit="pixels")
    global_scale: list[float] = setting(
        [0.4, 1.0], "least and greatest fraction of the image's area in a global crop", above=0, high=1
    )
    local_size: int = setting(96, "side of a local crop", unit="pixels")
    local_scale: list[float] = setting(
        [0.05, 0.4], "least and greatest fraction of the image's area in a local crop", above=0, high=1
    )
    local_crops: int = setting(8, "local crops per image; 0: global crops only", low=0)
    inverted_blur: bool = setting(
        False, "blur with the probabilities DINOv2's released weights were in effect trained with (0, 0.9, 0.5)"
    )
    flip: float | None = setting(
        None,
        "probability that a crop is mirrored left to right; none: 0 for line_art, else 0.5; 0 where left and "
        "right differ, as in chest X-rays",
        low=0,
        high=1,
    )
    vertical_flip: float | None = setting(
        None,
        "probability that a crop is turned upside down; none: 0; 0.5 for satellites, microscopes and other "
        "views from above",
        low=0,
        high=1,
    )
    rotate: float | None = setting(
        None,
        "probability that a crop is turned by 90°, 180° or 270°; none: 0; 0.75: all directions are as likely",
        low=0,
        high=1,
    )
    jitter: float | None = setting(
        None,
        "probability that brightness, contrast, saturation and hue are changed; none: 0 for line_art, else 0.8",
        low=0,
        high=1,
    )
    grey: float | None = setting(
        None,
        "probability that a colour image becomes grey; none: 0 for line_art, else 0.2; 0 where colour tells "
        "classes apart",
        low=0,
        high=1,
    )
    blur: float | None = setting(
        None,
        "probability of Gaussian blur; none: the preset's, for dino 1, 0.1 and 0.5 of first, second and local crops",
        low=0,
        high=1,
    )
    solarize: float | None = setting(
        None,
        "probability that bright pixels are inverted; none: the preset's, for dino 0.2 of the second global crop",
        low=0,
        high=1,
    )
    affine: float | None = setting(
        None,
        "strength of small rotations, shears, shifts and changes of size; none: 1 for line_art, else 0",
        low=0,
        high=4,
    )
    stroke: float | None = setting(
        None,
        "greatest change of stroke width at each side; none: 0.5 for line_art, else 0",
        low=0,
        high=4,
        unit="pixels",
    )
    augment: dict[str, float] = setting(
        {}, "amounts (probability or strength) of augmentations by name, instead of the preset's: {blur: 0.3}"
    )
    mean: Auto[list[float]] | None = setting(
        None,
        "channel means to subtract; none: ImageNet's for colour of 8 bits, 0.5 for grey of 8 bits, else as auto; auto: "
        "measured on a sample of the images",
    )
    std: Auto[list[float]] | None = setting(
        None, "channel standard deviations to divide by; none and auto: as views.mean", above=0
    )
