"""Images, keys and specifications that the tests of views share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import ViewsConfig
from dino.data import Canvas, UnreadableImage
from dino.data.levels import AS_BYTES
from dino.data.resident import border_colour
from dino.views import DeviceViews, MultiCrop, View, view_spec
from dino.views.device import draws_of
from dino.views.draws import Numbers, sample_key
from dino.views.ops import AUGMENTATIONS, Draw, Stage
from dino.views.plan import Upload
from dino.views.view import Group

PRESETS = ("dino", "dinov2", "line_art")
STILL = {"angle": 0.0, "shear": 0.0, "shift": (0.0, 0.0), "zoom": 1.0}  # nothing moves
EVERYTHING = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarize": 0.2, "affine": 1.0, "stroke": 0.5}
EVERYTHING |= {"vertical_flip": 0.5, "rotate": 0.75}


def preset(name: str, **settings) -> MultiCrop:
    """A preset at small sizes with the published scales of DINO."""
    return view_spec(ViewsConfig(**{"preset": name, "global_size": 24, "local_size": 12, "local_crops": 3} | settings))


def plain(size: int, **amounts: float) -> View:
    """All of a square image with nothing done to it but `amounts`."""
    return View(size, (1.0, 1.0), amounts)


def only(view: View, count: int = 1) -> MultiCrop:
    return MultiCrop((view,) * count, ())


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    """The keys of the first images of an epoch."""
    return np.array([sample_key(seed, 0, index) for index in range(count)], dtype=np.uint64)


def noise(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    """Independent pixels, uint8: what rounding and interpolation change most."""
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


RAGGED = [noise(3, height, width, seed=height) for height, width in [(20, 24), (33, 12), (4, 5), (60, 60), (9, 41)]]


def canvas_of(images: Sequence[Tensor]) -> Canvas:
    """Images of any sizes in the top left corner of canvases of one size, with their border's median around them."""
    sizes = np.array([image.shape[1:] for image in images])
    background = torch.stack([border_colour(image) for image in images])
    pixels = background[:, :, None, None].repeat(1, 1, *sizes.max(axis=0).tolist())
    for target, image, (height, width) in zip(pixels, images, sizes, strict=True):
        target[:, :height, :width] = image
    return Canvas(pixels, background, sizes)


def views_of(spec: MultiCrop, images: Sequence[Tensor], keys: np.ndarray) -> list[Tensor]:
    """Whole views by size, as the device makes them."""
    ours = DeviceViews(spec)
    return ours.photometric(ours.crop(canvas_of(images), keys), keys)


def drawn(views: Sequence[View], keys: np.ndarray) -> dict[str, Draw]:
    """What every augmentation that some view asks for draws for all of them: by its name, each (V·B, …)."""
    group, draws = Group(range(len(views)), tuple(views)), {}
    for stage in Stage:
        draws |= {op.name: draw for op, draw in draws_of(stage, group, Numbers(keys, group.indices)).items()}
    return draws


def move(images: Sequence[Tensor], **changes: Sequence) -> Tensor:
    """Affine changes of images, nothing but `changes`: (n, C, H, W) fp32."""
    canvas = canvas_of(images)
    canvas = Canvas(canvas.pixels.float(), canvas.background.float(), canvas.sizes)
    draw = {name: np.array([value] * len(images)) for name, value in STILL.items()} | {"sizes": canvas.sizes}
    draw |= {name: np.array(values) for name, values in changes.items()}
    return AUGMENTATIONS["affine"].apply_to_images(canvas, prepared("affine", draw, plain(8)))


def change(name: str, images: Tensor, **draw: Sequence) -> Tensor:
    """Crops (n, C, S, S) uint8 changed by one augmentation as drawn: fp32, not rounded."""
    view = View(images.shape[-1], (1.0, 1.0), {}, blur_kernel=13)
    draw = prepared(name, {key: np.array(values) for key, values in draw.items()}, view)
    return AUGMENTATIONS[name].apply(images.float(), draw, view)


def prepared(name: str, draw: Draw, view: View) -> dict[str, Tensor]:
    """What an augmentation makes of what is drawn, as tensors."""
    upload = Upload()
    tensors = upload.add(AUGMENTATIONS[name].prepare(draw, view))
    upload.send(torch.device("cpu"))
    return tensors


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Pool:
    """Images of noise in memory; those in `unreadable` cannot be read."""

    def __init__(self, images: int = 8, shape: tuple[int, ...] = (3, 20, 24), unreadable: tuple[int, ...] = ()):
        self.pixels = noise(images, *shape)
        self.channels, self.levels = shape[0], AS_BYTES
        self.names = [str(index) for index in range(images)]
        self.unreadable = unreadable

    def read(self, index: int, enough: float | None = None) -> Tensor:
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]
