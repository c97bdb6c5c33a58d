"""Evaluation rows -> embeddings of all of them, on every rank; the work split over ranks.

Enters: a forward, eval batches. Leaves: `Embedded`. Features are gathered here, after training
steps, never in them. Must not know: how the model was trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.batches import Batch
from pipeline.errors import RunStop

# forward(images, tokens) -> (image embeddings, text embeddings, ...); either input may be None.
Forward = Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """All evaluation rows: image [N, d], text [M, d] unit-norm fp32 on the CPU.

    Caption m belongs to image `owners[m]`. `labels` has N entries per column, "" for none.
    `bad_rows` were dropped, `cut_captions` cut to the context length.
    """

    image: Tensor
    text: Tensor
    owners: Tensor
    labels: dict[str, list[str]]
    bad_rows: int
    cut_captions: int


@torch.no_grad()
def embed_rows(
    forward: Forward,
    batches: Iterator[Batch],
    blank: tuple[Tensor, Tensor],
    device: torch.device,
) -> Embedded:
    """Run `forward` over this rank's batches and gather all ranks' results in rank order.

    Ranks call `forward` equally often, with `blank` (images, tokens of a batch) where one has
    fewer rows: under ZeRO-3 a forward is a collective.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    owners: list[int] = []
    labels: dict[str, list[str]] = {}
    more: list[tuple[int, Tensor]] = []
    bad = cut = rows = 0
    while True:
        batch = next(batches, None)
        if not any_rank(batch is not None, device):
            break
        inputs = blank if batch is None else (batch.images, batch.tokens)
        image, text = forward(inputs[0].to(device), inputs[1].to(device))
        if batch is None or image is None or text is None:
            continue
        images.append(image[: batch.rows].float().cpu())
        texts.append(text[: batch.rows].float().cpu())
        owners.extend(range(rows, rows + batch.rows))
        for index, tokens in enumerate(batch.more_tokens):
            more.extend((rows + index, torch.from_numpy(row.copy())) for row in tokens)
        for column, values in batch.labels.items():
            labels.setdefault(column, []).extend(values)
        rows += batch.rows
        bad += len(batch.bad)
        cut += batch.cut
    texts.extend(_embed_more(forward, [tokens for _, tokens in more], blank[1], device))
    owners.extend(owner for owner, _ in more)
    return _gather(images, texts, owners, labels, bad, cut)


def _embed_more(
    forward: Forward, tokens: list[Tensor], blank: Tensor, device: torch.device
) -> Iterator[Tensor]:
    """Embed the further captions of images, a batch at a time, in step with the other ranks."""
    for start in range(0, int(max_rank(len(tokens), device)), len(blank)):
        chunk = tokens[start : start + len(blank)]
        padded = blank.clone()
        for index, row in enumerate(chunk):
            padded[index] = row
        _, text = forward(None, padded.to(device))
        if chunk and text is not None:
            yield text[: len(chunk)].float().cpu()


def _gather(
    images: list[Tensor],
    texts: list[Tensor],
    owners: list[int],
    labels: dict[str, list[str]],
    bad: int,
    cut: int,
) -> Embedded:
    mine = (
        torch.cat(images) if images else torch.empty(0, 0),
        torch.cat(texts) if texts else torch.empty(0, 0),
        torch.tensor(owners, dtype=torch.long),
        labels,
        bad,
        cut,
    )
    parts = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [mine] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part[0]))
    full = [part for part in parts if len(part[0])]
    if not full:
        raise RunStop("data.val: no usable row; look at its images and captions")
    return Embedded(
        image=torch.cat([part[0] for part in full]),
        text=torch.cat([part[1] for part in full]),
        owners=torch.cat([part[2] + offset for part, offset in zip(parts, offsets, strict=False)]),
        labels={
            column: [value for part in full for value in part[3][column]] for column in full[0][3]
        },
        bad_rows=sum(part[4] for part in parts),
        cut_captions=sum(part[5] for part in parts),
    )


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any rank."""
    return max_rank(float(flag), device) > 0


def max_rank(value: float, device: torch.device) -> float:
    """The largest `value` of all ranks."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()
