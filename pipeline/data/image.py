"""Encoded bytes -> uint8 RGB array of the model's size.

Enters: bytes of one image file. Leaves: [size, size, 3] uint8, or `BadImage` with a reason.
Must not know: Parquet, Ray, torch.
"""

import io
import warnings
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
Reason = Literal["null_image", "corrupt_image", "tiny_image", "huge_image"]

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 0.5 GiB of RGB
RATIO = (3 / 4, 4 / 3)  # aspect ratios of the random resized crop, as in CLIP trainers


class BadImage(Exception):
    """An image that cannot be used; `reason` is what is counted."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason: Reason = reason


def decode(data: bytes | None, background: tuple[int, int, int]) -> Pixels:
    """Decode an image file to [height, width, 3] RGB; transparency is laid on `background`.

    Raises `BadImage` when there are no bytes, they do not decode whole, or the picture has a side
    of one pixel or more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise BadImage("null_image")
    pixels = _decode_jpeg(data)
    if pixels is None:
        pixels = _decode_any(data, background)
    if min(pixels.shape[:2]) < 2:
        raise BadImage("tiny_image")
    return pixels


def _decode_jpeg(data: bytes) -> Pixels | None:
    """The fast path: plain RGB JPEG. None: leave it to Pillow (another format, EXIF, CMYK)."""
    if data[:2] != b"\xff\xd8" or b"Exif\x00" in data[:256]:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if int(height) * int(width) > MAX_PIXELS:
        raise BadImage("huge_image")
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        # Not Pillow's turn: it would fill the damaged part with grey and say nothing.
        raise BadImage("corrupt_image") from error


def _decode_any(data: bytes, background: tuple[int, int, int]) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage("huge_image")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                ground = Image.new("RGBA", image.size, (*background, 255))
                image = Image.alpha_composite(ground, image)
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                depth = np.asarray(image, dtype=np.float64)
                is_16_bit = image.mode.startswith("I;16") or depth.max() > 255
                scale = 255.0 / 65535.0 if is_16_bit else 1.0
                image = Image.fromarray((depth * scale).clip(0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("huge_image") from error
    except Exception as error:
        raise BadImage("corrupt_image") from error


def train_geometry(
    pixels: Pixels, size: int, scale: tuple[float, float], flip: float, rng: np.random.Generator
) -> Pixels:
    """Random resized crop (area share in `scale`, ratio 3/4 to 4/3), then a flip; [size, size, 3].

    The same sampling as torchvision's RandomResizedCrop, which CLIP trainers use: ten tries, then
    the centre crop of the nearest allowed ratio.
    """
    height, width = pixels.shape[:2]
    top, left, crop_height, crop_width = _sample_crop(height, width, scale, rng)
    pixels = pixels[top : top + crop_height, left : left + crop_width]
    if flip and rng.random() < flip:
        pixels = pixels[:, ::-1]
    return _resize(pixels, size, size)


def _sample_crop(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
        crop_width, crop_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * RATIO[1]))
    crop_height = min(height, round(width / RATIO[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def eval_geometry(pixels: Pixels, size: int) -> Pixels:
    """Cut the centre square and resize it to `size`; [size, size, 3].

    The same picture as resizing the short side and cutting then, without computing what is cut.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(pixels[top : top + side, left : left + side], size, size)


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    shrinks = pixels.shape[0] * pixels.shape[1] > height * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=method)
    return resized.astype(np.uint8, copy=False)
