"""What goes wrong when Ray is started or joined, as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import UserError


@contextmanager
def connecting(what: str, remedy: str) -> Iterator[None]:
    """Raise `UserError` where Ray does not come up; `what` and `remedy`: of a missing cluster."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"{what} ({error}); {remedy}") from error
    except Exception as error:  # Ray raises a bare one where its processes do not come up
        if "timed out" not in str(error):
            raise
        raise UserError(
            f"Ray did not start on this machine ({error}); it is busy, or short of memory: "
            "give the same command again"
        ) from error
