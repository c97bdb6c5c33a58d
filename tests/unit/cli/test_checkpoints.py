"""What a run has saved: listed, verified, pruned."""

import json
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli.checkpoints import age
from pipeline.data.text import Tokenizer
from pipeline.train.lease import leased
from pipeline.train.publish import Sender
from pipeline.train.store import META, RunFolder, RunRecord

NAMES = [f"step-{step:08d}" for step in (100, 200, 300)]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with three whole checkpoints, and one that was being sent when it was killed."""
    run = RunFolder.of(str(tmp_path / "runs"), "tiny")
    run.write_record(
        RunRecord(
            name="tiny",
            config={},
            tokenizer=Tokenizer(json="", start=0, end=1, pad=1),
            data_digest="",
            mlflow_uri="",
            mlflow_run_id="",
            is_finished=False,
        )
    )
    for name in NAMES:
        part = tmp_path / "part"
        (part / "state").mkdir(parents=True)
        (part / "state" / "shard.pt").write_text("weights")
        progress = {"step": 1, "samples": 16 * int(name[5:])}
        (part / META).write_text(json.dumps({"progress": progress}))
        sender = Sender(run, rank=0, world_size=1, keep=9, published=lambda name: None)
        sender.send(name, part)
        assert not sender.settle(lambda value: [value])
    remains = Path(run.path) / "step-00000400"
    remains.mkdir()
    (remains / "shard.pt").write_text("half")
    return run


def _checkpoints(monkeypatch: pytest.MonkeyPatch, run: RunFolder, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gammaray", "checkpoints", run.url, *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_they_are_listed(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    facts = tmp_path / "facts.json"
    assert _checkpoints(monkeypatch, run, "--json", str(facts)) == 0
    output = capfd.readouterr().out
    for part in ("step-00000300", "4,800", "whole", "not published"):
        assert part in output
    found = json.loads(facts.read_text())["checkpoints"]
    assert [each["is_whole"] for each in found] == [True, True, True, False]
    assert [each["step"] for each in found] == [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ((), "weight", "state/shard.pt has 6 bytes, its manifest says 7"),
        (("--verify",), "wrights", "its manifest says 7 with "),
        ((), None, "state/shard.pt is not there"),
    ],
)
def test_a_damaged_file_is_named(
    run: RunFolder,
    option: tuple[str, ...],
    content: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shard = Path(run.path) / NAMES[1] / "state" / "shard.pt"
    shard.unlink() if content is None else shard.write_text(content)
    assert _checkpoints(monkeypatch, run, *option) == 1
    output = capfd.readouterr().out
    assert said in output
    assert str(shard) in output


def test_verified_ones_are_said_to_be(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _checkpoints(monkeypatch, run, "--verify") == 0
    assert capfd.readouterr().out.count("every hash is right") == 3


def test_old_ones_are_removed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _checkpoints(monkeypatch, run, "--keep", "1") == 0
    assert "Removed step-00000100, step-00000200" in capfd.readouterr().out
    assert run.attempted() == [NAMES[2], "step-00000400"]
    assert _checkpoints(monkeypatch, run, "--keep", "1") == 0
    assert "None removed." in capfd.readouterr().out


def test_the_newest_whole_one_is_never_removed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(run.path) / NAMES[2] / "state" / "shard.pt").write_text("cut")
    assert _checkpoints(monkeypatch, run, "--keep", "1") == 1
    assert run.attempted() == [NAMES[1], NAMES[2], "step-00000400"]


def test_none_is_removed_when_none_is_whole(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        (Path(run.path) / name / "state" / "shard.pt").write_text("cut")
    assert _checkpoints(monkeypatch, run, "--keep", "1") == 1
    assert len(run.attempted()) == 4


def test_a_live_driver_forbids_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with leased(run, print):
        assert _checkpoints(monkeypatch, run, "--keep", "1") == 2
    output = " ".join(capfd.readouterr().out.split())
    assert "is training this run; stop it first, or leave it to the training" in output
    assert len(run.attempted()) == 4


def test_no_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = RunFolder.of(str(tmp_path), "nothing")
    assert _checkpoints(monkeypatch, nowhere) == 2
    assert "no run there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"), [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (3e5, "3 d")]
)
def test_ages(seconds: float, said: str) -> None:
    assert age(seconds) == said
