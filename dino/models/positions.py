"""How a ViT knows where a patch lies: a learned table that is added to patches, or rotations of queries and keys.

A kind of positions has no parameters of its own: a learned table belongs to the ViT, which keeps it under the name that
published files have for it. B images, N patches, D width, d width of a head.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns of patches
Interpolation = Literal["offset", "size"]


class Positions(Protocol):
    """One kind of positions: a class here, and a line in `dino.models.vit.VisionTransformer`.

    Attributes:
        rotates: whether `rotate` does anything.
    """

    rotates: ClassVar[bool]

    def table(self, width: int) -> nn.Parameter | None:
        """The parameter that it learns, if it learns one."""

    def add(self, table: Tensor | None, class_token: Tensor, patches: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Class token (1, 1, D) and patches (B, N, D) with their positions."""

    def rotate(self, query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Query and key, each (B, heads, length, d), turned by position; the last N tokens are the patches."""


@dataclass(frozen=True)
class LearnedPositions:
    """A table of one vector for the class token and one for each patch of a square grid (Dosovitskiy et al. 2021).

    Attributes:
        side: rows and columns of the table's own grid.
        interpolation: how it is resampled to another; see `interpolate_positions`.
    """

    rotates: ClassVar[bool] = False
    side: int
    interpolation: Interpolation

    def table(self, width: int) -> nn.Parameter:
        """(1, 1+side², D) zeros."""
        return nn.Parameter(torch.zeros(1, 1 + self.side**2, width))

    def add(self, table: Tensor | None, class_token: Tensor, patches: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Each token and its vector."""
        assert table is not None
        positions = interpolate_positions(table, grid, self.interpolation)
        return class_token + positions[:, :1], patches + positions[:, 1:]

    def rotate(self, query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """As they are."""
        return query, key


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary embedding (Su et al. 2021) along both axes: what attention sees of two patches' positions is their offset.

    Half of a head's channel pairs turn with the row and half with the column. Rows and columns run from -1 to 1
    whatever their number, so that a patch keeps its angle when the same image comes at another resolution. Class token
    and registers are not turned.

    Attributes:
        base: the slowest pair turns nearly this many times more slowly than the fastest, whose period is 1.
    """

    rotates: ClassVar[bool] = True
    base: float = 100.0

    def table(self, width: int) -> None:
        """Nothing is learned."""

    def add(self, table: Tensor | None, class_token: Tensor, patches: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """As they are."""
        return class_token, patches

    def rotate(self, query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The last rows·columns tokens turned by the angles of their patches."""
        angles = self.angles(grid, query.shape[-1], query.device)
        return _turned(query, angles), _turned(key, angles)

    def angles(self, grid: Grid, head_width: int, device: torch.device | None = None) -> Tensor:
        """(rows·columns, d/2) in fp32: the angle of each channel pair of each patch, in row order."""
        rows, columns = grid
        pairs = head_width // 4  # of each axis
        frequencies = 2 * math.pi * self.base ** (-torch.arange(pairs, device=device) / pairs)
        by_row = _centres(rows, device)[:, None] * frequencies
        by_column = _centres(columns, device)[:, None] * frequencies
        both = [by_row[:, None].expand(-1, columns, -1), by_column[None].expand(rows, -1, -1)]
        return torch.cat(both, dim=-1).flatten(0, 1)


def _centres(cells: int, device: torch.device | None) -> Tensor:
    """(cells,) the centres of as many equal parts of [-1, 1]."""
    return (torch.arange(cells, device=device) + 0.5) / cells * 2 - 1


def _turned(tokens: Tensor, angles: Tensor) -> Tensor:
    """(B, heads, length, d) with the last N tokens turned by `angles` (N, d/2); channels i and i + d/2 are a pair."""
    patches_start = tokens.shape[2] - angles.shape[0]
    prefix, patches = tokens[:, :, :patches_start], tokens[:, :, patches_start:]
    first, second = patches.to(torch.promote_types(patches.dtype, torch.float32)).chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return torch.cat([prefix, turned.to(tokens.dtype)], dim=2)


def interpolate_positions(table: Tensor, grid: Grid, convention: Interpolation) -> Tensor:
    """Resample a square position table to another grid of patches, in fp32.

    Args:
        table: (1, 1+M², D), the class token's position first.
        grid: rows and columns of patches.
        convention: `offset` multiplies by (grid + 0.1) / M without antialiasing, which is what DINO's and DINOv2's
            plain releases were used with; `size` asks for the exact grid with antialiasing, as the register releases.

    Returns:
        (1, 1+rows·columns, D), `table` itself if the grid is its own.
    """
    side = math.isqrt(int(table.shape[1]) - 1)  # in a trace, shapes are tensors
    if grid == (side, side):
        return table
    positions = rearrange(table[:, 1:].float(), "b (h w) d -> b d h w", h=side)
    if convention == "offset":
        factors = [(int(cells) + 0.1) / side for cells in grid]
        positions = F.interpolate(positions, scale_factor=factors, mode="bicubic")
    else:
        positions = F.interpolate(positions, size=grid, mode="bicubic", antialias=True)
    if positions.shape[-2:] != grid:
        raise ValueError(f"positions came out as {tuple(positions.shape[-2:])}, not {grid}")
    positions = rearrange(positions, "b d h w -> b (h w) d").to(table.dtype)
    return torch.cat([table[:, :1], positions], dim=1)
