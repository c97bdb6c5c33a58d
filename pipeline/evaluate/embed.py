"""Evaluation rows -> embeddings of all of them, on every rank; the work split over ranks.

Enters: a forward, eval batches. Leaves: `Embedded`. Features are gathered here, after training
steps, never in them. Must not know: how the model was trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.batches import Batch
from pipeline.errors import RunStop

Kind = Literal["shared", "independent", "both"]


class Parts(NamedTuple):
    """Unit-norm features of a batch; None for an input that was not given, or a part not made."""

    image: Tensor | None
    text: Tensor | None
    image_independent: Tensor | None = None
    text_independent: Tensor | None = None

    def chosen(self, kind: Kind) -> tuple[Tensor | None, Tensor | None]:
        """Image and text embeddings: one of the parts, or both side by side; unit-norm."""
        if kind == "shared":
            return self.image, self.text
        if kind == "independent":
            return self.image_independent, self.text_independent
        return (
            _side_by_side(self.image, self.image_independent),
            _side_by_side(self.text, self.text_independent),
        )


def _side_by_side(shared: Tensor | None, independent: Tensor | None) -> Tensor | None:
    if shared is None or independent is None:
        return None
    return torch.cat([shared, independent], dim=1) / 2**0.5


# forward(images, tokens): either input may be None.
Forward = Callable[[Tensor | None, Tensor | None], Parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """All evaluation rows: image [N, d], text [M, d] unit-norm fp32 on the CPU.

    Caption m belongs to image `owners[m]`. The independent parts have the same rows, where there
    are any. `labels` has N entries per column, "" for none. `bad_rows` were dropped,
    `cut_captions` cut to the context length.
    """

    image: Tensor
    text: Tensor
    image_independent: Tensor | None
    text_independent: Tensor | None
    owners: Tensor
    labels: dict[str, list[str]]
    bad_rows: int
    cut_captions: int

    def chosen(self, kind: Kind) -> tuple[Tensor, Tensor]:
        """Image and text embeddings of a kind."""
        parts = Parts(self.image, self.text, self.image_independent, self.text_independent)
        image, text = parts.chosen(kind)
        if image is None or text is None:
            raise RunStop(
                f"evaluate.embedding is {kind!r}, and the model has no independent features; it "
                "was trained without structure.separation: choose shared"
            )
        return image, text

    @property
    def first_captions(self) -> Tensor:
        """The number of each image's first caption; shape [N]."""
        numbers = torch.arange(len(self.owners))
        first = torch.full((len(self.image),), len(self.owners))
        return first.scatter_reduce(0, self.owners, numbers, "amin")


@dataclass(kw_only=True, slots=True)
class _Found:
    """What this rank has embedded: rows of each part, the owners of `text`, the rest as it came."""

    parts: dict[str, list[Tensor]]
    owners: list[int]
    labels: dict[str, list[str]]
    rows: int = 0
    bad: int = 0
    cut: int = 0

    def add(self, parts: Parts, rows: int) -> None:
        """Keep the first rows of each part."""
        for name, part in parts._asdict().items():
            if part is not None:
                self.parts.setdefault(name, []).append(part[:rows].float().cpu())


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
    found = _Found(parts={}, owners=[], labels={})
    more: list[tuple[int, Tensor]] = []
    while True:
        batch = next(batches, None)
        if not any_rank(batch is not None, device):
            break
        inputs = blank if batch is None else (batch.images, batch.tokens)
        parts = forward(inputs[0].to(device), inputs[1].to(device))
        if batch is None:
            continue
        found.add(parts, batch.rows)
        found.owners.extend(range(found.rows, found.rows + batch.rows))
        for index, tokens in enumerate(batch.more_tokens):
            more.extend((found.rows + index, torch.from_numpy(row.copy())) for row in tokens)
        for column, values in batch.labels.items():
            found.labels.setdefault(column, []).extend(values)
        found.rows += batch.rows
        found.bad += len(batch.bad)
        found.cut += batch.cut
    for parts, rows in _embed_more(forward, [tokens for _, tokens in more], blank[1], device):
        found.add(parts, rows)
    found.owners.extend(owner for owner, _ in more)
    return _gather(found)


def _embed_more(
    forward: Forward, tokens: list[Tensor], blank: Tensor, device: torch.device
) -> Iterator[tuple[Parts, int]]:
    """Embed the further captions of images, a batch at a time, in step with the other ranks."""
    for start in range(0, int(max_rank(len(tokens), device)), len(blank)):
        chunk = tokens[start : start + len(blank)]
        padded = blank.clone()
        for index, row in enumerate(chunk):
            padded[index] = row
        parts = forward(None, padded.to(device))
        if chunk:
            yield parts, len(chunk)


def _gather(found: _Found) -> Embedded:
    ranks = [found]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = [found] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
    full = [rank for rank in ranks if rank.rows]
    if not full:
        raise RunStop("data.val: no usable row; look at its images and captions")
    owners, first = [], 0
    for rank in ranks:
        owners.append(torch.tensor(rank.owners, dtype=torch.long) + first)
        first += rank.rows
    parts = {
        name: torch.cat([part for rank in full for part in rank.parts[name]])
        for name in full[0].parts
    }
    return Embedded(
        image=parts["image"],
        text=parts["text"],
        image_independent=parts.get("image_independent"),
        text_independent=parts.get("text_independent"),
        owners=torch.cat(owners),
        labels={
            column: [value for rank in full for value in rank.labels[column]]
            for column in full[0].labels
        },
        bad_rows=sum(rank.bad for rank in ranks),
        cut_captions=sum(rank.cut for rank in ranks),
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
