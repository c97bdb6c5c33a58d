import tracemalloc

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from pipeline.data.image import BadImage, Pixels, RandomCrop, decode, decode_eval, decode_train
from tests.unit.data.zoo import BACKGROUND, BEASTS, UPRIGHT, Beast

SIDE = 16
GOOD = [beast for beast in BEASTS if beast.pixels is not None]
BAD = [beast for beast in BEASTS if beast.reason is not None]


def _picture_or_reason(data: bytes) -> Pixels | str:
    try:
        return decode(data, BACKGROUND)
    except BadImage as error:
        return error.reason


def _by_name(beast: Beast) -> str:
    return beast.name


def test_the_zoo_is_large_and_every_name_its_own() -> None:
    assert len({beast.name for beast in BEASTS}) == len(BEASTS) == len(GOOD) + len(BAD)
    assert len(GOOD) >= 40
    assert len(BAD) >= 40


def test_the_picture_shows_turns_and_swapped_colours() -> None:
    """Or the zoo would prove nothing."""
    turns = [UPRIGHT[::-1], UPRIGHT[:, ::-1], UPRIGHT[::-1, ::-1], UPRIGHT[..., ::-1]]
    assert all(np.abs(UPRIGHT.astype(int) - turn).max() > 100 for turn in turns)


@pytest.mark.parametrize("beast", GOOD, ids=_by_name)
def test_odd_images_give_the_right_picture(beast: Beast) -> None:
    pixels = decode(beast.data, BACKGROUND)
    assert beast.pixels is not None
    assert pixels.shape == beast.pixels.shape
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - beast.pixels).max() <= beast.tolerance


@pytest.mark.parametrize("beast", GOOD, ids=_by_name)
def test_odd_images_are_cut_and_resized(beast: Beast) -> None:
    assert beast.pixels is not None
    height, width = beast.pixels.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    reference = Image.fromarray(beast.pixels).resize((SIDE, SIDE), Image.BICUBIC, box=box)
    got = decode_eval(beast.data, BACKGROUND, SIDE)
    difference = np.abs(got.astype(int) - np.asarray(reference)).mean()
    assert difference < (12 if beast.tolerance > 10 else 4)
    crop = decode_train(
        beast.data, BACKGROUND, SIDE, [RandomCrop((0.5, 1), 0.5, np.random.default_rng(0))]
    )[0]
    assert (crop.shape, crop.dtype) == ((SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize("beast", BAD, ids=_by_name)
def test_bad_images_are_refused_with_the_right_reason(beast: Beast) -> None:
    with pytest.raises(BadImage) as caught:
        decode(beast.data, BACKGROUND)
    assert caught.value.reason == beast.reason
    with pytest.raises(BadImage) as caught:
        decode_eval(beast.data, BACKGROUND, SIDE)
    assert caught.value.reason == beast.reason


@pytest.mark.parametrize("beast", [beast for beast in BAD if "bomb" in beast.name], ids=_by_name)
def test_bombs_are_refused_before_memory_is_taken(beast: Beast) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadImage):
            decode_eval(beast.data, BACKGROUND, SIDE)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_no_program_is_started_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand EPS to Ghostscript."""
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(None))
    (eps,) = (beast for beast in BAD if beast.name == "EPS")
    with pytest.raises(BadImage):
        decode(eps.data, BACKGROUND)
    assert not started


@pytest.mark.parametrize("kind", ["JPEG baseline", "JPEG progressive", "JPEG CMYK", "WebP",
                                  "PNG RGB", "GIF", "BMP", "TIFF, LZW"])  # fmt: skip
def test_a_file_cut_anywhere_is_never_half_a_picture(kind: str) -> None:
    """Each length is refused, or (bytes after the last pixel are missing) gives all of it."""
    (beast,) = (beast for beast in GOOD if beast.name == kind)
    assert beast.data is not None
    whole = decode(beast.data, BACKGROUND)
    for length in range(1, len(beast.data), 13):
        got = _picture_or_reason(beast.data[:length])
        assert got == "corrupt_image" if isinstance(got, str) else (got == whole).all()
