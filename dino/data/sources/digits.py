"""scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998): 8×8 grey pixels with light ink, for a first try."""

import torch
from torch import Tensor

from dino.data.sources.source import Kind, Source, packed, stamp_of


class DigitsSource(Source):
    """They come with scikit-learn, so there is nothing to download and no root."""

    def __init__(self, root: str = ""):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = torch.from_numpy((digits.images * 255 / 16).round()).to(torch.uint8)[:, None]
        self.labels = packed(str(target) for target in digits.target).dictionary_encode()
        self.names = packed(f"digit-{index:04d}" for index in range(len(self.pixels)))

    def read(self, index: int) -> Tensor:
        return self.pixels[index]

    def stamp(self) -> str:
        return stamp_of([])  # they never change


def _any_root(root: str) -> bool:
    return True


KIND = Kind(open=DigitsSource, accepts=_any_root, channels=1, fixed=True)
