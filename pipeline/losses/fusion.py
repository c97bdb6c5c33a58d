"""What a fusion model learns from: contrast with momentum features, matching, masked words.

Source: "Align before fuse" (Li et al., NeurIPS 2021), sections 3.2 and 3.3, with its contrast in
gamma-decomposable form: since soft targets sum to 1, its loss is -sum_j t_ij s_ij + log Z_i, and
log Z_i becomes u_i Z_i with a queue of momentum features as the prior of Z. All of it is local.

Enters: features, momentum features, logits. Leaves: scalars and metrics. Must not know: the model,
other workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.losses.base import Gather, LossValue, State
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.priors import QueuePrior

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen words shown as the mask, as another word (BERT)


@dataclass(kw_only=True)
class MomentumContrast:
    """Contrast of each modality's features with the other's momentum features, soft targets.

    `image` and `text` are one-sided gamma losses whose anchors are images, texts; their priors, if
    any, queues of the other side's momentum features. Targets are
    t_ij = (1 - alpha) [i = j] + alpha softmax_j(s'_ij), s' the momentum features' own logits, over
    the batch and the queue.
    """

    image: GammaLoss
    text: GammaLoss

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        slow_image: Float[Tensor, "local dim"],
        slow_text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        *,
        keys: Int[Tensor, " local"],
        alpha: float,
    ) -> LossValue:
        """Give the loss of unit-norm features, the momentum features without gradient.

        `alpha` is the momentum model's share in the targets. The value is
        mean_i(-sum_j t_ij s_ij + log(K R_i)), of both directions.
        """
        sides = {"image": (self.image, image, slow_image, slow_text),
                 "text": (self.text, text, slow_text, slow_image)}  # fmt: skip
        parts: list[Tensor] = []
        metrics: dict[str, Tensor] = {"logit_scale": logit_scale.detach().clone()}
        diagnoses = {}
        for side, (loss, anchors, own, others) in sides.items():
            # Before the loss, which puts this batch into the queue.
            softened = _softening(loss, anchors, own, others, logit_scale)
            value = loss(anchors, others, logit_scale, keys=keys)
            parts.append(value.loss + alpha * softened)
            metrics |= _named(value.metrics, side)
            metrics[f"loss_{side}"] = value.metrics["loss"] + alpha * softened.detach()
            diagnoses[side] = value.diagnose
        del metrics["loss"]
        loss = torch.stack(parts).mean()
        metrics["loss"] = (metrics.pop("loss_image") + metrics.pop("loss_text")) / 2
        return LossValue(
            loss=loss,
            metrics=metrics,
            diagnose=lambda: {
                name: found
                for side, diagnose in diagnoses.items()
                for name, found in _named(diagnose(), side).items()
            },
        )

    def share(self, gather: Gather) -> None:
        """Nothing: each worker's queues are its own."""

    def state_dict(self) -> State:
        """Of both directions."""
        return {"image": self.image.state_dict(), "text": self.text.state_dict()}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read what all workers of the time gave; `world_size` may differ from their number."""
        self.image.load_state_dict([state["image"] for state in states], rank, world_size)
        self.text.load_state_dict([state["text"] for state in states], rank, world_size)


def _named(metrics: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The metrics of a one-sided loss, which calls its anchors images, by the side they are."""
    return {name.replace("_image", f"_{side}"): value for name, value in metrics.items()}


def _softening(
    loss: GammaLoss, anchors: Tensor, own: Tensor, others: Tensor, logit_scale: Tensor
) -> Float[Tensor, ""]:
    """Mean of s_ii - sum_j softmax_j(s'_ij) s_ij: what alpha adds to the loss."""
    scale = logit_scale if loss.scale_rule == "plain" else logit_scale.detach()
    with torch.no_grad():
        candidates = others
        if isinstance(loss.prior, QueuePrior):
            candidates = torch.cat([others, loss.prior.texts.to(others)])
        weights = (scale * own @ candidates.T).softmax(1)
        missed = others - weights @ candidates
    return scale * (anchors * missed).sum(1).mean()


def matching_loss(
    logits: Float[Tensor, "pairs classes"], labels: Int[Tensor, " pairs"]
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Cross-entropy of telling pairs (label 1) from hard negatives (0), and the accuracy.

    Of any other classes too. Labels below 0 are left out; zero when all are.
    """
    count = (labels >= 0).sum().clamp(min=1)
    right = (logits.argmax(1) == labels).sum() / count
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum") / count
    return loss, {"matching_accuracy": right.detach()}


def ramped(share: float, ramp: int, samples: int) -> float:
    """The share, rising linearly from zero over the first `ramp` samples."""
    return share * min(1.0, (samples + 1) / (ramp + 1))


def soft_cross_entropy(
    logits: Float[Tensor, "rows classes"], slow_logits: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """Cross-entropy of each row toward the momentum model's softmax."""
    return -(slow_logits.float().softmax(1) * logits.float().log_softmax(1)).sum(1)


def masked_words_loss(
    logits: Float[Tensor, "chosen vocab"],
    words: Int[Tensor, " chosen"],
    slow_logits: Float[Tensor, "chosen vocab"],
    alpha: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Cross-entropy of guessing the words, `alpha` of it toward the momentum model's guesses.

    Zero when no word was chosen.
    """
    hard = F.cross_entropy(logits.float(), words.long(), reduction="sum")
    soft = soft_cross_entropy(logits, slow_logits).sum()
    count = max(len(words), 1)
    right = (logits.argmax(1) == words).float().sum() / count
    loss = ((1 - alpha) * hard + alpha * soft) / count
    return loss, {"masked_words_accuracy": right.detach()}


def mask_words(
    tokens: Int[Tensor, "batch length"],
    *,
    share: float,
    special: Sequence[int],
    mask: int,
    vocab_size: int,
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Choose a share of the tokens to be guessed, and hide them: BERT's way.

    Gives the texts as they are shown, and the chosen places. Of these 80 % show `mask`, 10 % a
    random token, 10 % the token itself; `special` ids are never chosen. Draws from torch's
    generator.
    """
    is_word = ~torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype))
    chosen = is_word & (torch.rand(tokens.shape) < share)
    kind = torch.rand(tokens.shape)
    shown = torch.where(chosen & (kind < MASKED), mask, tokens)
    others = torch.randint(vocab_size, tokens.shape, dtype=tokens.dtype)
    is_other = chosen & (kind >= MASKED) & (kind < MASKED + RANDOM)
    return torch.where(is_other, others, shown), chosen
