"""Image-text retrieval: recall@k both ways, with several captions per image."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import RunStop

KS = (1, 5, 10)
QUERY_BLOCK = 1024


def retrieval(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "texts dim"],
    owners: Int[Tensor, " texts"],
) -> Iterator[tuple[str, float]]:
    """Yield recall@1, 5, 10 as shares, text to image and image to text, and chance.

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
        [_rank_of_own(text[rows] @ image.T, owners[rows]) for rows in _blocks(len(text))]
    )
    image_ranks = torch.cat(
        [
            _rank_of_best(image[rows] @ text.T, owners, best[rows], rows.start)
            for rows in _blocks(len(image))
        ]
    )
    for k in KS:
        yield f"text_to_image_recall_at_{k}", (text_ranks < k).float().mean().item()
        yield f"image_to_text_recall_at_{k}", (image_ranks < k).float().mean().item()
    yield "text_to_image_chance_at_1", 1 / len(image)
    yield "image_to_text_chance_at_1", 1 / len(image)


def _blocks(count: int) -> list[slice]:
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
    return ((scores >= best[:, None] - 1e-6) & foreign).sum(dim=1)
