"""Checkpoints on their way to a storage and back; the ranks are threads here."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunStop
from pipeline.train.publish import (
    Damaged,
    Sender,
    agreed,
    fetch_derived,
    fetched,
    forget_after,
    keep,
    prune,
    verify,
)
from pipeline.train.store import MANIFEST, RunFolder


def _alone(value: Any) -> list[Any]:
    return [value]


class _Ranks:
    """Gathers among threads."""

    def __init__(self, size: int):
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=30)

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            values = list(self._values)
            self._barrier.wait()
            return values

        return gather


def _part(folder: Path, rank: int, text: str = "weights") -> Path:
    """What one rank has written."""
    path = folder / f"part-{rank}"
    (path / "state").mkdir(parents=True)
    (path / "state" / f"shard-{rank}.pt").write_text(f"{text} {rank}")
    (path / f"loss-{rank}.pt.gz").write_text("not packed, whatever its name says")
    return path


def _save(tmp_path: Path, run: RunFolder, name: str, ranks: int = 2) -> list[list[str]]:
    """Send a checkpoint of some ranks; what each is told."""
    told: list[list[str]] = [[] for _ in range(ranks)]
    group = _Ranks(ranks)

    def work(rank: int) -> None:
        sender = Sender(run, rank=rank, world_size=ranks, keep=2, published=lambda _: None)
        sender.send(name, _part(tmp_path / name, rank))
        told[rank] = sender.settle(group.gather(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(str(tmp_path / "runs"), "tiny")


def test_what_all_ranks_sent_comes_back_and_their_own_copies_go(
    tmp_path: Path, run: RunFolder
) -> None:
    assert _save(tmp_path, run, "step-1", ranks=3) == [[], [], []]
    with fetched(run, "step-1") as folder:
        assert [(folder / "state" / f"shard-{rank}.pt").read_text() for rank in range(3)] == [
            "weights 0",
            "weights 1",
            "weights 2",
        ]
    assert verify(run, "step-1") == 3 * (len("weights 0") + 34)
    assert not list((tmp_path / "step-1").glob("part-*"))
    assert not list(Path(run.path).rglob("sent-*"))


def test_a_checkpoint_without_a_rank_is_none(tmp_path: Path, run: RunFolder) -> None:
    """Rank 1 never sends; what rank 0 sent must not be taken for a checkpoint."""
    sender = Sender(run, rank=0, world_size=2, keep=2, published=lambda _: None)
    sender.send("step-1", _part(tmp_path, 0))
    said = sender.settle(lambda error: [error, "rank 1: no space left on device"])
    assert said == ["rank 1: no space left on device"]
    assert run.checkpoints() == run.attempted() == []
    sender.retry()
    other = Sender(run, rank=1, world_size=2, keep=2, published=lambda _: None)
    other.send("step-1", _part(tmp_path, 1))
    assert sender.settle(_alone) == []
    assert run.checkpoints() == ["step-1"]


def test_a_storage_that_refuses_is_named(tmp_path: Path, run: RunFolder) -> None:
    Path(run.path).parent.mkdir(parents=True)
    Path(run.path).write_text("a file where the run's folder should be")
    sender = Sender(run, rank=0, world_size=1, keep=2, published=lambda _: None)
    sender.send("step-1", _part(tmp_path, 0))
    (said,) = sender.settle(_alone)
    assert said.startswith("rank 0: ")
    assert str(run.path) in said


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_damage_is_found_and_named(tmp_path: Path, run: RunFolder, harm: str) -> None:
    _save(tmp_path, run, "step-1")
    shard = Path(run.path) / "step-1" / "state" / "shard-1.pt"
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_text("weights 2" if harm == "changed" else "wei")
    with pytest.raises(Damaged, match=r"step-1/state/shard-1.pt (is not there|has \d bytes)"):
        verify(run, "step-1")


def test_the_newest_that_is_whole_is_taken(
    tmp_path: Path, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("step-1", "step-2"):
        _save(tmp_path, run, name)
    (Path(run.path) / "step-3").mkdir()  # one that was being sent when all was killed
    assert run.checkpoints() == ["step-1", "step-2"]
    (Path(run.path) / "step-2" / "state" / "shard-0.pt").write_text("other")
    with agreed(run, run.checkpoints(), _alone, node_rank=0, local_rank=0) as found:
        assert found == ("step-1", Path(run.path) / "step-1")
    assert "checkpoint step-2 is damaged" in caplog.text
    (Path(run.path) / "step-1" / MANIFEST).write_text("{")
    with (
        pytest.raises(RunStop, match=r"no checkpoint is whole, of \['step-1', 'step-2'\]"),
        agreed(run, run.checkpoints(), _alone, node_rank=0, local_rank=0),
    ):
        raise AssertionError("there is none")
    with agreed(run, [], _alone, node_rank=0, local_rank=0) as found:
        assert found is None


def test_a_checkpoint_that_training_has_replaced_is_told_as_such(
    tmp_path: Path, run: RunFolder
) -> None:
    _save(tmp_path, run, "step-2")
    with (
        pytest.raises(
            RunStop, match=r"it has \['step-2'\] by now, so it is in training: ask again"
        ),
        agreed(run, ["step-1"], _alone, node_rank=0, local_rank=0),
    ):
        raise AssertionError("there is none")
    _save(tmp_path, run, "step-3")
    (Path(run.path) / "step-3" / "state" / "shard-0.pt").write_text("other")
    with (
        pytest.raises(RunStop, match=r"of \['step-3'\]; put their files back"),
        agreed(run, ["step-3"], _alone, node_rank=0, local_rank=0),
    ):
        raise AssertionError("it is damaged")


def test_only_the_newest_stay(tmp_path: Path, run: RunFolder) -> None:
    for name in ("step-1", "step-2", "step-4"):
        _save(tmp_path, run, name, ranks=1)
    (Path(run.path) / "step-3").mkdir()  # a remainder
    (Path(run.path) / "step-5").mkdir()  # being sent
    assert prune(run, keep=1) == ["step-2", "step-3"]
    assert run.attempted() == ["step-4", "step-5"]


def test_a_damaged_newest_does_not_push_out_the_good_ones(tmp_path: Path, run: RunFolder) -> None:
    """By its name it would be the newest for ever, and the only one that is kept."""
    for name in ("step-00000010", "step-00000017"):
        _save(tmp_path, run, name)
    (Path(run.path) / "step-00000017" / "loss-1.pt.gz").write_text("x")
    forget_after(run, "step-00000010")
    _save(tmp_path, run, "step-00000015")
    prune(run, keep=1)
    assert run.checkpoints() == ["step-00000015"]


def test_what_was_made_of_a_checkpoint_is_kept_only_while_it_is_whole(
    tmp_path: Path, run: RunFolder
) -> None:
    _save(tmp_path, run, "step-1", ranks=1)
    made = Path(run.path) / "step-1" / "universal"
    made.mkdir()
    (made / "a.pt").write_text("half made")
    fetch_derived(run, "step-1/universal", made)
    assert not made.exists(), "it has no manifest"
    made.mkdir()
    (made / "a.pt").write_text("made")
    keep(run, "step-1/universal", made)
    fetch_derived(run, "step-1/universal", made)
    assert (made / "a.pt").read_text() == "made"
    assert verify(run, "step-1") > 0, "the checkpoint itself is as it was"
    (made / "a.pt").write_text("mode")
    fetch_derived(run, "step-1/universal", made)
    assert not made.exists()
