"""What a row becomes, without Ray: cleaning and augmentation on top of crop and drawn caption."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.augment import augment_image, augment_text
from pipeline.data.batches import Tally, _rebatch
from pipeline.data.decode import GOOD, REASONS, Decode, Recipe, Rows, View
from pipeline.data.image import RandomCrop, decode_train
from pipeline.data.layout import Catalog, Shard, as_captions
from pipeline.data.text import train_tokenizer

CAPTIONS = [
    ["a red car beside a blue car", "two dogs &amp; a <b>cat</b>"],
    ["schÃ¶n, three birds on a wire in the rain"],
    ["<br>", "  "],
    ["I <3 my small green house by the lake", None],
    ["one picture that is broken"],
] * 4
TOKENIZER = train_tokenizer([text for cell in CAPTIONS for text in as_captions(cell)], 400)
PINK = (250, 120, 180)


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((50, 40)).save(file, "JPEG")
    return file.getvalue()


def _table(turn: int = 0) -> pa.Table:
    rows = len(CAPTIONS)
    images = [[b"broken"] if row % 5 == 4 else [_picture(row)] for row in range(rows)]
    numbers = pa.array(np.arange(rows))
    return pa.table(
        {
            "epoch": pa.array(np.full(rows, turn)),
            "turn": pa.array(np.full(rows, turn)),
            "position": numbers,
            "shard": pa.array(np.zeros(rows, np.int64)),
            "row_group": pa.array(np.full(rows, 3)),
            "row": numbers,
            "ordinal": numbers,
            "image": pa.array(images, pa.list_(pa.large_binary())),
            "caption": pa.array(CAPTIONS, pa.list_(pa.string())),
            "absence": pa.nulls(rows, pa.string()),
        }
    )


def _recipe(**changes: Any) -> Recipe:
    """`changes` of the recipe, or of the first view."""
    of_view = {name: changes.pop(name) for name in ("augment_image", "augment_text")
               if name in changes}  # fmt: skip
    values = {
        "tokenizer": TOKENIZER,
        "context_length": 24,
        "image_size": 32,
        "view": View(crop_scale=(0.5, 1.0), flip=0.5, **of_view),
        "background": PINK,
        "seed": 11,
        "train": True,
    }
    return Recipe(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def _decode(table: pa.Table, **changes: Any) -> dict[str, Any]:
    return Decode(_recipe(**changes))(Rows.of(table))


def _same(one: dict[str, Any], other: dict[str, Any], *names: str) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in names or one)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("synonyms") / "groups.txt"
    file.write_text("car, automobile\ndogs, hounds\nsmall, little, tiny\n")
    return {
        "clean_captions": True,
        "augment_image": "rand_augment",
        "augment_text": 0.5,
        "synonyms": str(file),
    }


def test_without_augmentation_a_row_draws_as_it_always_has() -> None:
    """Crop, flip, caption: draws added here would change every run that is continued."""
    block = _decode(_table())
    for row in (0, 1, 3):
        rng = np.random.default_rng([11, 0, 0, 3, row])
        pixels = decode_train(_picture(row), PINK, 32, [RandomCrop((0.5, 1.0), 0.5, rng)])[0]
        captions = as_captions(CAPTIONS[row])
        tokens, _ = TOKENIZER.encode([captions[int(rng.integers(len(captions)))]], 24)
        assert (block["image"][row] == pixels).all()
        assert (block["tokens"][row] == tokens[0]).all()
    assert not block["cleaned"].any()


def test_a_jpeg_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> None:
        raise AssertionError("Pillow, three times slower")

    monkeypatch.setattr("pipeline.data.image._decode_any", slow)
    assert _decode(_table().slice(0, 1))["reason"].tolist() == [GOOD]


def test_augmentation_draws_after_crop_and_caption() -> None:
    plain = _decode(_table())
    pictures = _decode(_table(), augment_image="rand_augment")
    texts = _decode(_table(), augment_text=1.0)
    assert _same(plain, pictures, "tokens", "reason")
    assert _same(plain, texts, "image", "reason")
    good = plain["reason"] == GOOD
    assert not (plain["image"] == pictures["image"])[good].all()
    assert (plain["tokens"] != texts["tokens"]).any(axis=1)[good].mean() > 0.5
    for row in (0, 1):
        rng = np.random.default_rng([11, 0, 0, 3, row])
        pixels = decode_train(_picture(row), PINK, 32, [RandomCrop((0.5, 1.0), 0.5, rng)])[0]
        captions = as_captions(CAPTIONS[row])
        text = captions[int(rng.integers(len(captions)))]
        both = _decode(_table(), augment_image="rand_augment", augment_text=1.0)
        assert (both["image"][row] == augment_image(pixels, PINK, rng)).all()
        assert rng.random() < 1.0
        tokens, _ = TOKENIZER.encode([augment_text(text, {}, rng)], 24)
        assert (both["tokens"][row] == tokens[0]).all()


def test_a_row_is_the_same_in_any_company_and_another_in_the_next_turn(
    everything: dict[str, Any],
) -> None:
    whole = _decode(_table(), **everything)
    backwards = _table().take(pa.array(np.arange(len(CAPTIONS))[::-1]))
    parts = [_decode(backwards.slice(start, 6), **everything) for start in range(0, 20, 6)]
    joined = {name: np.concatenate([part[name] for part in parts])[::-1] for name in whole}
    assert _same(whole, joined)
    later = _decode(_table(turn=1), **everything)
    assert not _same(whole, later, "image")
    assert not _same(whole, later, "tokens")


def test_a_second_view_leaves_the_first_as_it_is(everything: dict[str, Any]) -> None:
    """And varies crop, picture and text of the same row by draws of its own."""
    alone = _decode(_table(), **everything)
    view = View(crop_scale=(0.3, 0.6), flip=0.5, augment_image="rand_augment", augment_text=1.0)
    both = _decode(_table(), **everything, second_view=view)
    assert _same(alone, both, *alone)
    good = both["reason"] == GOOD
    different = (both["image"] != both["view_image"]).any(axis=(1, 2, 3))
    assert different[good].all()
    assert (both["tokens"] != both["view_tokens"]).any(axis=1)[good].mean() > 0.5
    assert not both["view_image"][~good].any()
    for row in (0, 1, 3):
        rng = np.random.default_rng([11, 0, 0, 3, row, 1])
        crop = RandomCrop((0.3, 0.6), 0.5, rng)
        pixels = decode_train(_picture(row), PINK, 32, [crop])[0]
        assert (both["view_image"][row] == augment_image(pixels, PINK, rng)).all()
    again = _decode(_table(), **everything, second_view=view)
    assert _same(both, again)


def test_both_views_of_a_large_jpeg_come_from_one_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the scale that the smaller crop needs."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    data = simplejpeg.encode_jpeg(np.kron(noise, np.ones((16, 16, 1), np.uint8)))
    factors: list[int] = []
    real = simplejpeg.decode_jpeg

    def count(*given: Any, **named: Any) -> Any:
        factors.append(named["min_factor"])
        return real(*given, **named)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", count)
    crops = [RandomCrop((share, share), 0.0, np.random.default_rng(1)) for share in (0.9, 0.05)]
    whole, part = decode_train(data, PINK, 32, crops)
    assert factors == [2]
    again = RandomCrop((0.9, 0.9), 0.0, np.random.default_rng(1))
    alone = decode_train(data, PINK, 32, [again])[0]
    assert factors[1] > 2
    assert np.abs(whole.astype(int) - alone).mean() < 6
    assert whole.shape == part.shape == (32, 32, 3)


def test_captions_are_cleaned_counted_and_dropped_where_nothing_is_left() -> None:
    block = _decode(_table(), train=False, clean_captions=True)
    tokens, _ = TOKENIZER.encode([CAPTIONS[0][0], "schön, three birds on a wire in the rain"], 24)
    assert (block["tokens"][:2] == tokens).all()
    more = np.frombuffer(block["more_tokens"][0], np.int32)
    assert (more == TOKENIZER.encode(["two dogs & a cat"], 24)[0][0]).all()
    assert block["cleaned"][:5].tolist() == [True, True, True, False, False]
    reasons = [None if code == GOOD else REASONS[code] for code in block["reason"][:5]]
    assert reasons == [None, None, "empty_caption", None, "corrupt_image"]


def test_evaluation_is_not_augmented(everything: dict[str, Any]) -> None:
    clean = _decode(_table(), train=False, clean_captions=True)
    assert _same(clean, _decode(_table(), train=False, **everything))


def test_batches_count_the_rows_that_were_cleaned() -> None:
    shard = Shard(path="p", size=1, row_groups=(0, 0, 0, 20), group_bytes=(1,) * 4, num_rows=20)
    recipe = _recipe(clean_captions=True)
    block = Decode(recipe)(Rows.of(_table()))
    catalog = Catalog(sources=(), shards=(shard,))
    tally = Tally()
    for batch in _rebatch([block], catalog, recipe, 4):
        tally.add(batch)
    assert (tally.rows, tally.cleaned) == (12, 8)
    assert tally.bad == {"empty_caption": 4, "corrupt_image": 3}  # the last waits for a batch
