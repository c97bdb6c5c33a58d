"""A checkpoint's way to the storage and back: sent while training goes on, and whole or not at all.

STORAGE/NAME/step-00000500/               what all ranks wrote, file by file as it arrives
STORAGE/NAME/step-00000500/sent-R.json    of rank R, when its files are there: their sizes, hashes
STORAGE/NAME/step-00000500/manifest.json  all of them; what has none is no checkpoint

What is read back is compared with the manifest first: DeepSpeed's files hold pickled objects, and
to load one of unknown origin is to run it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.storage import explain, retried
from pipeline.errors import RunStop
from pipeline.train.store import MANIFEST, RunFolder

LOG = logging.getLogger(__name__)
CHUNK = 8 * 2**20
FILES_AT_ONCE = 4
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Sum:
    """What a file must be: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


Sums = dict[str, Sum]  # by path in the checkpoint
Gather = Callable[[Any], list[Any]]  # every rank's value, on every rank


class Damaged(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


class Sender:
    """Sends what one rank wrote, in a thread of its own; that of rank 0 also publishes.

    One checkpoint at a time: `settle` before the next `send`, on every rank.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        rank: int,
        world_size: int,
        keep: int,
        published: Callable[[str], None],
    ):
        """`keep` checkpoints remain; `published` is told each one's name, on rank 0."""
        self._run, self._rank, self._world_size, self._keep = run, rank, world_size, keep
        self._published = published
        self._sending: threading.Thread | None = None
        self._publishing: threading.Thread | None = None
        self._given_up = threading.Event()
        self._folder: Path | None = None
        self._name = ""
        self._error: str | None = None

    def send(self, name: str, folder: Path) -> None:
        """Begin to send the files of `folder` as this rank's part of checkpoint `name`.

        The folder is removed once it is sent.
        """
        if folder != self._folder:
            self.discard()
        self._name, self._folder, self._error = name, folder, None
        self._given_up = threading.Event()
        self._sending = threading.Thread(target=self._send, name="send", daemon=True)
        self._sending.start()
        if self._rank == 0:
            self._publishing = threading.Thread(target=self._publish, name="publish", daemon=True)
            self._publishing.start()

    def settle(self, gather: Gather) -> list[str]:
        """Wait until all ranks' parts are sent and published; give what failed, rank by rank.

        Every rank must call it; all get the same answer. After a failure nothing of the checkpoint
        is left in the storage, and `retry` may send it again.
        """
        if self._sending is not None:
            self._sending.join()
        failed = [error for error in gather(self._error) if error is not None]
        if self._publishing is not None:
            if failed:
                self._given_up.set()
            self._publishing.join()
        failed = failed or [error for error in gather(self._error) if error is not None]
        self._sending = self._publishing = None
        if not failed:
            self.discard()
        elif self._rank == 0:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._run.remove(self._name)
        return failed

    def discard(self) -> None:
        """Remove this rank's own copy."""
        self._given_up.set()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def retry(self) -> None:
        """Send again what could not be sent."""
        assert self._folder is not None, "settle keeps the folder of what has failed"
        self.send(self._name, self._folder)

    def _send(self) -> None:
        assert self._folder is not None
        try:
            sums = upload(self._folder, self._run, self._name)
            said = {path: asdict(sum_) for path, sum_ in sums.items()}
            self._run.write_text(f"{self._name}/{sent_name(self._rank)}", json.dumps(said))
        except (OSError, pa.ArrowException) as error:
            self._error = f"rank {self._rank}: {explain(error)}"

    def _publish(self) -> None:
        try:
            if publish(self._run, self._name, self._world_size, self._given_up):
                self._published(self._name)
                prune(self._run, self._keep)
        except (OSError, pa.ArrowException) as error:
            self._error = self._error or f"rank {self._rank}: {explain(error)}"


def sent_name(rank: int) -> str:
    """The file that says what rank `rank` has sent."""
    return f"sent-{rank:05d}.json"


def upload(folder: Path, run: RunFolder, name: str) -> Sums:
    """Copy all files under `folder` to checkpoint `name`; give what they are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parents = {path.parent.relative_to(folder) for path in files}
    for parent in sorted(parents | {Path()}):
        run.filesystem.create_dir(f"{run.path}/{name}/{parent.as_posix()}", recursive=True)

    def copy(path: Path) -> tuple[str, Sum]:
        inside = path.relative_to(folder).as_posix()
        target = f"{run.path}/{name}/{inside}"
        return inside, retried(lambda: _copy(path, run.filesystem, target), target, run.filesystem)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return dict(pool.map(copy, files))


def _copy(source: Path, filesystem: pafs.FileSystem, target: str) -> Sum:
    with (
        source.open("rb") as read,
        filesystem.open_output_stream(target, compression=None) as written,
    ):
        return _pass(read, written)


def _pass(read: Any, written: Any) -> Sum:
    """Copy all of one open file to another; give what it was."""
    digest, size = hashlib.sha256(), 0
    while chunk := read.read(CHUNK):
        written.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return Sum(size, digest.hexdigest())


def publish(run: RunFolder, name: str, world_size: int, given_up: threading.Event) -> bool:
    """Wait for what every rank says it has sent, then write the manifest; whether it did."""
    wanted = [f"{run.path}/{name}/{sent_name(rank)}" for rank in range(world_size)]
    while True:
        found = run.filesystem.get_file_info(wanted)
        if all(info.type == pafs.FileType.File for info in found):
            break
        if given_up.wait(POLL_SECONDS):
            return False
    files: dict[str, Any] = {}
    for rank in range(world_size):
        files |= json.loads(run.read_text(f"{name}/{sent_name(rank)}") or "{}")
    run.write_text(f"{name}/{MANIFEST}", json.dumps({"files": files}, indent=1))
    for path in wanted:
        run.filesystem.delete_file(path)
    return True


def prune(run: RunFolder, keep: int, whole: list[str] | None = None) -> list[str]:
    """Remove all checkpoints but the newest `keep`, and remains of older ones; give their names.

    `whole`, oldest first, are those that count; without, all that were published.
    """
    kept = (run.checkpoints() if whole is None else whole)[-keep:]
    gone = [name for name in run.attempted() if kept and name < kept[-1] and name not in kept]
    for name in gone:
        run.remove(name)
    return gone


def forget_after(run: RunFolder, name: str) -> None:
    """Remove what is newer than checkpoint `name`, which training goes on from.

    It is damaged, or was never whole; a newer name must not outlive those that come now.
    """
    for later in run.attempted():
        if later > name:
            run.remove(later)


def read_manifest(run: RunFolder, name: str) -> Sums:
    """What the files of a published checkpoint must be. Raises `Damaged`."""
    text = run.read_text(f"{name}/{MANIFEST}")
    try:
        assert text is not None
        files = json.loads(text)["files"]
        return {path: Sum(**values) for path, values in files.items()}
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{run.url}/{name}/{MANIFEST}: no manifest there") from error


def verify(run: RunFolder, name: str) -> int:
    """Compare every file with the manifest; give the bytes read. Raises `Damaged`."""
    sums = read_manifest(run, name)
    _fetch_all(run, name, sums, None)
    return sum(each.size for each in sums.values())


@contextlib.contextmanager
def agreed(
    run: RunFolder, names: list[str], gather: Gather, *, node_rank: int, local_rank: int
) -> Iterator[tuple[str, Path] | None]:
    """The last of `names` that is whole on every node, and its files there; None without names.

    One rank of each node fetches and compares; a damaged checkpoint is warned of, and the one
    before it is taken. Every rank must call it. Raises `RunStop` when all are damaged.
    """
    names = gather(names)[0]
    with contextlib.ExitStack() as stack:
        for name in reversed(names):
            path = error = None
            if local_rank == 0:
                try:
                    path = str(stack.enter_context(fetched(run, name)))
                except Damaged as damage:
                    error = str(damage)
            said = gather((node_rank, path, error))
            errors = [error for *_, error in said if error is not None]
            if not errors:
                mine = next(path for node, path, _ in said if node == node_rank and path)
                yield name, Path(mine)
                gather(None)  # nobody's files are removed before all have read theirs
                return
            if local_rank == node_rank == 0:
                LOG.warning("checkpoint %s is damaged: %s", name, errors[0])
        if names:
            there = run.checkpoints()
            remedy = (
                f"it has {there} by now, so it is in training: ask again, or when it has ended"
                if there and not set(names) & set(there)
                else "put their files back, or start a new run with name=..."
            )
            raise RunStop(f"{run.url}: no checkpoint is whole, of {names}; {remedy}")
    yield None


def fetch_derived(run: RunFolder, name: str, folder: Path) -> None:
    """Bring what `keep` kept under `name` to `folder`; remove it where it is not whole."""
    in_place = isinstance(run.filesystem, pafs.LocalFileSystem)
    try:
        _fetch_all(run, name, read_manifest(run, name), None if in_place else folder)
    except Damaged:
        shutil.rmtree(folder, ignore_errors=True)
        run.remove(name)


def keep(run: RunFolder, name: str, folder: Path) -> None:
    """Publish a folder that was made of a checkpoint, as `name`, unless it is there."""
    if run.read_text(f"{name}/{MANIFEST}") is not None:
        return
    if isinstance(run.filesystem, pafs.LocalFileSystem):
        files = [path for path in folder.rglob("*") if path.is_file()]
        sums = {path.relative_to(folder).as_posix(): _read(run.filesystem, str(path), None)
                for path in files}  # fmt: skip
    else:
        sums = upload(folder, run, name)
    files = {path: asdict(sum_) for path, sum_ in sums.items()}
    run.write_text(f"{name}/{MANIFEST}", json.dumps({"files": files}, indent=1))


@contextlib.contextmanager
def fetched(run: RunFolder, name: str) -> Iterator[Path]:
    """The files of a checkpoint in a local folder, each as its manifest says. Raises `Damaged`.

    In a local storage they are read where they lie, else copied for as long as they are needed.
    """
    sums = read_manifest(run, name)
    if isinstance(run.filesystem, pafs.LocalFileSystem):
        _fetch_all(run, name, sums, None)
        yield Path(run.path) / name
        return
    with tempfile.TemporaryDirectory(prefix="gammaray-") as folder:
        _fetch_all(run, name, sums, Path(folder))
        yield Path(folder)


def _fetch_all(run: RunFolder, name: str, sums: Sums, folder: Path | None) -> None:
    def fetch(item: tuple[str, Sum]) -> None:
        path, wanted = item
        source = f"{run.path}/{name}/{path}"
        target = None if folder is None else folder / PurePosixPath(path)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = retried(lambda: _read(run.filesystem, source, target), source, run.filesystem)
        except FileNotFoundError as error:
            raise Damaged(f"{source} is not there") from error
        if found != wanted:
            raise Damaged(
                f"{source} has {found.size:,} bytes with SHA-256 {found.sha256[:12]}..., its "
                f"manifest says {wanted.size:,} with {wanted.sha256[:12]}..."
            )

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(fetch, sums.items()))


def _read(filesystem: pafs.FileSystem, source: str, target: Path | None) -> Sum:
    with (
        filesystem.open_input_stream(source, compression=None) as read,
        Path(os.devnull if target is None else target).open("wb") as written,
    ):
        return _pass(read, written)
