"""Comparators of the gamma loss: other contrastive losses, with the communication each one needs.

The one file of losses/ that may touch torch.distributed; the gamma loss beside it cannot.
Notation: W workers, b local pairs, B = Wb, d dimensions, s_ij = logit_scale <image_i, text_j>;
U = 4 (W-1) b d bytes, what a worker receives when fp32 features of one side are gathered.
Enters: local embeddings. Leaves: a scalar and metrics.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.losses.base import Gather, LossValue, State
from pipeline.losses.carry import carry, wide

LOG_EPS = math.log(1e-14)  # FastCLIP's eps, beside e^{margin} averaged over negatives


class _Stateless(ABC):
    """A loss that keeps nothing between steps."""

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        image_log_z: Tensor | None = None,
        text_log_z: Tensor | None = None,
        logit_bias: Float[Tensor, ""] | None = None,
        keys: Tensor | None = None,
    ) -> LossValue:
        """Give the loss of unit-norm embeddings; every worker must hold equally many pairs.

        Raises ValueError where a sigmoid loss is given no `logit_bias`.
        """
        del image_log_z, text_log_z, keys
        loss = self._loss(image, text, logit_scale, logit_bias)
        metrics = {"loss": loss.detach(), "logit_scale": logit_scale.detach()}
        if logit_bias is not None:
            metrics["logit_bias"] = logit_bias.detach()
        return LossValue(loss=loss, metrics=metrics)

    @abstractmethod
    def _loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        """Give the scalar."""

    def share(self, gather: Gather) -> None:
        """Nothing to share."""
        del gather

    def state_dict(self) -> State:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Nothing to read."""
        del states, rank, world_size


class InfoNCELocal(_Stateless):
    """CLIP's symmetric cross-entropy on the local batch alone; logits b x b, bytes 0."""

    def _loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        del logit_bias
        return _cross_entropy(logit_scale, (image, text), (image, text), first=0)


class InfoNCEGathered(_Stateless):
    """InfoNCE over the global batch: local anchors against all workers' gathered embeddings.

    The "local loss, gather with gradient" form: the mean of this loss over W workers is InfoNCE on
    the whole batch, and so is the mean of its gradients. Logits b x B twice on each worker. Bytes
    received: 2U forward, and 2U backward as the embeddings' gradients are reduce-scattered.
    """

    def _loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        del logit_bias
        everyone = gather_rows(image), gather_rows(text)
        return _cross_entropy(logit_scale, (image, text), everyone, first=len(image) * _rank())


def _cross_entropy(
    scale: Tensor, mine: tuple[Tensor, Tensor], everyone: tuple[Tensor, Tensor], *, first: int
) -> Tensor:
    """Both directions' mean, of (image, text) rows that are rows `first`... of everyone's."""
    labels = torch.arange(first, first + len(mine[0]), device=mine[0].device)
    return 0.5 * (
        F.cross_entropy(scale * (mine[0] @ everyone[1].T), labels)
        + F.cross_entropy(scale * (mine[1] @ everyone[0].T), labels)
    )


class SigmoidLocal(_Stateless):
    """SigLIP's loss on local pairs: sum_ij -log sigmoid(z_ij (s_ij + bias)) / b.

    z is +1 for i = j and -1 otherwise; one matrix serves both directions. Logits b x b, bytes 0.
    Source: "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023).
    """

    def _loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        bias = _required(logit_bias)
        return _sigmoid_sum(image, text, logit_scale, bias, own=True) / len(image)


class SigmoidRing(_Stateless):
    """SigLIP's loss over the global batch; the mean over workers is SigmoidLocal's of all pairs.

    Text blocks go round a ring. Where a block passes, its pairs with the local images are scored
    and differentiated at once, and what the block's gradient has become travels on with it, so the
    last hop brings it home and backward moves nothing. Logits b x b at a time. Bytes received: U
    of text in W-1 hops, U of gradients in W-1 hops, each of them one hop later.
    """

    def _loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        inputs = (image, text, logit_scale, _required(logit_bias))
        x, block, scale, bias = (wide(part) for part in inputs)
        total, (by_x, by_y, by_scale, by_bias) = _sigmoid_gradients(x, block, scale, bias, own=True)
        travelling: list[Tensor] = []
        for _ in range(_world_size() - 1):
            block, *travelling = _pass_on([block, *travelling])
            value, (more_x, by_block, more_scale, more_bias) = _sigmoid_gradients(
                x, block, scale, bias, own=False
            )
            total, by_x = total + value, by_x + more_x
            by_scale, by_bias = by_scale + more_scale, by_bias + more_bias
            travelling = [sum(travelling, by_block)]
        if travelling:
            by_y = by_y + _pass_on(travelling)[0]
        return carry(total, inputs, (by_x, by_y, by_scale, by_bias)) / len(image)


