"""Image-text retrieval: recall@k both ways, with several captions per image."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import RunStop

KS = (1, 5, 10)
QUERY_BLOCK = 1024
LAST_BITS = 1e-6  # of a cosine: what two products of the same rows may differ by


class Ranks(NamedTuple):
    """How many wrong answers stand before the right one, or the best of the right ones."""

    text: Int[Tensor, " texts"]
    image: Int[Tensor, " images"]


def retrieval(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "texts dim"],
    owners: Int[Tensor, " texts"],
) -> Iterator[tuple[str, float]]:
    """Yield recall@1, 5, 10 as shares, text to image and image to text, and chance of each."""
    yield from recalls(rank_by_contrast(image, text, owners), owners)


def recalls(ranks: Ranks, owners: Int[Tensor, " texts"]) -> Iterator[tuple[str, float]]:
    """Yield recall@1, 5, 10 as shares, text to image and image to text, and chance of each."""
    images = len(ranks.image)
    for k in KS:
        yield f"text_to_image_recall_at_{k}", (ranks.text < k).float().mean().item()
        yield f"image_to_text_recall_at_{k}", (ranks.image < k).float().mean().item()
    for k in KS:
        yield f"text_to_image_chance_at_{k}", min(1.0, k / images)
        yield f"image_to_text_chance_at_{k}", _chance_of_images(owners, images, k)


def _chance_of_images(owners: Int[Tensor, " texts"], images: int, k: int) -> float:
    """How often k texts, drawn at random, hold one of an image's own; the mean over images."""
    texts = len(owners)
    k = min(k, texts)
    counts = Counter(owners.bincount(minlength=images).tolist())
    draws = images * math.comb(texts, k)
    missed = sum(number * math.comb(texts - own, k) for own, number in counts.items())
    return (draws - missed) / draws


def rank_by_contrast(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "texts dim"],
    owners: Int[Tensor, " texts"],
) -> Ranks:
    """Rank the right answers of every text and image query by cosine.

    A text query is right at k when its own image is among the k best; an image query when any of
    its captions is (the Karpathy-split convention). A tie counts against the query. O(N M d).
    Raises `RunStop` for embeddings that are not finite, which no comparison would rank.
    """
    if not (image.isfinite().all() and text.isfinite().all()):
        raise RunStop(
            "evaluation: embeddings are not finite, the model has diverged; start a new run with "
            "lower optim.lr"
        )
    best = _best_own(image, text, owners)
    text_ranks = torch.cat(
        [_rank_of_own(text[rows] @ image.T, owners[rows]) for rows in query_blocks(len(text))]
    )
    image_ranks = torch.cat(
        [
            _rank_of_best(image[rows] @ text.T, owners, best[rows], rows.start)
            for rows in query_blocks(len(image))
        ]
    )
    return Ranks(text_ranks, image_ranks)


def nearest(
    queries: Float[Tensor, "queries dim"],
    owners: Int[Tensor, " queries"],
    others: Float[Tensor, "others dim"],
    other_owners: Int[Tensor, " others"],
    k: int,
) -> Int[Tensor, "queries k"]:
    """Give the k best of others for each query; its own, of the same owner, last among equals."""
    k = min(k, len(others))
    found = [torch.empty(0, k, dtype=torch.long)]
    for block in query_blocks(len(queries)):
        scores = queries[block] @ others.T
        scores -= LAST_BITS * (owners[block, None] == other_owners[None])
        found.append(scores.topk(k).indices)
    return torch.cat(found)


def query_blocks(count: int) -> list[slice]:
    """Rows of queries whose scores with everything are held at once."""
    return [slice(start, start + QUERY_BLOCK) for start in range(0, count, QUERY_BLOCK)]


def _best_own(image: Tensor, text: Tensor, owners: Tensor) -> Tensor:
    """The best score of each image among its own captions; shape [images]."""
    own = (image[owners] * text).sum(dim=1)
    best = torch.full((len(image),), -torch.inf, dtype=own.dtype)
    return best.scatter_reduce(0, owners, own, "amax")


def _rank_of_own(scores: Tensor, own: Tensor) -> Tensor:
    """How many other images score at least as high as the own one; shape [queries]."""
    mine = scores.gather(1, own[:, None])
    return (scores >= mine).sum(dim=1) - 1


def _rank_of_best(scores: Tensor, owners: Tensor, best: Tensor, first: int) -> Tensor:
    """How many captions of other images score at least as high as the best own one."""
    foreign = owners[None, :] != torch.arange(first, first + len(scores))[:, None]
    # The own score was computed in another product; allow its last bits.
    return ((scores >= best[:, None] - LAST_BITS) & foreign).sum(dim=1)
