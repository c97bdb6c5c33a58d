"""What every contrastive loss takes, gives and keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

State = dict[str, Any]  # plain values and tensors, for torch.save
Gather = Callable[[Any], list[Any]]  # gives every worker's value, in rank order


@dataclass(frozen=True, kw_only=True, slots=True)
class LossValue:
    """`loss` to run backward on; `metrics` are detached scalars to log (local to this worker).

    `diagnose` gives further scalars, too costly for every step.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    diagnose: Callable[[], dict[str, Tensor]] = field(default=dict)


def own_or_mean(states: Sequence[State], rank: int, world_size: int) -> State:
    """This worker's numbers, or the mean of all workers' when their number has changed."""
    chosen = [states[rank]] if len(states) == world_size else states
    return {name: sum(state[name] for state in chosen) / len(chosen) for name in chosen[0]}


class Stateful(Protocol):
    """What has running state on each worker, measured there."""

    def share(self, gather: Gather) -> None:
        """Tell the other workers what they will need; all call it at the same step."""
        ...

    def state_dict(self) -> State:
        """This worker's part of the running state."""
        ...

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read the parts of all workers of the time, whose number may differ from `world_size`."""
        ...


class Loss(Stateful, Protocol):
    """A loss of this worker's pairs; the mean over workers is what training minimises."""

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        image_log_z: Float[Tensor, " local"] | None = None,
        text_log_z: Float[Tensor, " local"] | None = None,
        logit_bias: Float[Tensor, ""] | None = None,
        keys: Int[Tensor, " local"] | None = None,
    ) -> LossValue:
        """Give the loss of unit-norm embeddings; row i of both is pair i.

        `image_log_z`, `text_log_z` are a trained prior's predictions, `logit_bias` is added to
        sigmoid logits, `keys` are the rows' identities; a loss ignores what it has no use for.
        """
        ...
