"""Fine-tuning a fusion model for a task: the module that an engine trains, and its loss.

Enters: a config with a task, batches of texts and answers. Leaves: what `train_step` needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.schema import Config, TaskConfig
from pipeline.data.answers import AnswerList
from pipeline.data.batches import Batch
from pipeline.data.decode import Asked
from pipeline.data.text import Tokenizer
from pipeline.errors import UserError
from pipeline.losses.base import Gather, LossValue, State
from pipeline.losses.fusion import matching_loss, ramped, soft_cross_entropy
from pipeline.losses.structure import there
from pipeline.models.heads import Answerer, Assigner, Classifier, TaskOutputs, sum_words
from pipeline.train.module import (
    FusionPretraining,
    Pretraining,
    build_fusion_model,
    build_pretraining,
)

TaskModule = Classifier | Assigner | Answerer


Module = Pretraining | FusionPretraining | TaskModule


def build_module(
    config: Config,
    tokenizer: Tokenizer,
    asked: Asked | None,
    like: Mapping[str, Any] | None = None,
) -> Module:
    """Build what a run's engine trains, by its seed. Raises `UserError`, as its parts do.

    `like` as of `build_pretraining`.
    """
    if config.task is None:
        return build_pretraining(config, tokenizer, like)
    return build_task(config, tokenizer, asked, like)


def build_as(
    config: Config, tokenizer: Tokenizer, asked: Asked | None, meta: Mapping[str, Any]
) -> Module:
    """Build a module as that of the checkpoint with this `meta`, whose weights are to be loaded.

    What a pretrained model has decided is taken from there; the model is not loaded again.
    """
    like = meta.get("architecture")
    if like is None:  # one of an older version
        return build_module(config, tokenizer, asked)
    model, nothing = config.model, {"pretrained": None}
    parts = {
        "image": model.image.model_copy(update=nothing),
        "text": model.text.model_copy(update=nothing),
    }
    plain = config.model_copy(update={"model": model.model_copy(update={**nothing, **parts})})
    return build_module(plain, tokenizer, asked, like)


def build_task(
    config: Config,
    tokenizer: Tokenizer,
    asked: Asked | None,
    like: Mapping[str, Any] | None = None,
) -> TaskModule:
    """Build the module of a run with a task, with weights drawn from `train.seed`.

    `asked`: its closed list of answers; None for assignment, which makes its own. Raises
    `UserError` when an answer is too long.
    """
    task = config.task
    assert task is not None, "without a task it is pretraining"
    torch.manual_seed(config.train.seed)
    model = build_fusion_model(config, tokenizer, like)
    if asked is None:
        return Assigner(model)
    if task.kind != "vqa":
        return Classifier(model, len(asked.answers.names), asked.pictures)
    return Answerer(
        model,
        torch.from_numpy(encode_answers(asked.answers, tokenizer, config)),
        layers=task.decoder_layers,
        pad=tokenizer.pad,
        ranked=task.ranked,
    )


def encode_answers(answers: AnswerList, tokenizer: Tokenizer, config: Config) -> NDArray[np.int32]:
    """Token ids of each answer, [answers, places], start and end included, up to the longest."""
    length = config.model.text.context_length
    ids, cut = tokenizer.encode(answers.names, length)
    if cut.any():
        raise UserError(
            f"task.answers: '{answers.names[int(cut.argmax())]}' has more than the {length - 2} "
            "tokens of model.text.context_length: leave it out, or allow more"
        )
    longest = int((ids != tokenizer.pad).any(0).sum())
    return ids[:, :longest]


class TaskObjective:
    """Cross-entropy of answers: of classes, or of the words a decoder writes.

    Of a question that several people answered each answer counts by its share of those listed. A
    share alpha of all targets may be what a momentum model answers (ALBEF, section 3.3).
    """

    def __init__(self, distillation: float = 0.0, ramp_samples: int = 0):
        """`distillation`: alpha, once so many samples have been seen."""
        self._distillation, self._ramp_samples = distillation, ramp_samples

    def inputs(self, batch: Batch) -> list[Tensor | None]:
        """Images and texts; for a decoder also which answers each is to give."""
        return [batch.images, batch.tokens]

    def slow_inputs(self, inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """All of them: it answers the same questions."""
        return inputs

    def loss(
        self, outputs: TaskOutputs, slow: TaskOutputs | None, batch: Batch, samples: int
    ) -> LossValue:
        """Give the loss of a batch, of which `samples` had been seen before."""
        assert outputs.logits is not None, "a classifier gives logits"
        if outputs.labels is not None:
            loss, found = matching_loss(outputs.logits, outputs.labels)
            return _value(loss, found["matching_accuracy"])
        shares = answer_shares(batch, outputs.logits.shape[1]).to(outputs.logits.device)
        losses = -(shares * outputs.logits.log_softmax(1)).sum(1)
        if slow is not None:
            soft = soft_cross_entropy(outputs.logits, there(slow.logits))
            losses = losses.lerp(soft, self._alpha(samples))
        right = shares.gather(1, outputs.logits.argmax(1, keepdim=True)) > 0
        return _value(losses.mean(), right.float().mean())

    def _alpha(self, samples: int) -> float:
        return ramped(self._distillation, self._ramp_samples, samples)

    def share(self, gather: Gather) -> None:
        """Nothing: it has no running state."""

    def state_dict(self) -> State:
        """Nothing."""
        return {}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Nothing."""


