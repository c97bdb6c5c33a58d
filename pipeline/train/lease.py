"""One driver at a time for a run: a small file in its folder that the driver renews.

No clock is compared, so that machines whose clocks differ cannot both think they own a run: who
finds a lease watches whether it is renewed.
"""

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.train.store import RunFolder

LEASE = "driver.json"
RENEW_SECONDS = 8.0
PATIENCE = 30.0  # seconds without renewal after which a driver elsewhere is taken for dead


class Lease:
    """A held lease. `is_lost` turns true when another driver has taken the run over."""

    def __init__(self, run: RunFolder):
        self._run = run
        self._token = uuid.uuid4().hex
        self._count = 0
        self._closed = threading.Event()
        self.is_lost = False

    def renew(self) -> None:
        """Write the lease once more."""
        self._count += 1
        me = psutil.Process()
        self._run.filesystem.create_dir(self._run.path, recursive=True)
        self._run.write_text(
            LEASE,
            json.dumps(
                {
                    "token": self._token,
                    "host": socket.gethostname(),
                    "pid": me.pid,
                    "started": me.create_time(),
                    "count": self._count,
                }
            ),
        )

    def keep(self) -> None:
        """Renew until closed, or until the lease is another's."""
        while not self._closed.wait(RENEW_SECONDS):
            # A storage that does not answer for a while takes nothing from us.
            with contextlib.suppress(OSError, pa.ArrowException, UserError):
                found = _read(self._run)
                if found is not None and found["token"] != self._token:
                    self.is_lost = True
                    return
                self.renew()

    def close(self) -> None:
        """Give the run free, if it is still ours."""
        self._closed.set()
        with contextlib.suppress(OSError, pa.ArrowException, UserError):
            found = _read(self._run)
            if found is not None and found["token"] == self._token:
                self._run.filesystem.delete_file(f"{self._run.path}/{LEASE}")


@contextlib.contextmanager
def leased(
    run: RunFolder, say: Callable[[str], None], instead: str = "start another run with name=..."
) -> Iterator[Lease]:
    """Hold the run's lease. Raises `UserError` when another driver holds it; `instead` ends it.

    A driver that died on this machine is known to be dead; one elsewhere is watched for a while,
    which `say` is told.
    """
    found = _read(run)
    if found is not None and not _is_dead_here(found):
        if found["host"] != socket.gethostname():
            say(f"Waiting up to {PATIENCE:.0f} s: is the run's driver on {found['host']} alive?")
            found = None if _is_still(run, found) else found
        if found is not None:
            raise UserError(
                f"{run.url}: process {found['pid']} on {found['host']} is training this run; stop "
                f"it first, or {instead}"
            )
    lease = Lease(run)
    lease.renew()
    thread = threading.Thread(target=lease.keep, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.close()


def wait_for_the_dead(run: RunFolder) -> None:
    """Wait, at most `PATIENCE`, while a driver of this machine that has the run is dying.

    For who knows that it is: an actor outlives its killed driver by seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = _read(run)
        if found is None or found["host"] != socket.gethostname() or _is_dead_here(found):
            return
        time.sleep(0.5)


def _read(run: RunFolder) -> dict[str, Any] | None:
    """What the lease says; None where there is none. Raises `UserError` where it is damaged."""
    text = run.read_text(LEASE)
    if text is None:
        return None
    try:
        found = json.loads(text)
        return {name: found[name] for name in ("token", "host", "pid", "started", "count")}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{run.url}/{LEASE}: says {text[:40]!r}, not which driver trains this run, so it is "
            "damaged; if none does, remove the file"
        ) from None


def _is_dead_here(found: dict[str, Any]) -> bool:
    if found["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(found["pid"])
        is_other = abs(process.create_time() - found["started"]) > 1
        return is_other or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_still(run: RunFolder, found: dict[str, Any]) -> bool:
    """Whether nobody renews the lease for a while."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _read(run)
        if now is None:
            return True
        if now != found:
            return False
    return True
