"""Rows that are resampled from other rows."""

import torch

from opsin.nn.batch import RowResample
from opsin.nn.layout import resample_rows, row_table


def test_a_maximum_over_two_by_two_keeps_the_largest_of_four_rows():
    rows = torch.arange(16.0)[:, None]
    out = resample_rows(rows, RowResample(torch.arange(16), (4, 4), (2, 2), "max"))
    assert out[:, 0].tolist() == [5, 7, 13, 15]


def test_bilinear_rows_are_read_in_raster_order_from_any_row_order():
    rows = torch.arange(4.0)[:, None]
    order = torch.tensor([3, 2, 1, 0])
    out = resample_rows(rows, RowResample(order, (2, 2), (1, 1), "bilinear"))
    assert out.item() == 1.5


def test_the_newline_is_the_last_row_so_that_minus_one_finds_it():
    table = row_table(torch.zeros(3, 2), (), torch.ones(2))
    assert table[-1].tolist() == [1, 1]
    assert row_table(torch.zeros(3, 2), (), None).shape == (3, 2)