class AnswerObjective(TaskObjective):
    """For an `Answerer`: -log p of each listed answer, by its share; the mean over questions."""

    def inputs(self, batch: Batch) -> list[Tensor | None]:
        """Images, texts, and for each answer that one is to give its row and its number."""
        rows, numbers, _ = distinct_answers(batch)
        return [batch.images, batch.tokens, rows, numbers]

    def loss(
        self, outputs: TaskOutputs, slow: TaskOutputs | None, batch: Batch, samples: int
    ) -> LossValue:
        """Give the loss of a batch; how often it is right is not known in training."""
        losses = there(outputs.answer_losses)
        if slow is not None:
            words = soft_cross_entropy(there(outputs.word_logits), there(slow.word_logits))
            soft = sum_words(words, there(outputs.is_word))
            losses = losses.lerp(soft, self._alpha(samples))
        _, _, shares = distinct_answers(batch)
        loss = (shares.to(losses) * losses).sum() / len(batch.tokens)
        return LossValue(loss=loss, metrics={"loss": loss.detach()})


def _value(loss: Tensor, accuracy: Tensor) -> LossValue:
    metrics = {"loss": loss.detach(), "task_accuracy": accuracy.detach()}
    return LossValue(loss=loss, metrics=metrics)


def answer_shares(batch: Batch, count: int) -> Float[Tensor, "batch answers"]:
    """Of each row the share of each of `count` answers among those that are listed."""
    rows, numbers, shares = distinct_answers(batch)
    table = torch.zeros(len(batch.tokens), count)
    table[rows, numbers] = shares
    return table


def distinct_answers(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Row, number, and share in the row's listed answers, of each row's different answers."""
    assert batch.answers is not None, "a task's rows have answers"
    answers = batch.answers.long()
    listed = answers >= 0
    rows = torch.arange(len(answers))[:, None].expand_as(answers)[listed]
    pairs, counts = torch.stack([rows, answers[listed]]).unique(dim=1, return_counts=True)
    totals = listed.sum(1)[pairs[0]]
    return pairs[0], pairs[1], counts / totals


def build_task_objective(task: TaskConfig, module: nn.Module) -> TaskObjective:
    """What a step of fine-tuning `module` minimises."""
    kind = AnswerObjective if isinstance(module, Answerer) else TaskObjective
    return kind(task.distillation, task.distillation_ramp_samples)
