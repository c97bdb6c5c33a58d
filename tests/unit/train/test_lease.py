"""One driver at a time for a run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.train import lease
from pipeline.train.lease import LEASE, Lease, leased
from pipeline.train.store import RunFolder


def _say(text: str) -> None:
    raise AssertionError(f"nothing to wait for here: {text}")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(str(tmp_path), "tiny")


def test_it_is_given_back(run: RunFolder) -> None:
    for _ in range(2):
        with leased(run, _say):
            assert run.read_text(LEASE)
    assert run.read_text(LEASE) is None


def test_a_second_driver_is_refused_while_the_first_lives(run: RunFolder) -> None:
    with (
        leased(run, _say),
        pytest.raises(UserError, match=r"process \d+ on .* is training this run; stop it first"),
        leased(run, _say),
    ):
        raise AssertionError("two drivers")


def test_a_driver_that_died_here_holds_nothing(run: RunFolder) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    Lease(run).renew()
    _change(run, pid=int(dead.stdout))
    with leased(run, _say):
        pass
    Lease(run).renew()
    _change(run, started=1.0)  # another process has that number now
    with leased(run, _say):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"pid": 1}'])
def test_a_damaged_lease_is_named(run: RunFolder, text: str) -> None:
    run.filesystem.create_dir(run.path, recursive=True)
    run.write_text(LEASE, text)
    with pytest.raises(UserError, match=r"driver.json: says '.*damaged; if none does, remove"):
        leased(run, _say).__enter__()
    assert run.read_text(LEASE) == text


def test_a_driver_elsewhere_is_watched(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE", 2.0)
    said: list[str] = []
    Lease(run).renew()
    _change(run, host="other")
    with leased(run, said.append):
        assert said == ["Waiting up to 2 s: is the run's driver on other alive?"]
    Lease(run).renew()
    _change(run, host="other")

    def renewed_meanwhile(text: str) -> None:
        del text
        monkeypatch.setattr(lease.time, "sleep", lambda _: _change(run, count=99))

    with (
        pytest.raises(UserError, match="on other is training this run"),
        leased(run, renewed_meanwhile),
    ):
        raise AssertionError("two drivers")


def test_who_finds_another_in_its_place_knows_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    mine = Lease(run)
    mine.renew()
    _change(run, token="another's")
    mine.keep()
    assert mine.is_lost
    mine.close()
    assert run.read_text(LEASE), "another's lease stays"


def _change(run: RunFolder, **values: object) -> None:
    run.write_text(LEASE, json.dumps({**json.loads(run.read_text(LEASE) or ""), **values}))


def test_a_dying_driver_is_waited_for(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    lease.wait_for_the_dead(run)  # nobody has it
    dying = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    Lease(run).renew()
    _change(run, pid=dying.pid, started=lease.psutil.Process(dying.pid).create_time())
    began = time.monotonic()
    lease.wait_for_the_dead(run)
    assert time.monotonic() - began > 0.9, "it lives"
    dying.communicate(b"\n")
    monkeypatch.setattr(lease, "PATIENCE", 60.0)
    lease.wait_for_the_dead(run)
    assert time.monotonic() - began < 30
