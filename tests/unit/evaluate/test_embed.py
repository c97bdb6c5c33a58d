"""What an embedding is downstream: one part, the other, or both side by side."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import RunStop
from pipeline.evaluate.embed import Embedded, Parts, _small, embed_rows
from pipeline.train.module import build_pretraining
from tests.tiny import tiny_batch, tiny_config, tiny_pairs, tiny_tokenizer


def _unit(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_both_parts_side_by_side_have_the_mean_of_their_cosines() -> None:
    parts = Parts(*(_unit(seed) for seed in range(4)))
    assert parts.chosen("shared") == (parts.image, parts.text)
    assert parts.chosen("independent") == (parts.image_independent, parts.text_independent)
    image, text = parts.chosen("both")
    assert image is not None
    assert text is not None
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))
    shared, independent = parts.image @ parts.text.T, parts.image_independent @ parts[3].T  # pyright: ignore
    torch.testing.assert_close(image @ text.T, (shared + independent) / 2)
    assert Parts(parts.image, None).chosen("both") == (None, None)


def _embedded(*, structure: dict) -> Embedded:
    """Two batches of three images with one caption or two, the last batch padded."""
    module = build_pretraining(tiny_config(structure=structure), tiny_tokenizer()).eval()
    batches = [tiny_batch(3, rows=3, seed=0, captions=2), tiny_batch(3, rows=2, seed=1)]
    return embed_rows(
        lambda images, tokens: module(images, tokens).parts,
        iter(batches),
        tiny_pairs(3),
        torch.device("cpu"),
    )


def test_all_parts_have_the_same_rows_and_first_captions_are_found() -> None:
    rows = _embedded(structure={"separation": {"weight": 1.0}})
    assert rows.owners.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert rows.first_captions.tolist() == [0, 1, 2, 3, 4]
    assert rows.image_independent is not None
    assert rows.text_independent is not None
    assert rows.image.shape == rows.image_independent.shape == (5, 16)
    assert rows.text.shape == rows.text_independent.shape == (8, 16)
    image, text = rows.chosen("both")
    assert (image.shape, text.shape) == ((5, 32), (8, 32))


def test_a_part_that_was_not_trained_is_refused() -> None:
    rows = _embedded(structure={})
    assert rows.image_independent is None
    assert torch.equal(rows.chosen("shared")[0], rows.image)
    with pytest.raises(RunStop, match="no independent features"):
        rows.chosen("both")


def test_pictures_and_captions_are_kept_for_those_who_look() -> None:
    """Every image once, shrunk by areas, and the tokens of every caption in its place."""
    batches = [tiny_batch(3, rows=3, seed=0, captions=2), tiny_batch(3, rows=2, seed=1)]
    images = torch.cat([batch.images[: batch.rows] for batch in batches])
    module = build_pretraining(tiny_config(), tiny_tokenizer()).eval()
    rows = embed_rows(
        lambda images, tokens: module(images, tokens).parts,
        iter(batches),
        tiny_pairs(3),
        torch.device("cpu"),
        keeps_pictures=True,
    )
    assert rows.unfused is None
    assert rows.seen is not None
    assert rows.seen.first == 0
    assert torch.equal(torch.stack(rows.seen.pictures), images)
    first, more = rows.seen.tokens[:5], rows.seen.tokens[5:]
    assert torch.equal(first, torch.cat([batch.tokens[: batch.rows] for batch in batches]))
    assert [row.tolist() for row in more] == [cell[0].tolist() for cell in batches[0].more_tokens]


def test_a_large_picture_is_shrunk_by_areas() -> None:
    large = torch.zeros(1, 192, 192, 3, dtype=torch.uint8)
    large[0, ::2] = 200
    small = _small(large)
    assert small.shape == (1, 96, 96, 3)
    assert (small == 100).all()
