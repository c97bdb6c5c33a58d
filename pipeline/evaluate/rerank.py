"""Retrieval by a matching head: of each query the best by contrast, ordered anew (ALBEF).

Each rank matches the pairs whose image it has embedded: states of images, by far the largest part
(577 x 768 numbers at 384 pixels), then stay where they are, and only captions' tokens and scores
travel. Captions are encoded again for each pair, which takes about a fifth of the time of fusing
them and spares every rank the states of all. A pair that both directions want is matched once.

Enters: embeddings of all rows, states of this rank's images. Leaves: ranks, the same on all ranks.
Must not know: the model.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import RunStop
from pipeline.evaluate.embed import Embedded, Unfused, gathered, max_rank
from pipeline.evaluate.retrieval import Ranks, nearest

# match(states of images [pairs, patches, width], tokens [pairs, length]): scores [pairs].
Match = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def rerank(
    match: Match, rows: Embedded, before: Ranks, *, k: int, batch: int, device: torch.device
) -> Ranks:
    """Rank anew, by `match`, what contrast, whose ranks are `before`, has among its k best.

    All others stay below, as they were. A tie counts against the query. `batch` pairs are matched
    at once, at most (N + M) k in all, each rank its share. O(N M d) besides, as contrast. Raises
    `RunStop` for scores that are not finite.
    """
    unfused = rows.unfused
    assert unfused is not None, "what is to be matched is kept"
    images, owners = torch.arange(len(rows.image)), rows.owners
    texts = torch.arange(len(owners))
    own = slice(unfused.first, unfused.first + len(unfused.states))
    is_own = (owners >= own.start) & (owners < own.stop)
    # Each rank chooses for its own queries, and all take what it chose: products on different
    # machines may differ in their last bits.
    of_texts = torch.cat(
        gathered(nearest(rows.text[is_own], owners[is_own], rows.image, images, k))
    )
    of_images = torch.cat(gathered(nearest(rows.image[own], images[own], rows.text, owners, k)))
    # A pair's number: sorted, those of an image are together, and those of a rank.
    by_text = of_texts * len(texts) + texts[:, None]
    by_image = images[:, None] * len(texts) + of_images
    wanted = torch.cat([by_text.flatten(), by_image.flatten()]).unique()
    mine = wanted[(wanted >= own.start * len(texts)) & (wanted < own.stop * len(texts))]
    scores = torch.cat(gathered(_score(match, unfused, mine, batch, device)))
    if not scores.isfinite().all():
        raise RunStop(
            "evaluation: scores of the matching head are not finite, the model has diverged; start "
            "a new run with lower optim.lr"
        )
    return Ranks(
        _anew(scores[torch.searchsorted(wanted, by_text)], of_texts == owners[:, None], before[0]),
        _anew(
            scores[torch.searchsorted(wanted, by_image)],
            owners[of_images] == images[:, None],
            before[1],
        ),
    )


def _score(
    match: Match,
    unfused: Unfused,
    pairs: Int[Tensor, " pairs"],
    batch: int,
    device: torch.device,
) -> Float[Tensor, " pairs"]:
    """Match this rank's pairs, a batch at a time, in step with the other ranks."""
    images, texts = pairs // len(unfused.tokens) - unfused.first, pairs % len(unfused.tokens)
    found = [torch.empty(0, device=device)]
    for start in range(0, int(max_rank(len(pairs), device)), batch):
        chunk = slice(start, start + batch)
        if start >= len(pairs):
            match(unfused.blank[None].to(device), unfused.tokens[:1].to(device))
            continue
        # Neighbours share their image: few states go to the device.
        few, which = images[chunk].unique(return_inverse=True)
        states = torch.stack([unfused.states[image] for image in few.tolist()]).to(device)
        tokens = unfused.tokens[texts[chunk]].to(device)
        found.append(match(states[which.to(device)], tokens).float())
    return torch.cat(found).cpu()


def _anew(
    scores: Float[Tensor, "queries k"], is_right: Tensor, before: Int[Tensor, " queries"]
) -> Int[Tensor, " queries"]:
    """Ranks among the k best where a right one is there; else those of `before`, below them all."""
    best = scores.masked_fill(~is_right, -torch.inf).amax(1)
    ahead = ((scores >= best[:, None]) & ~is_right).sum(1)
    return torch.where(is_right.any(1), ahead, before.clamp(min=scores.shape[1]))
