"""Errors a user can mend, and how several of them are said at once.

Leaves: `UserError`, `RunStop`, `Problem`, `raise_problems`. Must not know: the rest of the package.
"""

from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend; the message names the place, the value, the rule, the remedy."""


class RunStop(Exception):
    """Ends a run: every rank raises it alike, and a restart would only repeat it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong: where (a config path, a file), and what to do about it."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def raise_problems(problems: list[Problem], subject: str) -> None:
    """Raise one `UserError` that lists all `problems`; return when there are none."""
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "\n".join(f"  {index}. {problem}" for index, problem in enumerate(problems, 1))
    raise UserError(f"{subject}: {count}\n{lines}")
