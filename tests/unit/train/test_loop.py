import pytest

from pipeline.errors import RunStop
from pipeline.train.loop import Actions, Cadence, Left, Progress, Wish, run_loop


def _run(
    progress: Progress,
    bad_steps: frozenset[int] = frozenset(),
    wishes: dict[int, Wish] | None = None,
    seen: list[str] | None = None,
    **cadence,
) -> list[str]:
    seen = [] if seen is None else seen

    def step(at: Progress) -> bool:
        return at.step + 1 not in bad_steps

    def note(name: str):
        return lambda at: seen.append(f"{name}{at.step}")

    settings = {
        "samples": 27,
        "global_batch": 4,
        "log_every": 2,
        "evaluate_every": 3,
        "checkpoint_every": 4,
        "max_nonfinite": 3,
    }
    actions = Actions(
        step=step,
        wish=lambda at: (wishes or {}).get(at.step, Wish.NONE),
        log=note("log"),
        evaluate=note("eval"),
        checkpoint=note("save"),
    )
    run_loop(progress, Cadence(**{**settings, **cadence}), actions)
    return seen


def test_what_is_due_happens_in_order_and_the_end_is_complete() -> None:
    progress = Progress()
    seen = _run(progress)
    assert seen == ["log2", "eval3", "log4", "save4", "log6", "save6", "eval6"]
    assert (progress.step, progress.samples) == (6, 24)


def test_a_resumed_run_does_only_what_is_left() -> None:
    assert _run(Progress(step=5, samples=20)) == ["log6", "save6", "eval6"]
    assert _run(Progress(step=6, samples=24)) == ["eval6"]


def test_evaluation_only_at_the_end() -> None:
    assert [name for name in _run(Progress(), evaluate_every="end") if "eval" in name] == ["eval6"]


def test_nonfinite_steps_are_counted_and_not_saved() -> None:
    progress = Progress()
    seen = _run(progress, bad_steps=frozenset({4}))
    assert "save4" not in seen
    assert "save6" in seen
    assert (progress.nonfinite_steps, progress.nonfinite_in_a_row) == (1, 0)


def test_the_end_is_saved_even_after_a_nonfinite_step() -> None:
    """A skipped step changes no weight, so what is saved is the last good state."""
    assert _run(Progress(), bad_steps=frozenset({6}))[-2:] == ["save6", "eval6"]


def test_too_many_nonfinite_steps_in_a_row_stop_the_run() -> None:
    with pytest.raises(
        RunStop, match=r"step 5: .* in 3 steps in a row .*another name with lower optim.lr"
    ):
        _run(Progress(), bad_steps=frozenset({3, 4, 5}))


@pytest.mark.parametrize("wish", [Wish.MOVE, Wish.STOP])
def test_at_a_wish_the_step_is_saved_and_the_loop_left(wish: Wish) -> None:
    seen: list[str] = []
    with pytest.raises(Left) as left:
        _run(Progress(), wishes={3: wish}, seen=seen)
    assert left.value.wish is wish
    assert seen == ["log2", "save3"], "the evaluation that is due waits for whoever goes on"


def test_a_wish_in_a_nonfinite_step_saves_nothing() -> None:
    seen: list[str] = []
    with pytest.raises(Left):
        _run(Progress(), bad_steps=frozenset({3}), wishes={3: Wish.MOVE}, seen=seen)
    assert seen == ["log2"]


def test_a_wish_at_the_last_step_changes_nothing() -> None:
    assert _run(Progress(), wishes={6: Wish.STOP}) == _run(Progress())
