"""Rows made from other rows: the few layouts that resample a raster instead of only gathering from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.nn.batch import RowResample


def resample_rows(rows: Tensor, resample: RowResample) -> Tensor:
    """rows: (R, D) -> (h_out * w_out, D): bilinear without aligned corners, or 2x2 maxima (LLaVA-NeXT)."""
    raster = rows[resample.rows].T.reshape(1, rows.shape[1], *resample.grid_in)
    if resample.mode == "bilinear":
        raster = F.interpolate(raster, resample.grid_out, mode="bilinear", align_corners=False)
    else:
        raster = F.max_pool2d(raster, 2)
    return raster[0].flatten(1).T


def row_table(rows: Tensor, resamples: Sequence[RowResample], newline: Tensor | None) -> Tensor:
    """Every row that a slot can name: connector rows, resampled rows, and last the newline, which -1 finds."""
    if not resamples and newline is None:
        return rows
    extra = [resample_rows(rows, resample) for resample in resamples]
    if newline is not None:
        extra.append(newline[None].to(rows.dtype))
    return torch.cat([rows, *extra])
