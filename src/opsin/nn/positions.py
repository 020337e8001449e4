"""Position tables on a grid: learned ones resized to another grid, and the rotation of patch rows and columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.nn.rope import Rotation, from_angles


def resize_table(table: Tensor, grid: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """A square table (side * side, D) of row-major positions, resized to grid (h, w): bicubic, in float32.

    Returns (h * w, D) in the table's dtype; the table itself where the grid is its own.
    """
    side = round(table.shape[0] ** 0.5)
    if grid == (side, side):
        return table
    image = table.float().T.reshape(1, -1, side, side)
    image = F.interpolate(image, grid, mode="bicubic", align_corners=align_corners)
    return image[0].flatten(1).T.to(table.dtype)


def spread_table(table: Tensor, grid: tuple[int, int], places: Tensor) -> Tensor:
    """A square table (side * side, D) over grid (h, w): bilinear, corners on corners, in float32.

    places: (h * w, 2) row and column of each patch, in the order that patches arrive. Returns (h * w, D).
    """
    side = round(table.shape[0] ** 0.5)
    image = table.float().T.reshape(1, -1, side, side)
    image = F.interpolate(image, grid, mode="bilinear", align_corners=True)[0]
    return image[:, places[:, 0], places[:, 1]].T.to(table.dtype)


def patch_places(grid: tuple[int, int], *, block: int, device: torch.device) -> Tensor:
    """(h * w, 2) row and column of each patch, in the order that patches arrive: block by block, row-major inside."""
    h, w = grid
    rows = torch.arange(h, device=device)[:, None].expand(h, w)
    columns = torch.arange(w, device=device)[None, :].expand(h, w)
    places = torch.stack([rows, columns], dim=-1)
    places = places.view(h // block, block, w // block, block, 2).transpose(1, 2)
    return places.reshape(-1, 2)


def patch_rotation(places: Tensor, *, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Rotation of patches (Qwen2-VL): the first half of the frequencies turns by the row, the second by the column.

    places: (..., T, 2). A head of width E has E/4 frequencies 10000^(-4i/E) per axis; angles are float32.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=places.device) / (head_dim // 2)
    angles = places[..., None].float() * (1.0 / 10_000.0**exponents)
    return from_angles(angles.flatten(-2), dtype=dtype)
