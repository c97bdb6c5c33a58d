"""The answers of a task: how they are written, which there are, their numbers.

Enters: texts as people gave them. Leaves: numbers of a closed list. Must not know: the model, Ray.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

UNLISTED = -2  # the number of an answer that the list has not

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")


def write_plainly(answer: str) -> str:
    """The form in which answers about images are compared: as the VQA evaluation has it.

    Lower case, numbers as digits, no articles, no punctuation but apostrophes and colons.
    ("VQA: visual question answering", Antol et al. 2015; of its table of contractions nothing.)
    """
    text = PUNCTUATION.sub(" ", COMMA_IN_NUMBER.sub("", PERIOD.sub("", answer.lower())))
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ARTICLES)


@dataclass(frozen=True, kw_only=True)
class AnswerList:
    """A closed list of answers, in the order of their numbers.

    `is_open`: people may give others too, which are no mistake of the data; answers are then
    compared as `write_plainly` has them.
    """

    names: tuple[str, ...]
    is_open: bool

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {self._written(name): number for number, name in enumerate(self.names)}

    def _written(self, answer: str) -> str:
        return write_plainly(answer) if self.is_open else answer.strip().lower()

    def numbers(self, answers: Sequence[str]) -> list[int]:
        """The number of each answer, as often as it was given; UNLISTED for one not in the list."""
        return [self._numbers.get(self._written(answer), UNLISTED) for answer in answers]

    @staticmethod
    def of(counts: Counter[str], most: int, *, is_open: bool) -> "AnswerList":
        """The commonest answers, at most so many; those of a closed list by their names."""
        empty = AnswerList(names=(), is_open=is_open)
        merged: Counter[str] = Counter()
        for answer, count in counts.items():
            if written := empty._written(answer):
                merged[written] += count
        ranked = sorted(merged, key=lambda answer: (-merged[answer], answer))[:most]
        return AnswerList(names=tuple(ranked if is_open else sorted(ranked)), is_open=is_open)