def _sigmoid_sum(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """Sum over all pairs of rows; where they are each other's `own`, row i of both is a pair."""
    logits = scale * (x @ y.T) + bias
    signs = torch.full_like(logits, -1.0)
    if own:
        signs.fill_diagonal_(1.0)
    return -F.logsigmoid(signs * logits).sum()


def _sigmoid_gradients(*inputs: Tensor, own: bool) -> tuple[Tensor, list[Tensor]]:
    """Give `_sigmoid_sum` of detached inputs and its gradients by them."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        value = _sigmoid_sum(*leaves, own=own)
        return value.detach(), list(torch.autograd.grad(value, leaves))


def _required(logit_bias: Tensor | None) -> Tensor:
    if logit_bias is None:
        raise ValueError(
            "a sigmoid loss needs logit_bias; build the model with loss.kind sigmoid_*"
        )
    return logit_bias


class FastCLIP:
    """The global contrastive loss of SogCLR and FastCLIP: normalisers remembered for each row.

    For image anchors, with margins h_ij = s_ij - s_ii (text anchors alike, each with their own u):

        g_i = mean of e^{h_ij} over the other B-1 rows of the global batch
        u_i = (1-gamma) u_i + gamma g_i, kept from visit to visit; g_i at a row's first
        value = mean_i log(eps + u_i), mean of both directions
        gradient = mean_i grad g_i / (eps + u_i), u_i held fixed.

    That is the loss of v1 over its constant temperature: the logit scale's gradient is zero. v3
    (`learns_scale`) minimises (value + rho) / logit_scale, i.e. with tau = 1 / logit_scale half of
    tau mean_i [log(eps + g1_i) + log(eps + g2_i)] + 2 rho tau.
    Source: "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited
    Resources" (2024).

    Features are gathered without gradient. Then u is, so that a worker knows the gradient of remote
    anchors by its rows, and backward moves nothing: the mean over workers is the gradient on the
    global batch. Bytes received: 2U, and 16 (W-1) b for two fp32 u and an int64 key a row. Logits
    b x B twice on each worker. State: 8 bytes a row of the data on every worker, the same on all.
    """

    def __init__(self, num_rows: int, *, gamma: float, learns_scale: bool, rho: float = 0.0):
        """Rows have keys 0 .. num_rows - 1; 0 < gamma <= 1; `rho` in nats, for a learned scale."""
        self._log_keep = math.log1p(-gamma) if gamma < 1 else -math.inf
        self._log_gamma = math.log(gamma)
        self._learns_scale = learns_scale
        self._rho = rho
        # log u of image and text anchors; NaN before a row's first visit.
        self._log_u = torch.full((2, num_rows), math.nan)

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        image_log_z: Tensor | None = None,
        text_log_z: Tensor | None = None,
        logit_bias: Tensor | None = None,
        keys: Int[Tensor, " local"] | None = None,
    ) -> LossValue:
        """Give the loss of unit-norm embeddings; every worker must hold equally many pairs.

        Raises ValueError without `keys`.
        """
        del image_log_z, text_log_z, logit_bias
        if keys is None:
            raise ValueError("FastCLIP needs keys; give the rows' identities")
        x, y, scale = wide(image), wide(text), wide(logit_scale)
        with torch.no_grad():
            value, gradients, metrics = self._differentiate(x, y, scale, keys)
        metrics = {"loss": value, "logit_scale": scale, **metrics}
        return LossValue(loss=carry(value, (image, text, logit_scale), gradients), metrics=metrics)

    def _differentiate(
        self, x: Tensor, y: Tensor, scale: Tensor, keys: Tensor
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Give the loss, its gradients by `x`, `y` and `scale`, metrics; and move u."""
        all_x, all_y = torch.cat(_gather(torch.stack([x, y])), dim=1).unbind()
        positive, all_positive = scale * (x * y).sum(1), scale * (all_x * all_y).sum(1)
        logits = torch.stack([scale * (x @ all_y.T), scale * (y @ all_x.T)])  # [2, b, B]
        logits.diagonal(len(x) * _rank(), 1, 2).fill_(-math.inf)
        log_n = math.log(max(len(all_x) - 1, 1))
        log_g = logits.logsumexp(2) - positive - log_n
        log_u, all_log_u, is_new = self._average(log_g, keys.to(x.device))

        # Gradients by s_ij: of anchors here, by all rows; and of all anchors, by the rows here,
        # which to an anchor of the other side are its negatives.
        held, all_held = _add_eps(log_u), _add_eps(all_log_u)
        as_anchor = (logits - (positive + held + log_n)[:, :, None]).exp()
        as_negative = (logits - (all_positive + all_held + log_n).flip(0)[:, None, :]).exp()
        pull = (log_g - held).exp()  # what an anchor's negatives weigh together
        by_side = (as_anchor + as_negative) @ torch.stack([all_y, all_x])
        by_side -= pull.sum(0)[:, None] * torch.stack([y, x])
        value, gradient = held.mean(), by_side * scale / (2 * len(x))
        by_scale = torch.zeros_like(scale)
        if self._learns_scale:
            by_logit = (as_anchor * logits.nan_to_num(neginf=0.0)).sum(2) - pull * positive
            value = (value + self._rho) / scale
            gradient, by_scale = gradient / scale, (by_logit.mean() / scale - value) / scale
        metrics = {
            "log_u_image": log_u[0].mean(),
            "log_u_text": log_u[1].mean(),
            "first_visit_share": is_new.to(value.dtype).mean(),
        }
        return value, [*gradient, by_scale], metrics

    def _average(self, log_g: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move u of this step's rows, on all workers.

        Gives log u here [2, b] and of all workers [2, B], and which u here are new [2, b].
        """
        old = self._log_u[:, keys.cpu()].to(log_g)
        is_new = ~old.isfinite()
        moved = torch.logaddexp(old + self._log_keep, log_g + self._log_gamma)
        log_u = torch.where(is_new, log_g, moved).float()  # as it is stored and sent
        all_log_u, all_keys = torch.cat(_gather(log_u), dim=1), torch.cat(_gather(keys))
        # Dropping what is not finite keeps a row's u over a step that is skipped.
        is_known = all_log_u.isfinite().all(0)
        rows, values = all_keys[is_known].cpu().numpy(), all_log_u[:, is_known].cpu().numpy()
        # NumPy lets the last of equal keys win, so that the tables of all workers stay the same.
        self._log_u.numpy()[:, rows] = values
        return log_u.to(log_g), all_log_u.to(log_g), is_new

    def share(self, gather: Gather) -> None:
        """Nothing to share: all workers know all rows."""

    def state_dict(self) -> State:
        """The rows that fall to this worker, and their log u, [n] and [2, n]."""
        known = self._log_u.isfinite().all(0).nonzero().squeeze(1)
        rows = known[known % _world_size() == _rank()]
        return {"rows": rows, "log_u": self._log_u[:, rows]}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Take all workers' rows, whatever their number."""
        del rank, world_size
        self._log_u.fill_(math.nan)
        for state in states:
            self._log_u[:, state["rows"]] = state["log_u"]


def _add_eps(log_u: Tensor) -> Tensor:
    """Give log(eps + u)."""
    return torch.logaddexp(log_u, torch.full_like(log_u, LOG_EPS))


def gather_rows(rows: Float[Tensor, "local dim"]) -> Float[Tensor, "all dim"]:
    """Concatenate all workers' rows in rank order, with gradient back to the owner of each row."""
    return _GatherRows.apply(rows) if _world_size() > 1 else rows  # pyright: ignore[reportReturnType]


class _GatherRows(torch.autograd.Function):
    """All-gather forward; backward sums every worker's gradient of my rows (reduce-scatter)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat(_gather(rows))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        mine = torch.empty_like(gradient[: len(gradient) // _world_size()])
        parts = [part.contiguous() for part in gradient.chunk(_world_size())]
        dist.reduce_scatter(mine, parts)
        return mine


def _gather(mine: Tensor) -> list[Tensor]:
    """Give all workers' tensors of this shape in rank order, without gradient."""
    if _world_size() == 1:
        return [mine]
    gathered = [torch.empty_like(mine) for _ in range(_world_size())]
    dist.all_gather(gathered, mine.contiguous())
    return gathered


def _pass_on(mine: Sequence[Tensor]) -> list[Tensor]:
    """Send tensors to the next worker of the ring, give what the one before sent.

    All sends and receives are posted together, so no worker waits for another's turn.
    """
    rank, world_size = _rank(), _world_size()
    sent = [tensor.contiguous() for tensor in mine]
    received = [torch.empty_like(tensor) for tensor in sent]
    operations = [
        operation
        for tensor, buffer in zip(sent, received, strict=True)
        for operation in (
            dist.P2POp(dist.isend, tensor, (rank + 1) % world_size),
            dist.P2POp(dist.irecv, buffer, (rank - 1) % world_size),
        )
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
