"""Encoded bytes -> uint8 RGB array of the model's size.

Enters: bytes of one image file. Leaves: [size, size, 3] uint8, or `BadImage` with a reason.
The crop is chosen from the sides in the header, so that a JPEG far larger than needed can be
decoded at 1/2, 1/4 or 1/8 (the factors that save time) and still show the same crop.
Must not know: Parquet, Ray, torch.
"""

import io
import math
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Reason = Literal["null_image", "corrupt_image", "tiny_image", "huge_image"]

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 0.5 GiB of RGB
RATIO = (3 / 4, 4 / 3)  # aspect ratios of the random resized crop, as in CLIP trainers
LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
FACTORS = (8, 4, 2)  # of scaled decode; 7/8 to 3/8 exist too, and are slower than the whole
SHARP = 1.5  # shrinking by more, linear interpolation skips pixels: edges turn ragged
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSED = (5, 6, 7, 8)  # orientations that exchange the sides
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # OpenCV's code of the flip after that
MIRRORED = 2
# What Pillow may open. Not all it can: for EPS it would start a program.
FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG", "JPEG2000", "PPM", "ICO")


class BadImage(Exception):
    """An image that cannot be used; `reason` is what is counted."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason: Reason = reason


class Crop(NamedTuple):
    """A rectangle of the upright picture, in pixels of its full size."""

    top: int
    left: int
    height: int
    width: int


class RandomCrop(NamedTuple):
    """A random resized crop (area share in `scale`, ratio 3/4 to 4/3), then a flip by chance.

    The crop follows from the generator and the picture's sides alone. With `squeeze` it is one of
    the picture as a square, so that (1, 1) is the whole of any picture.
    """

    scale: tuple[float, float]
    flip: float
    rng: np.random.Generator
    squeeze: bool = False


class _JpegHeader(NamedTuple):
    """The sides as they are stored, and the EXIF orientation that says how to turn them."""

    height: int
    width: int
    is_cmyk: bool
    orientation: int


def decode(data: bytes | None, background: tuple[int, int, int]) -> Pixels:
    """Decode an image file to [height, width, 3] RGB, upright; transparency shows `background`.

    Raises `BadImage` when there are no bytes, they do not decode whole, or the picture has a side
    of one pixel or more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise BadImage("null_image")
    header = _read_jpeg_header(data)
    return _decode_any(data, background) if header is None else _decode_jpeg(data, header, 1, False)


def decode_train(
    data: bytes | None,
    background: tuple[int, int, int],
    size: int,
    crops: Sequence[RandomCrop],
) -> list[Pixels]:
    """Each crop of one picture, [size, size, 3]; the file is decoded once. Raises as `decode`."""

    def choose(crop: RandomCrop, height: int, width: int) -> Crop:
        sample = _sample_squeezed if crop.squeeze else _sample_crop
        return _on_grid(sample(height, width, crop.scale, crop.rng), size)

    views = _decode_crops(data, background, size, [partial(choose, crop) for crop in crops])
    return [
        _turn(pixels, MIRRORED) if crop.flip and crop.rng.random() < crop.flip else pixels
        for crop, pixels in zip(crops, views, strict=True)
    ]


def decode_eval(
    data: bytes | None, background: tuple[int, int, int], size: int, *, squeeze: bool = False
) -> Pixels:
    """Centre square at `size`, the picture that `eval_geometry` gives; raises as `decode` does.

    With `squeeze` the whole picture, whatever its shape.
    """
    return _decode_crops(data, background, size, [_whole if squeeze else _centre_crop])[0]


def eval_geometry(pixels: Pixels, size: int) -> Pixels:
    """Cut the centre square and resize it to `size`; [size, size, 3].

    The same picture as resizing the short side and cutting then, without computing what is cut.
    """
    return _resize(_cut(pixels, _centre_crop(*pixels.shape[:2]), 1), size)


def _decode_crops(
    data: bytes | None,
    background: tuple[int, int, int],
    size: int,
    choices: Sequence[Callable[[int, int], Crop]],
) -> list[Pixels]:
    """The crops chosen from the upright picture's (height, width), each at `size`."""
    if not data:
        raise BadImage("null_image")
    header = _read_jpeg_header(data)
    if header is None:
        pixels, factor = _decode_any(data, background), 1
        crops = [choose(*pixels.shape[:2]) for choose in choices]
    else:
        is_turned = header.orientation in TRANSPOSED
        sides = (header.width, header.height) if is_turned else (header.height, header.width)
        crops = [choose(*sides) for choose in choices]
        factor = min(_factor(header, crop, size) for crop in crops)
        is_shrunk = all(min(crop[2:]) > factor * SHARP * size for crop in crops)
        pixels = _decode_jpeg(data, header, factor, is_shrunk)
    return [_resize(_cut(pixels, crop, factor), size) for crop in crops]


# ---- geometry ------------------------------------------------------------------------------------


