"""One picture made small.

Enters: encoded images of one row. Leaves: a JPEG whose short side is bounded, the same bytes where
they will do; or `BadImage` with a reason. Must not know: rows, files, Ray.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from pipeline.data.image import BadImage, decode, is_plain_jpeg

BACKGROUND = (255, 255, 255)  # under transparency
QUALITY = 92
JPEG_SIDE = 65_500  # the format's limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A JPEG and its sides; `is_kept`: the bytes that were given."""

    data: bytes
    width: int
    height: int
    source_short_side: int
    is_kept: bool


def fit_first(images: list[bytes | None], short_side: int) -> Fitted:
    """The first image that can be decoded, made small; else the first one's `BadImage`."""
    first: BadImage | None = None
    for data in images:
        try:
            return _fit(data, short_side)
        except BadImage as error:
            first = first or error
    raise first or BadImage("null_image")


def _fit(data: bytes | None, short_side: int) -> Fitted:
    """A picture whose short side is at most `short_side`, as JPEG.

    An upright JPEG that is small enough stays as it is, byte for byte; nothing is enlarged.
    """
    pixels = decode(data, BACKGROUND)
    assert data is not None
    height, width = pixels.shape[:2]
    shortest = min(height, width)
    is_kept = shortest <= short_side and is_plain_jpeg(data)
    if shortest > short_side:
        height, width = (round(side * short_side / shortest) for side in (height, width))
        pixels = cv2.resize(
            np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA
        )
    if not is_kept:
        if max(height, width) > JPEG_SIDE:
            raise BadImage("huge_image")
        # Drawings and letters, which come in other formats, suffer from coarse colours.
        subsampling = "420" if data[:2] == b"\xff\xd8" else "444"
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels, dtype=np.uint8),
            quality=QUALITY,
            colorspace="RGB",
            colorsubsampling=subsampling,
        )
    return Fitted(
        data=data, width=width, height=height, source_short_side=shortest, is_kept=is_kept
    )
