import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import image as image_module
from pipeline.data.image import (
    MAX_PIXELS,
    RATIO,
    BadImage,
    Pixels,
    RandomCrop,
    _sample_crop,
    decode,
    decode_eval,
    decode_train,
    eval_geometry,
)

WHITE = (255, 255, 255)
PINK = (250, 120, 180)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _picture(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth colours, so that JPEG keeps them; no symmetry, so that a turn shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + 2 * y) / 3], axis=-1).astype(np.uint8))


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(_encode(_picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return got.shape == expected.shape and bool(
        np.abs(got.astype(int) - expected.astype(int)).max() <= tolerance
    )


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_jpeg_agrees_with_pillow(subsampling: int, progressive: bool) -> None:
    data = _encode(_picture(), "JPEG", subsampling=subsampling, progressive=progressive)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert _close(decode(data, WHITE), pillow, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_formats_decode_to_the_same_picture(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    tolerance = 40 if kind == "GIF" else 0  # a palette of 256 colours
    got = decode(_encode(_picture(), kind, **options), WHITE)
    assert _close(got, np.asarray(_picture()), tolerance)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pixels_show_the_background(kind: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 4, 8))
    image.paste((0, 0, 0, 128), (4, 0, 6, 8))
    pixels = decode(_encode(image, kind, lossless=True), PINK)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 7].tolist() == list(PINK)
    assert np.abs(pixels[0, 5] - np.array(PINK) / 2).max() <= 1


def test_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((3, 0), 0)
    pixels = decode(_encode(image, "PNG", transparency=1), PINK)
    assert pixels[0, 3].tolist() == [10, 20, 30]
    assert pixels[0, 0].tolist() == list(PINK)


@pytest.mark.parametrize(("mode", "key"), [("L", 1), ("RGB", (1, 2, 3))])
def test_transparent_key_colour_shows_the_background(mode: str, key: object) -> None:
    data = _encode(Image.new(mode, (4, 4), key), "PNG", transparency=key)
    assert (decode(data, PINK) == PINK).all()


def test_gray_with_alpha_shows_the_background() -> None:
    assert (decode(_encode(Image.new("LA", (4, 4), (0, 0)), "PNG"), PINK) == PINK).all()


def test_sixteen_bit_gray_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    pixels = decode(_encode(Image.fromarray(ramp), "PNG"), WHITE)
    assert _close(pixels, np.repeat((ramp // 257)[..., None], 3, axis=-1), 1)


def test_gray_and_black_and_white() -> None:
    assert (decode(_encode(Image.new("L", (8, 8), 77), "JPEG"), WHITE) == 77).all()
    assert (decode(_encode(Image.new("1", (8, 8), 1), "PNG"), (0, 0, 0)) == 255).all()


def test_cmyk_jpeg_is_not_inverted() -> None:
    """Full magenta and yellow ink is red; read as if it were inverted, it would be dark."""
    data = _encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert _close(decode(data, WHITE), np.full((8, 8, 3), (255, 0, 0), np.uint8), 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_orientation_is_applied(kind: str, orientation: int, quarter_turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(_encode(_picture(), kind), WHITE)
    turned = decode(_encode(_picture(), kind, exif=exif), WHITE)
    assert _close(turned, np.rot90(upright, quarter_turns), 3)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = _encode(_picture(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode(data, WHITE).shape == (40, 60, 3)


_JPEG = _encode(_picture(), "JPEG")
_PNG = _encode(_picture(), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(None, "null_image", id="null"),
        pytest.param(b"", "null_image", id="empty"),
        pytest.param(b"<html>not found</html>", "corrupt_image", id="html"),
        pytest.param(_JPEG[:2], "corrupt_image", id="jpeg-magic-only"),
        pytest.param(_JPEG[: len(_JPEG) * 3 // 4], "corrupt_image", id="jpeg-cut"),
        pytest.param(_PNG[: len(_PNG) // 2], "corrupt_image", id="png-cut"),
        pytest.param(_PNG[:60] + b"\xff" * 40 + _PNG[100:], "corrupt_image", id="png-damaged"),
        pytest.param(_encode(_picture(1, 8), "PNG"), "tiny_image", id="one-wide"),
        pytest.param(_encode(_picture(8, 1), "JPEG"), "tiny_image", id="one-high"),
        pytest.param(_png_header(13_400, 13_400), "huge_image", id="png-over-the-limit"),
        pytest.param(_png_header(60_000, 60_000), "huge_image", id="png-bomb"),
        pytest.param(_jpeg_claiming(13_400, 13_400), "huge_image", id="jpeg-over-the-limit"),
    ],
)
def test_unusable_images_are_refused_with_a_reason(data: bytes | None, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data, WHITE)
    assert caught.value.reason == reason


def test_the_huge_examples_are_just_over_the_limit() -> None:
    assert 13_300**2 < MAX_PIXELS < 13_400**2


def test_two_pixels_a_side_are_enough() -> None:
    assert decode(_encode(_picture(2, 2), "PNG"), WHITE).shape == (2, 2, 3)


def _png(pixels: np.ndarray) -> bytes:
    return _encode(Image.fromarray(pixels), "PNG", compress_level=0)


def _train(data: bytes, size: int, scale: tuple[float, float], flip: float, seed: int) -> Pixels:
    return decode_train(data, WHITE, size, [RandomCrop(scale, flip, np.random.default_rng(seed))])[
        0
    ]


def test_train_crop_follows_the_generator_alone() -> None:
    crops = [_train(_PNG, 16, (0.2, 1.0), 0.5, seed) for seed in range(20)]
    assert (crops[0] == _train(_PNG, 16, (0.2, 1.0), 0.5, 0)).all()
    assert len({crop.tobytes() for crop in crops}) > 10


def test_train_crop_flips_with_the_given_probability() -> None:
    data = _encode(_picture(32, 32), "PNG")
    kept, flipped = (_train(data, 32, (1.0, 1.0), flip, 3) for flip in (0.0, 1.0))
    assert (kept[:, ::-1] == flipped).all()
    assert kept[0, 0, 0] < kept[0, -1, 0]


sides = st.integers(2, 400)
shares = st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)).map(sorted).map(tuple)


@settings(max_examples=150)
@given(sides, sides, shares, st.integers(0, 2**32 - 1))
def test_crop_is_inside_and_its_area_within_the_share(
    height: int, width: int, scale: tuple[float, float], seed: int
) -> None:
    """Rounding moves each side by half a pixel; the last resort has the nearest allowed ratio."""
    top, left, crop_height, crop_width = _sample_crop(
        height, width, scale, np.random.default_rng(seed)
    )
    assert 0 <= top < top + crop_height <= height
    assert 0 <= left < left + crop_width <= width
    slack = (crop_height + crop_width + 1) / 2
    share = np.array(scale) * height * width
    is_within = share[0] - slack <= crop_height * crop_width <= share[1] + slack
    is_last_resort = (crop_height == height or crop_width == width) and (
        abs(2 * top + crop_height - height) <= 1 and abs(2 * left + crop_width - width) <= 1
    )
    assert is_within or is_last_resort
    assert crop_width <= RATIO[1] * (crop_height + 1) + 1
    assert crop_height <= RATIO[1] * (crop_width + 1) + 1


@settings(max_examples=50)
@given(sides, sides, st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_train_crop_has_the_size_from_any_picture(
    height: int, width: int, size: int, seed: int
) -> None:
    pixels = np.full((height, width, 3), (9, 99, 199), np.uint8)
    crop = _train(_png(pixels), size, (0.1, 1.0), 0.5, seed)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    assert crop.flags.c_contiguous
    assert (crop == (9, 99, 199)).all()


@pytest.mark.parametrize(("height", "width"), [(90, 150), (150, 90), (90, 90), (91, 150)])
def test_eval_geometry_keeps_the_centre_in_the_centre(height: int, width: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 2 - 3 : height // 2 + 4, width // 2 - 3 : width // 2 + 4] = 255
    crop = eval_geometry(pixels, 30)
    rows, columns = np.nonzero(crop[..., 0] > 100)
    assert crop.shape == (30, 30, 3)
    assert abs(rows.mean() - 14.5) <= 1
    assert abs(columns.mean() - 14.5) <= 1


def test_eval_geometry_shows_the_whole_short_side() -> None:
    crop = eval_geometry(np.asarray(_picture(200, 100)), 50)
    green, red = crop[:, 25, 1].astype(int), crop[25, :, 0].astype(int)
    assert (green[0], green[-1]) == (pytest.approx(1, abs=1), pytest.approx(254, abs=1))
    assert (red[0], red[-1]) == (pytest.approx(64, abs=3), pytest.approx(191, abs=3))


def test_eval_geometry_leaves_a_picture_of_the_right_size_alone() -> None:
    pixels = np.asarray(_picture(24, 24))
    assert (eval_geometry(pixels, 24) == pixels).all()


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 300), (300, 2), (3, 1000), (17, 16)])
def test_tiny_and_extreme_pictures_are_taken(height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 60, np.uint8)
    for crop in (decode_eval(_png(pixels), WHITE, 16), _train(_png(pixels), 16, (0.9, 1.0), 0, 0)):
        assert (crop == np.full((16, 16, 3), 60)).all()


@pytest.mark.parametrize(("width", "height"), [(80, 20), (20, 80), (64, 64)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_squeezed_pictures_are_seen_whole(width: int, height: int, kind: str) -> None:
    """In evaluation, and in training without a crop; a crop then cuts both sides alike."""
    data = _encode(_picture(width, height), kind, **({"quality": 98} if kind == "JPEG" else {}))
    expected = np.asarray(_picture(width, height).resize((16, 16), Image.Resampling.BOX))
    for got in (
        decode_eval(data, WHITE, 16, squeeze=True),
        *decode_train(
            data, WHITE, 16, [RandomCrop((1.0, 1.0), 0.0, np.random.default_rng(0), squeeze=True)]
        ),
    ):
        assert _difference(got, expected) < 4
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        crop = image_module._sample_squeezed(height, width, (0.25, 0.25), rng)
        assert 0 <= crop.top <= crop.top + crop.height <= height
        assert 0 <= crop.left <= crop.left + crop.width <= width
        shares.append(crop.height * crop.width / (height * width))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.03)


# ---- scaled decode -------------------------------------------------------------------------------


def _sharp(width: int, height: int) -> Image.Image:
    """Discs with hard edges on a slope of colour."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 0 * x + 90], axis=-1).astype(np.uint8)
    for _ in range(12):
        centre, radius = rng.uniform(0, (height, width)), rng.uniform(height / 12, height / 5)
        pixels[np.hypot(y - centre[0], x - centre[1]) < radius] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def _difference(some: np.ndarray, other: np.ndarray) -> float:
    assert some.shape == other.shape
    return float(np.abs(some.astype(int) - other.astype(int)).mean())


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The factors at which JPEGs are decoded in the test."""
    seen: list[int] = []

    def decode_jpeg(
        data: bytes, header: image_module._JpegHeader, factor: int, is_shrunk: bool
    ) -> Pixels:
        seen.append(factor)
        return original(data, header, factor, is_shrunk)

    original = image_module._decode_jpeg
    monkeypatch.setattr(image_module, "_decode_jpeg", decode_jpeg)
    return seen


@pytest.mark.parametrize(("sides", "is_fast"), [((64, 48), False), ((72, 73), True)])
def test_colours_are_enlarged_the_fast_way_only_where_shrinking_hides_it(
    monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int], is_fast: bool
) -> None:
    """Beyond one and a half times; and it shows no more than a little."""
    seen: list[bool] = []
    original = image_module.simplejpeg.decode_jpeg

    def decode_jpeg(*given: Any, **named: Any) -> Any:
        seen.append(named["fastupsample"])
        return original(*given, **named)

    monkeypatch.setattr(image_module.simplejpeg, "decode_jpeg", decode_jpeg)
    buffer = io.BytesIO()
    picture = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(picture).resize(sides, Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=95)
    pixels = decode_eval(buffer.getvalue(), WHITE, 32)
    assert seen == [is_fast]
    assert _difference(pixels, eval_geometry(np.asarray(image), 32)) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height", "factor"), [
    (95, 80, 1), (96, 96, 2), (120, 101, 1), (112, 96, 2), (224, 192, 4), (512, 384, 8),
    (514, 384, 1), (516, 384, 2),
])  # fmt: skip
def test_scaled_decode_shows_the_same_centre(
    width: int, height: int, factor: int, orientation: int, factors: list[int]
) -> None:
    """A factor is used where it divides the edges of the centre; the picture stays the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = _sharp(width, height)
    data = _encode(image, "JPEG", quality=95, exif=exif)
    got = decode_eval(data, WHITE, 32)
    assert factors == [factor]
    upright = Image.fromarray(decode(data, WHITE))
    left, top = (upright.width - height) / 2, (upright.height - height) / 2
    left, top = max(left, 0), max(top, 0)
    short = min(width, height)
    box = (left, top, left + short, top + short)
    expected = np.asarray(upright.resize((32, 32), Image.BICUBIC, box=box))
    assert _difference(got, expected) < 3
    assert _difference(got, eval_geometry(decode(data, WHITE), 32)) < 3


@pytest.mark.parametrize(("orientation", "factor"), [(1, 2), (2, 1), (6, 1), (8, 1)])
def test_a_turned_picture_is_scaled_only_where_its_pixels_stay_in_place(
    orientation: int, factor: int, factors: list[int]
) -> None:
    """Of 113 pixels the 57th at half size shows one only: turned, it would come first."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(_sharp(113, 96), "JPEG", quality=95, exif=exif)
    decode_eval(data, WHITE, 32)
    assert factors == [factor]


@pytest.mark.parametrize("orientation", [1, 2, 6, 7])
def test_the_train_crop_does_not_depend_on_the_format(orientation: int, factors: list[int]) -> None:
    """The same draw from JPEG (scaled by any factor) and from PNG (whole): the same rectangle."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = _sharp(640, 480)
    jpeg = _encode(image, "JPEG", quality=95, exif=exif)
    png = _encode(image, "PNG", compress_level=0, exif=exif)
    for seed in range(40):
        pair = (_train(data, 32, (0.02, 1.0), 0.5, seed) for data in (jpeg, png))
        assert _difference(*pair) < 4
    assert set(factors) == {1, 2, 4, 8}


def test_the_crop_of_a_scaled_decode_moves_less_than_a_pixel(factors: list[int]) -> None:
    """Against the crop as it was drawn, resized from the whole picture."""
    image = _sharp(700, 501)
    data = _encode(image, "JPEG", quality=95)
    whole = Image.fromarray(decode(data, WHITE))
    for seed in range(20):
        crop = _sample_crop(501, 700, (0.3, 1.0), np.random.default_rng(seed))
        on_grid = image_module._on_grid(crop, 32)
        step = min(crop.height, crop.width) / 32
        assert all(0 <= drawn - used < step for drawn, used in zip(crop, on_grid, strict=True))
        box = (on_grid.left, on_grid.top, on_grid.left + on_grid.width,
               on_grid.top + on_grid.height)  # fmt: skip
        expected = np.asarray(whole.resize((32, 32), Image.BICUBIC, box=box))
        assert _difference(_train(data, 32, (0.3, 1.0), 0.0, seed), expected) < 3
    assert set(factors[1:]) <= {4, 8}
