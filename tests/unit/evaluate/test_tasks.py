"""Accuracy of answers: hand-worked cases, and every question asked once."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from pipeline.data.answers import UNLISTED, AnswerList
from pipeline.data.batches import Batch
from pipeline.data.decode import ANSWERS, NO_ANSWER
from pipeline.errors import RunStop
from pipeline.evaluate.tasks import (
    Answered,
    answer_rows,
    measure_answers,
    measure_assignment,
    soft_accuracy,
)
from pipeline.models.heads import TaskOutputs
from tests.tiny import tiny_batch

CPU = torch.device("cpu")


def _answers(*rows: list[int]) -> torch.Tensor:
    table = torch.full((len(rows), ANSWERS), NO_ANSWER)
    for place, row in enumerate(rows):
        table[place, : len(row)] = torch.tensor(row)
    return table


def _literal(said: int, people: list[int]) -> float:
    """The VQA evaluation, as it is told: each person left out in turn."""
    scores = [
        min(1.0, sum(other == said for other in people[:k] + people[k + 1 :]) / 3)
        for k in range(len(people))
    ]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("agreeing", range(11))
def test_soft_accuracy_of_ten_people(agreeing: int) -> None:
    people = [4] * agreeing + [UNLISTED] * (10 - agreeing)
    found = soft_accuracy(torch.tensor([4]), _answers(people)).item()
    assert found == pytest.approx(_literal(4, people))
    known = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}
    assert found == pytest.approx(known.get(agreeing, 1.0))


def test_of_few_people_any_answer_is_right() -> None:
    said = torch.tensor([1, 1, 1])
    assert soft_accuracy(said, _answers([1], [0, 1], [2])).tolist() == [1.0, 1.0, 0.0]


def test_accuracy_and_recall_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    found = Answered(
        said=torch.from_numpy(said), answers=_answers(*[[int(t)] for t in truth]),
        rows=200, bad_rows=3, cut_texts=0, skipped=0, examples=[],
    )  # fmt: skip
    labels = AnswerList(names=("a", "b", "c"), is_open=False)
    metrics = dict(measure_answers(found, labels))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, said))
    recalls = recall_score(truth, said, average=None)
    assert [metrics[f"recall/{name}"] for name in "abc"] == pytest.approx(recalls)
    assert metrics["chance"] == pytest.approx(np.bincount(truth).max() / 200)
    assert metrics["bad_rows"] == 3


def _task_batch(rows: int, seed: int, more: int) -> Batch:
    """Rows whose answer is told by their first pixel, each with `more` further questions."""
    batch = tiny_batch(4, rows=rows, seed=seed, captions=1 + more)
    batch.answers = _answers(*[[int(image[0, 0, 0]) % 3] for image in batch.images])
    batch.more_answers = [
        np.repeat(batch.answers[row : row + 1].numpy(), more, axis=0) for row in range(rows)
    ]
    return batch


def test_every_question_is_asked_once_and_with_its_own_picture() -> None:
    """Rows of one question and of several, batches that are not full: all in full chunks."""
    asked = []

    def answer(images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long() % 3, 3).float()

    batches = [_task_batch(4, 0, 2), _task_batch(1, 5, 0), _task_batch(3, 9, 1)]
    blank = (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.full((4, 8), 3).int())
    found = answer_rows(answer, iter(batches), blank, CPU)
    assert len(found.said) == 4 * 3 + 1 + 3 * 2
    assert found.rows == 8
    assert asked == [4] * 5
    metrics = dict(measure_answers(found, AnswerList(names=("a", "b", "c"), is_open=False)))
    assert metrics["accuracy"] == 1.0
    assert all(example.said in example.answers for example in found.examples)


def test_nothing_usable_stops() -> None:
    blank = (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.full((4, 8), 3).int())
    with pytest.raises(RunStop, match="no usable row"):
        answer_rows(lambda images, tokens: tokens.float(), iter([]), blank, CPU)


def test_assignment_counts_labelled_rows_and_shows_the_model_no_padding() -> None:
    labels = itertools.cycle([torch.tensor([0, 1, 2, -100]), torch.tensor([2, 2, 0])])
    shown = []

    def model(images: torch.Tensor, tokens: torch.Tensor) -> TaskOutputs:
        shown.append(len(images))
        said = torch.tensor([[9.0, 0, 0]]).repeat(len(images), 1)
        return TaskOutputs(said, labels=next(labels))

    batches = iter([tiny_batch(4, rows=4), tiny_batch(4, rows=3)])
    blank = (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.full((4, 8), 3).int())
    metrics = dict(measure_assignment(model, batches, blank, CPU))
    assert shown == [4, 3]
    assert metrics["accuracy"] == pytest.approx(2 / 6)
    assert metrics["questions"] == 6
    with pytest.raises(RunStop, match="no text could be assigned"):
        dict(measure_assignment(model, iter([]), blank, CPU))
