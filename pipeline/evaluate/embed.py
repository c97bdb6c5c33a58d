"""Evaluation rows -> embeddings of all of them, on every rank; the work split over ranks.

Enters: a forward, eval batches. Leaves: `Embedded`. Features are gathered here, after training
steps, never in them. Must not know: how the model was trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batches import Batch
from pipeline.errors import RunStop

Kind = Literal["shared", "independent", "both"]
PICTURE_SIDE = 96  # at most, of a picture that is kept to be shown


class Parts(NamedTuple):
    """Unit-norm features of a batch; None for an input that was not given, or a part not made.

    `image_states` [batch, patches, width], of a model that can look at images again, are no part.
    """

    image: Tensor | None
    text: Tensor | None
    image_independent: Tensor | None = None
    text_independent: Tensor | None = None
    image_states: Tensor | None = None

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
class Unfused:
    """What a matching head is shown: states of this rank's images, tokens of all captions.

    `states` has [patches, width] of each image from number `first` on, on the CPU as the model gave
    them. `blank` is an image like them. `tokens` are [M, length] int32, the same on every rank.
    """

    states: list[Tensor]
    first: int
    blank: Tensor
    tokens: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a person can be shown: small pictures of this rank's images, tokens of all captions.

    `pictures` has [side, side, 3] uint8 of each image from number `first` on, `tokens` are
    [M, length] int32, the same on every rank.
    """

    pictures: list[Tensor]
    first: int
    tokens: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """All evaluation rows: image [N, d], text [M, d] unit-norm fp32 on the CPU.

    Caption m belongs to image `owners[m]`. The independent parts have the same rows, where there
    are any. `labels` has N entries per column, "" for none. `bad_rows` were dropped,
    `cut_captions` cut to the context length. `unfused` and `seen` are there if they were to be
    kept.
    """

    image: Tensor
    text: Tensor
    image_independent: Tensor | None
    text_independent: Tensor | None
    owners: Tensor
    labels: dict[str, list[str]]
    bad_rows: int
    cut_captions: int
    unfused: Unfused | None
    seen: Seen | None = None

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
    """What this rank has embedded: rows of each part, the owners of `text`, the rest as it came.

    All of it goes to every rank; `tokens` are kept if images' states or pictures are.
    """

    parts: dict[str, list[Tensor]]
    owners: list[int]
    labels: dict[str, list[str]]
    tokens: list[Tensor] = field(default_factory=list)
    rows: int = 0
    bad: int = 0
    cut: int = 0

    def add(self, parts: Parts, rows: int) -> None:
        """Keep the first rows of each part."""
        for name, part in parts._replace(image_states=None)._asdict().items():
            if part is not None:
                self.parts.setdefault(name, []).append(part[:rows].float().cpu())


@dataclass(kw_only=True, slots=True)
class _States:
    """States of this rank's images, one by one, and of some image, if only a blank one."""

    found: list[Tensor] = field(default_factory=list)
    blank: Tensor | None = None

    def add(self, states: Tensor | None, rows: int) -> None:
        """Keep the first rows on the CPU: of many images they are more than a device holds."""
        if states is None:
            raise RunStop(
                "evaluate.rerank is set, and the model has no matching head, which only a fusion "
                "model has: leave it out"
            )
        self.found.extend(states[:rows].cpu())
        self.blank = states[0].cpu()


@torch.no_grad()
def embed_rows(
    forward: Forward,
    batches: Iterator[Batch],
    blank: tuple[Tensor, Tensor],
    device: torch.device,
    *,
    keeps_states: bool = False,
    keeps_pictures: bool = False,
) -> Embedded:
    """Run `forward` over this rank's batches and gather all ranks' results in rank order.

    Ranks call `forward` equally often, with `blank` (images, tokens of a batch) where one has
    fewer rows: under ZeRO-3 a forward is a collective. With `keeps_states` what a matching head
    needs is kept, see `Unfused`; with `keeps_pictures` what a person can be shown, see `Seen`.
    """
    found = _Found(parts={}, owners=[], labels={})
    states = _States() if keeps_states else None
    pictures: list[Tensor] | None = [] if keeps_pictures else None
    more: list[tuple[int, Tensor]] = []
    while True:
        batch = next(batches, None)
        if not any_rank(batch is not None, device):
            break
        inputs = blank if batch is None else (batch.images, batch.tokens)
        parts = forward(inputs[0].to(device), inputs[1].to(device))
        if states is not None:
            states.add(parts.image_states, 0 if batch is None else batch.rows)
        if batch is None:
            continue
        found.add(parts, batch.rows)
        if pictures is not None:
            pictures.extend(_small(batch.images[: batch.rows]))
        # Cloned: a view would carry its whole batch to the other ranks.
        found.tokens.extend(row.clone() for row in batch.tokens[: batch.rows])
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
    found.tokens.extend(tokens for _, tokens in more)
    if states is None and pictures is None:
        found.tokens = []
    return _gather(found, states, pictures)


def _small(images: Tensor) -> Tensor:
    """Pictures [b, side, side, 3] uint8, shrunk to what a gallery shows."""
    side = min(images.shape[1], PICTURE_SIDE)
    shrunk = F.interpolate(images.permute(0, 3, 1, 2).float(), size=(side, side), mode="area")
    return shrunk.round().byte().permute(0, 2, 3, 1).contiguous()


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


def _gather(found: _Found, states: _States | None, pictures: list[Tensor] | None) -> Embedded:
    ranks = gathered(found)
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
        unfused=None if states is None else _unfused(ranks, states),
        seen=None if pictures is None else _seen(ranks, pictures),
    )


def _unfused(ranks: list[_Found], states: _States) -> Unfused:
    assert states.blank is not None, "some rank has rows, so each has called forward"
    return Unfused(
        states=states.found, first=_first(ranks), blank=states.blank, tokens=_tokens(ranks)
    )


def _seen(ranks: list[_Found], pictures: list[Tensor]) -> Seen:
    return Seen(pictures=pictures, first=_first(ranks), tokens=_tokens(ranks))


def _first(ranks: list[_Found]) -> int:
    """The number of this rank's first image."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return sum(before.rows for before in ranks[:rank])


def _tokens(ranks: list[_Found]) -> Tensor:
    return torch.stack([row for each in ranks for row in each.tokens])


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, any object that can be pickled, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
