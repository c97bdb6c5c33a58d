"""Cases to be looked at, right ones and wrong ones: of zero-shot classification, of retrieval.

Enters: embeddings of all rows, small pictures of this rank's. Leaves: pictures and words, the same
on every rank. Must not know: how they are drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.text import Tokenizer
from pipeline.evaluate.embed import Embedded, Seen, gathered
from pipeline.evaluate.retrieval import Ranks, nearest

CASES = 12  # right ones and as many wrong ones of a classification
QUERIES = 5  # the same of retrieval, each way
BEST = 5  # answers of a query that are shown


class ShownAnswer(NamedTuple):
    """An answer to be looked at: pictures [pictures, size, size, 3], what was asked and said."""

    pictures: NDArray[np.uint8]
    text: str
    said: str
    answers: list[str]


class ShownImages(NamedTuple):
    """A caption and the images that were found for it, [n, side, side, 3], the best first.

    `right` is the place of its own, which comes last where `rank` others, more than are shown,
    stood before it.
    """

    text: str
    pictures: NDArray[np.uint8]
    right: int
    rank: int


class ShownCaptions(NamedTuple):
    """An image [side, side, 3] and the captions that were found for it, the best first.

    `is_right` says which are its own; one comes last where `rank` others stood before the best.
    """

    picture: NDArray[np.uint8]
    texts: list[str]
    is_right: list[bool]
    rank: int


class _Query(NamedTuple):
    number: int
    found: list[int]
    rank: int


def classified_cases(
    rows: Embedded,
    labels: list[str],
    classes: Sequence[str],
    weights: Float[Tensor, "classes dim"],
) -> list[ShownAnswer]:
    """Give right and wrong cases of a zero-shot classification, from all over the rows."""
    assert rows.seen is not None, "pictures are kept"
    said = [classes[number] for number in (rows.image @ weights.T).argmax(1).tolist()]
    is_right = torch.tensor([label == name for label, name in zip(labels, said, strict=True)])
    has_label = torch.tensor([bool(label) for label in labels])
    chosen = [*_some(is_right & has_label, CASES), *_some(~is_right & has_label, CASES)]
    # Products on different machines may differ in their last bits: all show what rank 0 chose.
    chosen, said = gathered((chosen, [said[number] for number in chosen]))[0]
    pictures = _pictures(rows.seen, chosen)
    return [
        ShownAnswer(pictures=pictures[number][None], text="", said=name, answers=[labels[number]])
        for number, name in zip(chosen, said, strict=True)
    ]


def retrieval_cases(
    rows: Embedded, ranks: Ranks, tokenizer: Tokenizer
) -> tuple[list[ShownImages], list[ShownCaptions]]:
    """Give right and wrong cases of retrieval by contrast, text to image and image to text."""
    seen, owners = rows.seen, rows.owners
    assert seen is not None, "pictures are kept"
    images = torch.arange(len(rows.image))
    of_texts = _queries(rows.text, owners, rows.image, images, ranks.text)
    of_images = _queries(rows.image, images, rows.text, owners, ranks.image)
    of_texts, of_images = gathered((of_texts, of_images))[0]
    wanted = [image for query in of_texts for image in query.found]
    pictures = _pictures(seen, [*wanted, *(query.number for query in of_images)])

    def say(text: int) -> str:
        return tokenizer.decode(seen.tokens[text].tolist())

    found_images = [
        ShownImages(
            text=say(query.number),
            pictures=np.stack([pictures[image] for image in query.found]),
            right=query.found.index(int(owners[query.number])),
            rank=query.rank,
        )
        for query in of_texts
    ]
    found_captions = [
        ShownCaptions(
            picture=pictures[query.number],
            texts=[say(text) for text in query.found],
            is_right=[int(owners[text]) == query.number for text in query.found],
            rank=query.rank,
        )
        for query in of_images
    ]
    return found_images, found_captions


def _queries(
    queries: Float[Tensor, "queries dim"],
    owners: Int[Tensor, " queries"],
    others: Float[Tensor, "others dim"],
    other_owners: Int[Tensor, " others"],
    ranks: Int[Tensor, " queries"],
) -> list[_Query]:
    """Queries answered rightly and wrongly; a right answer is among their best or after them."""
    numbers = [*_some(ranks == 0, QUERIES), *_some(ranks > 0, QUERIES)]
    chosen = torch.tensor(numbers, dtype=torch.long)
    found = []
    best = nearest(queries[chosen], owners[chosen], others, other_owners, BEST).tolist()
    for number, answers in zip(numbers, best, strict=True):
        own = (other_owners == owners[number]).nonzero().flatten()
        if not set(answers) & set(own.tolist()):
            answers = [*answers, int(own[(others[own] @ queries[number]).argmax()])]
        found.append(_Query(number, answers, int(ranks[number])))
    return found


def _some(which: Tensor, count: int) -> list[int]:
    """Up to `count` of the numbers where `which` holds, evenly from the first to the last."""
    numbers = which.nonzero().flatten()
    places = torch.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().long()
    return numbers[places].tolist()


def _pictures(seen: Seen, images: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """The pictures of these images by their numbers, from the ranks that have them."""
    own = range(seen.first, seen.first + len(seen.pictures))
    mine = {image: seen.pictures[image - seen.first].numpy() for image in images if image in own}
    return {image: picture for part in gathered(mine) for image, picture in part.items()}
