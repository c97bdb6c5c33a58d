"""Tasks of a fusion model: answers to texts about images, and how many of them are right.

Enters: a forward, eval batches. Leaves: `Answered`, metrics. Must not know: how the model was
trained.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.data.answers import UNLISTED, AnswerList
from pipeline.data.batches import Batch
from pipeline.data.decode import NO_ANSWER
from pipeline.errors import RunStop
from pipeline.evaluate.embed import any_rank, gathered

Answer = Callable[[Tensor, Tensor], Tensor]  # images, tokens -> logits of the answers [b, answers]
AGREED = 3  # people who must have given an answer for it to be wholly right
EXAMPLES = 12  # of right answers, and of wrong ones, that are kept to be looked at
MOST_LABELS = 20  # of which each one's recall is told


class Example(NamedTuple):
    """A row to be looked at: pictures [pictures, size, size, 3], token ids, numbers of answers."""

    pictures: Tensor
    tokens: Tensor
    said: int
    answers: list[int]


@dataclass(kw_only=True, slots=True)
class Answered:
    """All evaluation questions: `said` [n] what the model answers, `answers` [n, ANSWERS]."""

    said: Int[Tensor, " questions"]
    answers: Int[Tensor, "questions answers"]
    rows: int
    bad_rows: int
    cut_texts: int
    skipped: int
    examples: list[Example]


class _Question(NamedTuple):
    pictures: Tensor
    tokens: Tensor
    answers: Tensor


@dataclass(kw_only=True, slots=True)
class _Found:
    said: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    bad: int = 0
    cut: int = 0
    skipped: int = 0


@torch.no_grad()
def answer_rows(
    answer: Answer, batches: Iterator[Batch], blank: tuple[Tensor, Tensor], device: torch.device
) -> Answered:
    """Ask all questions of this rank's rows, and gather what all ranks found, in rank order.

    Ranks call `answer` equally often, with `blank` (images, tokens of a batch) where one has fewer
    questions: under ZeRO-3 a forward is a collective.
    """
    found = _Found()
    size = len(blank[1])
    questions = _questions(batches, found)
    while True:
        chunk = [question for _, question in zip(range(size), questions, strict=False)]
        if not any_rank(bool(chunk), device):
            break
        images, tokens = (part.clone() for part in blank)
        for row, question in enumerate(chunk):
            images[row], tokens[row] = question.pictures, question.tokens
        said = answer(images.to(device), tokens.to(device)).argmax(1).cpu()[: len(chunk)]
        if chunk:
            found.said.append(said)
            found.answers.append(torch.stack([question.answers for question in chunk]))
            _keep_examples(found.examples, chunk, said)
    return _gather(found)


@torch.no_grad()
def measure_assignment(
    model: Callable[..., Any],
    batches: Iterator[Batch],
    blank: tuple[Tensor, Tensor],
    device: torch.device,
) -> Iterator[tuple[str, float]]:
    """Yield how often captions are assigned to the right one of two pictures, or to neither.

    Which pictures is drawn from torch's generator, seeded batch by batch.
    """
    right = counted = bad = 0.0
    for number in itertools.count():
        batch = next(batches, None)
        if not any_rank(batch is not None, device):
            break
        images, tokens = blank
        if batch is not None and batch.rows:
            # Rows alone: a text's other picture is to be a real one.
            images, tokens = batch.images[: batch.rows], batch.tokens[: batch.rows]
        torch.manual_seed(number)
        outputs = model(images.to(device), tokens.to(device))
        if batch is not None:
            bad += len(batch.bad)
        if batch is not None and batch.rows:
            counts = outputs.labels >= 0
            right += float((outputs.logits.argmax(1) == outputs.labels)[counts].sum())
            counted += float(counts.sum())
    totals = zip(*gathered((right, counted, bad)), strict=True)
    right, counted, bad = (sum(part) for part in totals)
    if not counted:
        raise RunStop(
            "data.val: no text could be assigned; a batch needs two different ones: look at its "
            "rows, or raise evaluate.batch"
        )
    yield "accuracy", right / counted
    yield "chance", 1 / 3
    yield "questions", counted
    yield "bad_rows", bad


def _questions(batches: Iterator[Batch], found: _Found) -> Iterator[_Question]:
    """Each row's questions, one after the other."""
    for batch in batches:
        assert batch.answers is not None, "a task's rows have answers"
        found.rows += batch.rows
        found.bad += len(batch.bad)
        found.cut += batch.cut
        found.skipped += batch.skipped
        for row in range(batch.rows):
            yield _Question(batch.images[row], batch.tokens[row], batch.answers[row])
            more = zip(batch.more_tokens[row], batch.more_answers[row], strict=True)
            for tokens, answers in more:
                yield _Question(
                    batch.images[row],
                    torch.from_numpy(tokens.copy()),
                    torch.from_numpy(answers.copy()),
                )


