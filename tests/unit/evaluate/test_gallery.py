"""Which cases are shown: right and wrong ones, with the right answer among or after the best."""

import torch
import torch.nn.functional as F

from pipeline.evaluate.embed import Embedded, Seen
from pipeline.evaluate.gallery import BEST, CASES, QUERIES, classified_cases, retrieval_cases
from pipeline.evaluate.retrieval import rank_by_contrast
from tests.tiny import tiny_tokenizer

WORDS = ["small", "red", "circle", "large", "blue", "square", "green", "star"]


def _rows(
    image: torch.Tensor, text: torch.Tensor, owners: list[int], **labels: list[str]
) -> Embedded:
    """Picture n is filled with n; caption m says the word of number m."""
    tokens, _ = tiny_tokenizer().encode([WORDS[m % len(WORDS)] for m in range(len(text))], 8)
    pictures = [torch.full((4, 4, 3), n, dtype=torch.uint8) for n in range(len(image))]
    return Embedded(
        image=F.normalize(image, dim=1),
        text=F.normalize(text, dim=1),
        image_independent=None,
        text_independent=None,
        owners=torch.tensor(owners),
        labels=labels,
        bad_rows=0,
        cut_captions=0,
        unfused=None,
        seen=Seen(pictures=pictures, first=0, tokens=torch.from_numpy(tokens)),
    )  # fmt: skip


def test_a_classification_shows_right_and_wrong_rows_that_have_a_label() -> None:
    image = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [1.0, 0]])
    rows = _rows(image, image, [0, 1, 2, 3])
    shown = classified_cases(rows, ["a", "a", "", "b"], ["a", "b"], torch.eye(2))
    said = [(int(each.pictures[0, 0, 0, 0]), each.said, each.answers) for each in shown]
    assert said == [(0, "a", ["a"]), (1, "b", ["a"]), (3, "a", ["b"])]
    assert shown[0].pictures.shape == (1, 4, 4, 3)


def test_cases_come_from_all_over_the_rows() -> None:
    image = torch.tensor([[1.0, 0]]).repeat(100, 1)
    shown = classified_cases(
        _rows(image, image, [*range(100)]), ["a"] * 100, ["a", "b"], torch.eye(2)
    )
    numbers = [int(each.pictures[0, 0, 0, 0]) for each in shown]
    assert numbers == [*range(0, 100, 9)]
    assert len(numbers) == CASES


def test_a_caption_whose_image_is_not_among_the_best_shows_it_last_with_its_rank() -> None:
    """Eight images on the axes; caption 0 likes image 0 best, caption 7 its own least of all."""
    text = torch.eye(8)
    text[7] = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    rows = _rows(torch.eye(8), text, [*range(8)])
    ranks = rank_by_contrast(rows.image, rows.text, rows.owners)
    images, captions = retrieval_cases(rows, ranks, tiny_tokenizer())
    assert len(images) == QUERIES + 1
    right, wrong = images[0], images[-1]
    assert (right.text, right.right, right.rank) == ("small", 0, 0)
    assert right.pictures.shape == (BEST, 4, 4, 3)
    assert (wrong.text, wrong.right, wrong.rank) == ("star", BEST, 7)
    assert wrong.pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 7]
    assert all(each.is_right[0] for each in captions), "of image 7, too, its caption is the best"


def test_of_several_captions_of_an_image_the_best_right_one_is_shown() -> None:
    """Image 0 has captions 0 and 6; the six between say more of it, so caption 6 comes sixth."""
    image = torch.eye(7)
    text = torch.stack([image[1] * 0.1 + image[0] * 0.01,
                        *[image[0] + 0.1 * n * image[n] for n in range(1, 7)],
                        image[0] * 0.5 + image[1]])  # fmt: skip
    rows = _rows(image, text, [0, 1, 2, 3, 4, 5, 6, 0])
    ranks = rank_by_contrast(rows.image, rows.text, rows.owners)
    _, captions = retrieval_cases(rows, ranks, tiny_tokenizer())
    (first,) = [each for each in captions if each.picture[0, 0, 0] == 0]
    assert first.rank == 6
    assert first.is_right == [False] * BEST + [True]
    assert first.texts[-1] == WORDS[7]
    assert first.texts[0] == WORDS[1]