def _sample_crop(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> Crop:
    """The sampling of torchvision's RandomResizedCrop, which CLIP trainers use.

    Ten tries, then the centre crop of the nearest allowed ratio.
    """
    smallest, largest = scale
    narrow, broad = LOG_RATIO
    for _ in range(10):
        # Not rng.uniform and np.exp: of single numbers they take a tenth of the whole decode.
        area = height * width * (smallest + (largest - smallest) * rng.random())
        ratio = math.exp(narrow + (broad - narrow) * rng.random())
        crop_width, crop_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width)
    crop_width = min(width, round(height * RATIO[1]))
    crop_height = min(height, round(width / RATIO[0]))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def _sample_squeezed(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> Crop:
    """A crop of the picture as a square of its longer side, back in its own pixels."""
    side = max(height, width)
    crop = _sample_crop(side, side, scale, rng)
    top, bottom = (round(edge * height / side) for edge in (crop.top, crop.top + crop.height))
    left, right = (round(edge * width / side) for edge in (crop.left, crop.left + crop.width))
    return Crop(top, left, max(bottom - top, 1), max(right - left, 1))


def _whole(height: int, width: int) -> Crop:
    return Crop(0, 0, height, width)


def _centre_crop(height: int, width: int) -> Crop:
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def _largest_factor(crop: Crop, size: int) -> int:
    """The factor that leaves `SHARP` times what is needed: the decoder's filter is a coarse one."""
    needed = SHARP * size
    return next((factor for factor in FACTORS if min(crop[2:]) >= factor * needed), 1)


def _on_grid(crop: Crop, size: int) -> Crop:
    """The crop with its edges at whole pixels of the scaled decode.

    Each edge moves by less than a pixel of the result. Whether the file is a JPEG plays no part:
    the same picture has the same crop in every format.
    """
    factor = _largest_factor(crop, size)
    return Crop(*(edge - edge % factor for edge in crop))


def _factor(header: _JpegHeader, crop: Crop, size: int) -> int:
    """The largest factor of scaled decode at which the crop's edges are edges of pixels."""
    edges = list(crop)
    if header.orientation != 1:  # turned, the pixels of a side's end come first
        edges += [header.height, header.width]
    largest = _largest_factor(crop, size)
    return next(
        (
            factor
            for factor in FACTORS
            if factor <= largest and all(edge % factor == 0 for edge in edges)
        ),
        1,
    )


def _cut(pixels: Pixels, crop: Crop, factor: int) -> Pixels:
    top, left, height, width = (edge // factor for edge in crop)
    return pixels[top : top + height, left : left + width]


def _resize(pixels: Pixels, size: int) -> Pixels:
    """Resize to a square, without aliasing: the fastest way for each amount of shrinking."""
    if pixels.shape[:2] == (size, size):
        return np.ascontiguousarray(pixels)
    shrinking = max(pixels.shape[:2]) / size
    method = cv2.INTER_CUBIC if shrinking <= 1 else cv2.INTER_LINEAR
    if shrinking > SHARP:
        method = cv2.INTER_AREA
        if shrinking <= 2 * SHARP:
            # Twice the size by linear interpolation, then the mean of 2x2: as good, in half the
            # time, since OpenCV has fast code for both and none for areas of broken pixels.
            pixels = _to_square(pixels, 2 * size, cv2.INTER_LINEAR)
    return _to_square(pixels, size, method)


def _to_square(pixels: Pixels, size: int, method: int) -> Pixels:
    return cv2.resize(pixels, (size, size), interpolation=method).astype(np.uint8, copy=False)


# ---- JPEG ----------------------------------------------------------------------------------------


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a picture that decodes is a JPEG with no CMYK and no rotation to apply."""
    header = _read_jpeg_header(data)
    return header is not None and not header.is_cmyk and header.orientation == 1


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """None: another format, or a kind of JPEG that is left to Pillow."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_sides(int(height), int(width))
    return _JpegHeader(
        height=int(height),
        width=int(width),
        is_cmyk=colorspace in ("CMYK", "YCCK"),
        orientation=_find_orientation(data),
    )


def _decode_jpeg(data: bytes, header: _JpegHeader, factor: int, is_shrunk: bool) -> Pixels:
    """The upright picture with sides divided by `factor`, rounded up.

    One that is shrunk by more than `SHARP` later shows nothing of how colours, stored at half the
    sides, were enlarged: the fast way does.
    """
    height, width = (-(-side // factor) for side in header[:2])
    channels = 4 if header.is_cmyk else 3
    try:
        # An error of the strict decoder is final. Pillow's would fill the damaged part with grey.
        pixels = simplejpeg.decode_jpeg(
            data,
            "CMYK" if header.is_cmyk else "RGB",
            min_height=height,
            min_width=width,
            min_factor=factor,
            fastupsample=is_shrunk,
            # To addresses divisible by 32 libjpeg-turbo writes past the cache, and the resize then
            # waits for memory. An odd address makes decode and resize together 5 to 15 % faster.
            buffer=np.empty(height * width * channels + 1, np.uint8)[1:],
        )
    except ValueError as error:
        raise BadImage("corrupt_image") from error
    if header.is_cmyk:  # stored inverted, as by all software since Adobe's: less is more ink
        key = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * key + 127) // 255).astype(np.uint8)
    return _turn(pixels, header.orientation)


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """The upright picture of pixels stored in an EXIF orientation."""
    turned = cv2.transpose(pixels) if orientation in TRANSPOSED else pixels
    if orientation in FLIPS:
        turned = cv2.flip(turned, FLIPS[orientation])
    return turned.astype(np.uint8, copy=False)


def _find_orientation(data: bytes) -> int:
    """The EXIF orientation among the segments before the scan; 1 (upright) when there is none."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _read_orientation(data[at + 10 : end])
        at = end
    return 1


def _read_orientation(exif: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, at)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


# ---- other formats -------------------------------------------------------------------------------


def _decode_any(data: bytes, background: tuple[int, int, int]) -> Pixels:
    """The upright picture (the first one of several) by Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_sides(image.height, image.width)
            image.load()
            return _turn(_to_rgb(image, background), _pillow_orientation(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("huge_image") from error
    except Exception as error:
        raise BadImage("corrupt_image") from error


def _pillow_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  whatever is wrong with EXIF, the picture is whole
        return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Pixels:
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


def _check_sides(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage("huge_image")
    if min(height, width) < 2:
        raise BadImage("tiny_image")
