"""In which order a picture is resampled: along lines and along columns, with rounding to 8 bits in between."""

from opsin.spec.plan import Size


def begins_with_columns(size: Size, new_size: Size, *, pillow: int) -> bool:
    """Whether Pillow resamples along columns before it resamples along lines.

    pillow: major version. Until 12 it always begins with lines. Version 13 begins with columns where that leaves much
    less to do: where more lines go than twice the columns (measured: tests/media/test_resize.py holds it to the
    installed Pillow). Clipped pixels of the two orders differ by up to 24 levels.
    """
    (width, height), (new_width, new_height) = size, new_size
    return pillow >= 13 and height - new_height > max(0, 2 * (width - new_width))
