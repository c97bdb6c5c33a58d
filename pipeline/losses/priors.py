"""Priors: what is believed of an anchor's normaliser before its batch is seen.

A prior predicts a_i = log E_j e^{s_ij}; how much it is worth is measured in normalizer.py.

Enters: embeddings, row identities, what the loss concluded. Leaves: predictions [b].
Must not know: how workers talk to each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.losses.base import Gather, State

HIDDEN = 256  # units of the amortized prior's layer
LEVEL_GAIN = 0.1  # of the history's running level: about ten batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """Of one direction's anchors after their batch, [b] each.

    log_z is log E_j e^{s_ij} as the loss took it, batch and prior mixed; tilt is d log_z / d scale.
    """

    log_z: Tensor
    tilt: Tensor


class Prior(Protocol):
    """A belief held by this worker. A trained one is a module of the model instead: see below."""

    @property
    def most_worth(self) -> float:
        """The most negatives that it can stand for now."""
        ...

    def predict(
        self, image: Tensor, text: Tensor, scale: Tensor, keys: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Give a_i of image and text anchors, [b] each; None where nothing is known (yet)."""
        ...

    def observe(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        keys: Tensor | None,
        seen: Sequence[Observation],
    ) -> None:
        """Learn from a batch, after its loss.

        `image`, `text` [b, dim] are detached; `seen` has one item for each direction's anchors.
        """
        ...

    def share(self, gather: Gather) -> None:
        """Tell the other workers what they will need; all call it at the same step."""
        ...

    def state_dict(self) -> State:
        """This worker's part."""
        ...

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read the parts of all workers of the time, whose number may differ from now."""
        ...


class QueuePrior:
    """Log-mean-exp over this worker's latest embeddings, scored anew against the anchors.

    As long as they are fresh, mixing them in by their number makes the gradient that of InfoNCE at
    K = queue + batch in expectation, though only the batch's negatives carry gradient.
    """

    def __init__(self, size: int, embed_dim: int, *, one_sided: bool = False):
        """Hold `size` pairs of dimension `embed_dim`; `one_sided`: of each only the second half.

        A queue of one side predicts for the first side's anchors alone.
        """
        self._size = size
        self._held: dict[str, Tensor] = {"keys": torch.full((size,), -1)}
        for side in ("text",) if one_sided else ("image", "text"):
            self._held[side] = torch.zeros(size, embed_dim)
        self._count = 0
        self._next = 0

    @property
    def most_worth(self) -> float:
        """The pairs it holds: until it is full it knows less than it will."""
        return self._count

    @property
    def texts(self) -> Float[Tensor, "held dim"]:
        """What the first side's anchors are scored against."""
        return self._held["text"][: self._count]

    def predict(
        self, image: Tensor, text: Tensor, scale: Tensor, keys: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Score the queue: [b] each, None while it is empty, or of a side that it does not hold.

        An anchor's own row, should it still be there, is left out.
        """
        if not self._count:
            return None, None
        own = None
        if keys is not None:
            held = self._held["keys"][: self._count]
            own = (keys.to(held)[:, None] == held).to(image.device)
        log_z = self._score(image, "text", scale, own)
        return log_z, self._score(text, "image", scale, own) if "image" in self._held else None

    def _score(self, anchors: Tensor, side: str, scale: Tensor, own: Tensor | None) -> Tensor:
        logits = scale * (anchors @ self._held[side][: self._count].to(anchors).T)
        if own is None:
            return logits.logsumexp(1) - math.log(self._count)
        log_count = (~own).sum(1).clamp(min=1).log()
        return logits.masked_fill(own, -math.inf).logsumexp(1) - log_count

    def observe(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        keys: Tensor | None,
        seen: Sequence[Observation],
    ) -> None:
        """Put the batch in, over the oldest rows."""
        del scale, seen
        rows = min(len(image), self._size)
        places = (self._next + torch.arange(rows, device=image.device)) % self._size
        keys = torch.full((rows,), -1) if keys is None else keys
        come = {"image": image, "text": text, "keys": keys}
        for name in self._held:
            held = self._held[name] = self._held[name].to(image.device)
            held[places] = come[name][:rows].to(held)
        self._next = (self._next + rows) % self._size
        self._count = min(self._count + rows, self._size)

    def share(self, gather: Gather) -> None:
        """Nothing: each worker's queue is its own."""

    def state_dict(self) -> State:
        """The held rows, oldest first."""
        order = (self._next - self._count + torch.arange(self._count)) % self._size
        return {name: held[order.to(held.device)].cpu() for name, held in self._held.items()}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Take this worker's rows, or an equal share of all when the number of workers changed."""
        if len(states) == world_size:
            rows = states[rank]
        else:
            rows = {
                name: torch.cat([state[name] for state in states])[rank::world_size]
                for name in self._held
            }
        for name, held in self._held.items():
            kept = rows[name][-self._size :]
            self._count = len(kept)
            held[: self._count] = kept.to(held)
        self._next = self._count % self._size


class HistoryPrior:
    """What the loss concluded of each row when it last came by, corrected for what moved since.

    A row's deviation from the running level is kept, with its tilt: when the logit scale moves by
    D, log Z_i moves by D times the tilt, so its deviation by D times (tilt - mean tilt); the level
    carries the rest of the drift. What is kept is the posterior, so the gain of this moving average
    is the batch weight g that `Evidence` measures. A row not seen before is predicted at the level.
    Worth little in runs of few epochs, and 20 bytes a row on every worker, since the order brings a
    row to another worker each epoch; `share` brings what is known of it there.
    """

    def __init__(self, num_rows: int, *, rank: int, world_size: int):
        """Rows have keys 0 .. num_rows - 1."""
        self._rank, self._world_size = rank, world_size
        self._deviation = torch.full((2, num_rows), math.nan)
        self._tilt = torch.zeros(2, num_rows)
        self._scale = torch.zeros(num_rows)
        self._level: list[float | None] = [None, None]
        self._mean_tilt = [0.0, 0.0]
        self._new: list[Tensor] = []

    @property
    def most_worth(self) -> float:
        """No bound: what it remembers may come from many batches."""
        return math.inf

    def predict(
        self, image: Tensor, text: Tensor, scale: Tensor, keys: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Give what is remembered of `keys`, [b] each; None before the first batch.

        Raises ValueError without keys.
        """
        del text
        if keys is None:
            raise ValueError("a history needs keys; give the rows' identities")
        if self._level[0] is None:
            return None, None
        rows = keys.cpu()
        moved = scale.cpu() - self._scale[rows]
        found = []
        for side in (0, 1):
            deviation = self._deviation[side, rows] + self._tilt[side, rows] * moved
            level = self._level[side]
            assert level is not None
            found.append((level + deviation.nan_to_num(0.0)).to(image))
        return found[0], found[1]

    def observe(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        keys: Tensor | None,
        seen: Sequence[Observation],
    ) -> None:
        """Remember a batch, and move the level toward it."""
        del image, text
        assert keys is not None
        rows = keys.cpu()
        for side, observation in enumerate(seen):
            log_z, tilt = observation.log_z.cpu().float(), observation.tilt.cpu().float()
            if not log_z.isfinite().all():
                continue
            level = self._level[side]
            gain = 1.0 if level is None else LEVEL_GAIN
            level = float(log_z.mean()) * gain + (level or 0.0) * (1 - gain)
            self._level[side] = level
            mean = float(tilt.mean()) * gain + self._mean_tilt[side] * (1 - gain)
            self._mean_tilt[side] = mean
            self._deviation[side, rows] = log_z - level
            self._tilt[side, rows] = tilt - mean
        self._scale[rows] = float(scale)
        self._new.append(rows)

    def share(self, gather: Gather) -> None:
        """Give the rows seen since the last call to every worker; 24 bytes a row."""
        rows = torch.cat(self._new).unique() if self._new else torch.zeros(0, dtype=torch.long)
        self._new = []
        for part in gather(self._part(rows)):
            self._take(part)

    def _part(self, rows: Tensor) -> State:
        return {
            "rows": rows,
            "deviation": self._deviation[:, rows],
            "tilt": self._tilt[:, rows],
            "scale": self._scale[rows],
        }

    def _take(self, part: State) -> None:
        rows = part["rows"]
        self._deviation[:, rows] = part["deviation"]
        self._tilt[:, rows] = part["tilt"]
        self._scale[rows] = part["scale"]

    def state_dict(self) -> State:
        """The rows that fall to this worker in a checkpoint (call `share` before), the level."""
        known = (~self._deviation[0].isnan()).nonzero().squeeze(1)
        mine = known[known % self._world_size == self._rank]
        return {**self._part(mine), "level": list(self._level), "mean_tilt": self._mean_tilt}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Take all workers' rows, and the level of one's own (rank 0's for a new worker)."""
        del world_size
        for state in states:
            self._take(state)
        own = states[rank] if rank < len(states) else states[0]
        self._level, self._mean_tilt = list(own["level"]), list(own["mean_tilt"])


class AmortizedPrior(nn.Module):
    """Predicts log E_j e^{s_ij} from an anchor's embedding and the logit scale; one net a side.

    No per-sample state: it works when every sample is seen once. It trains by `prior_deviance`
    with the towers, as a part of the model: its predictions are given to the loss.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.image = _predictor(embed_dim)
        self.text = _predictor(embed_dim)

    def forward(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, " local"], Float[Tensor, " local"]]:
        """Give (image_log_z, text_log_z), fp32, with gradient to this module only."""
        return self._predict(self.image, image, logit_scale), self._predict(
            self.text, text, logit_scale
        )

    @staticmethod
    def _predict(net: nn.Sequential, anchors: Tensor, logit_scale: Tensor) -> Tensor:
        scale = logit_scale.detach().log().expand(len(anchors), 1)
        inputs = torch.cat([anchors.detach().float(), scale.float()], dim=1)
        weight = next(net.parameters())
        return net(inputs.to(weight.dtype)).squeeze(1).float()


def _predictor(embed_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(embed_dim + 1, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))