def _keep_examples(examples: list[Example], chunk: Sequence[_Question], said: Tensor) -> None:
    """Keep the first right ones and the first wrong ones."""
    counts = {True: 0, False: 0}
    for example in examples:
        counts[example.said in example.answers] += 1
    for question, answer in zip(chunk, said.tolist(), strict=True):
        answers = [number for number in question.answers.tolist() if number != NO_ANSWER]
        is_right = answer in answers
        if counts[is_right] < EXAMPLES:
            counts[is_right] += 1
            pictures = question.pictures.clone()
            pictures = pictures if pictures.ndim == 4 else pictures[None]
            examples.append(Example(pictures, question.tokens.clone(), answer, answers))


def _gather(found: _Found) -> Answered:
    if dist.is_initialized() and dist.get_rank():
        found.examples = []  # pictures; one rank's are enough to look at
    ranks = gathered(found)
    full = [rank for rank in ranks if rank.said]
    if not full:
        raise RunStop("data.val: no usable row; look at its images, texts and answers")
    return Answered(
        said=torch.cat([part for rank in full for part in rank.said]),
        answers=torch.cat([part for rank in full for part in rank.answers]),
        rows=sum(rank.rows for rank in ranks),
        bad_rows=sum(rank.bad for rank in ranks),
        cut_texts=sum(rank.cut for rank in ranks),
        skipped=sum(rank.skipped for rank in ranks),
        examples=ranks[0].examples,
    )


def soft_accuracy(
    said: Int[Tensor, " questions"], answers: Int[Tensor, "questions answers"]
) -> Float[Tensor, " questions"]:
    """How right each answer is, from 0 to 1, as the VQA evaluation counts it.

    The mean, over leaving out each person's answer in turn, of min(1, agreeing / 3). Where fewer
    than 4 people answered, any of their answers is right. ("VQA: visual question answering", Antol
    et al. 2015; `answers` are padded with NO_ANSWER.)
    """
    people = (answers != NO_ANSWER).sum(1).double()
    agreeing = (answers == said[:, None]).sum(1).double()
    without = (agreeing / AGREED).clamp(max=1) * (people - agreeing)
    within = ((agreeing - 1) / AGREED).clamp(min=0, max=1) * agreeing
    soft = (without + within) / people.clamp(min=1)
    return torch.where(people <= AGREED, (agreeing > 0).double(), soft)


def measure_answers(found: Answered, answers: AnswerList) -> Iterator[tuple[str, float]]:
    """Yield accuracy, that of the best single answer (`chance`), and counts; of few labels recall.

    Accuracy is the soft one; of one answer a question it is the share of right ones.
    """
    yield "accuracy", float(soft_accuracy(found.said, found.answers).mean())
    given = found.answers[found.answers >= 0]
    commonest = int(given.bincount().argmax()) if len(given) else 0
    constant = torch.full_like(found.said, commonest)
    yield "chance", float(soft_accuracy(constant, found.answers).mean())
    yield "questions", float(len(found.said))
    yield "rows", float(found.rows)
    yield "bad_rows", float(found.bad_rows)
    yield "skipped_questions", float(found.skipped)
    yield "cut_text_share", found.cut_texts / max(found.rows, 1)
    if answers.is_open:
        yield "unlisted_answer_share", float((found.answers == UNLISTED).any(1).double().mean())
    elif len(answers.names) <= MOST_LABELS:
        first = found.answers[:, 0]
        for number, name in enumerate(answers.names):
            of = first == number
            if of.any():
                yield f"recall/{name}", float((found.said[of] == number).double().mean())
