import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RunStop
from pipeline.evaluate.retrieval import retrieval
from pipeline.evaluate.zero_shot import class_embeddings, zero_shot
from tests.tiny import tiny_tokenizer


def _axis(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def test_a_case_worked_by_hand() -> None:
    """Three images, four captions; caption 3 (of image 2) lies on image 0."""
    image = _axis([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])
    text = _axis([0.9, 0.1, 0], [0, 1.0, 0], [0.1, 0, 0.9], [1.0, 0, 0.2])
    measured = dict(retrieval(image, text, torch.tensor([0, 1, 2, 2])))
    assert measured["text_to_image_recall_at_1"] == pytest.approx(3 / 4)
    # Image 0 prefers its own caption 0 (0.994) to the stray one (0.981): right; so are 1 and 2.
    assert measured["image_to_text_recall_at_1"] == pytest.approx(1.0)
    assert measured["text_to_image_recall_at_5"] == 1.0
    assert measured["text_to_image_chance_at_1"] == pytest.approx(1 / 3)


def test_chance_is_that_of_k_drawn_at_random() -> None:
    """Four images with 1, 1, 2 and 3 captions; all draws of five captions are counted."""
    owners = torch.tensor([0, 1, 2, 2, 3, 3, 3])
    image, text = torch.eye(4), torch.eye(4)[owners]
    measured = dict(retrieval(image, text, owners))
    assert measured["text_to_image_chance_at_1"] == 1 / 4
    assert measured["text_to_image_chance_at_5"] == measured["image_to_text_chance_at_10"] == 1
    assert measured["image_to_text_chance_at_1"] == 1 / 4
    draws = list(itertools.combinations(owners.tolist(), 5))
    hits = sum(len(set(draw)) for draw in draws)
    assert measured["image_to_text_chance_at_5"] == pytest.approx(hits / (4 * len(draws)))


def test_with_a_caption_an_image_chance_is_k_of_all() -> None:
    measured = dict(retrieval(torch.eye(40), torch.eye(40), torch.arange(40)))
    for way in ("text_to_image", "image_to_text"):
        for k in (1, 5, 10):
            assert measured[f"{way}_chance_at_{k}"] == pytest.approx(k / 40, abs=1e-12)


def test_ties_count_against_the_query() -> None:
    """Collapsed embeddings must not look perfect."""
    same = _axis(*[[1.0, 0.0]] * 12)
    measured = dict(retrieval(same, same, torch.arange(12)))
    assert measured["text_to_image_recall_at_1"] == 0.0
    assert measured["image_to_text_recall_at_10"] == 0.0


def test_embeddings_that_are_not_finite_are_no_perfect_score() -> None:
    broken = torch.full((4, 3), float("nan"))
    with pytest.raises(RunStop, match="embeddings are not finite"):
        dict(retrieval(broken, broken, torch.arange(4)))


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 100))
def test_equals_a_sorted_reference(images: int, captions: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(images, 6, generator=generator), dim=1)
    owners = torch.arange(images).repeat_interleave(captions)
    text = torch.nn.functional.normalize(torch.randn(len(owners), 6, generator=generator), dim=1)
    scores = image @ text.T
    measured = dict(retrieval(image, text, owners))
    for k in (1, 5, 10):
        best = scores.argsort(dim=1, descending=True)[:, :k]
        hits = (owners[best] == torch.arange(images)[:, None]).any(1).float().mean()
        assert measured[f"image_to_text_recall_at_{k}"] == pytest.approx(hits.item())
        best = scores.T.argsort(dim=1, descending=True)[:, :k]
        hits = (best == owners[:, None]).any(1).float().mean()
        assert measured[f"text_to_image_recall_at_{k}"] == pytest.approx(hits.item())


def test_zero_shot_counts_labelled_rows_only() -> None:
    image = _axis([1.0, 0], [1.0, 0.1], [0, 1.0], [0, 1.0])
    weights = _axis([1.0, 0], [0, 1.0])
    measured = dict(zero_shot(image, ["a", "a", "a", ""], ["a", "b"], weights))
    assert measured["accuracy"] == pytest.approx(2 / 3)
    assert (measured["rows"], measured["chance"]) == (3, 0.5)


def test_mean_class_accuracy_weighs_classes_alike() -> None:
    image = _axis([1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0])
    measured = dict(zero_shot(image, ["a", "a", "a", "b"], ["a", "b"], _axis([1.0, 0], [0, 1.0])))
    assert measured["accuracy"] == pytest.approx(3 / 4)
    assert measured["mean_class_accuracy"] == pytest.approx(1 / 2)


def test_top_5_accuracy_is_told_of_more_than_five_classes() -> None:
    """Each image likes the classes in the order of their numbers; the last is liked least."""
    image = _axis([6.0, 5, 4, 3, 2, 1]).repeat(3, 1)
    measured = dict(zero_shot(image, ["a", "e", "f"], list("abcdef"), torch.eye(6)))
    assert measured["accuracy"] == pytest.approx(1 / 3)
    assert measured["top_5_accuracy"] == pytest.approx(2 / 3)
    five = dict(zero_shot(image[:, :5], ["a", "e", "e"], list("abcde"), torch.eye(5)))
    assert "top_5_accuracy" not in five


def test_zero_shot_refuses_unknown_or_no_labels() -> None:
    image, weights = _axis([1.0, 0]), _axis([1.0, 0], [0, 1.0])
    with pytest.raises(RunStop, match=r"labels \['c'\] are not among"):
        dict(zero_shot(image, ["c"], ["a", "b"], weights))
    with pytest.raises(RunStop, match="no row has a label"):
        dict(zero_shot(image, [""], ["a", "b"], weights))


def test_class_embeddings_average_prompts() -> None:
    """An encoder that counts tokens: the class embedding is the normalised mean over prompts."""

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        filled = (tokens > 0).float()
        return torch.nn.functional.normalize(
            torch.stack([filled.sum(1), torch.ones(len(tokens))], 1), dim=1
        )

    tokenizer = tiny_tokenizer()
    prompts = ["a {}", "a small {} circle"]
    weights = class_embeddings(embed, ["red", "blue"], prompts, tokenizer, 12, torch.device("cpu"))
    tokens, _ = tokenizer.encode([prompt.format("red") for prompt in prompts], 12)
    expected = torch.nn.functional.normalize(embed(torch.from_numpy(tokens)).mean(0), dim=0)
    torch.testing.assert_close(weights[0], expected)
    assert weights.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
