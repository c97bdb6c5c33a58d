"""The folder of a run in the storage: its record, its tokenizer, its checkpoints.

STORAGE/NAME/run.json          what the run is, its MLflow run, whether it is finished
STORAGE/NAME/config.yaml       its whole config: `gammaray train` takes it
STORAGE/NAME/step-00000500/    a checkpoint, once it has a manifest; see checkpoint.py
STORAGE/NAME/quarantine/       the rows that were dropped, and why
STORAGE/NAME/suite/            what `gammaray evaluate --suite all` found, a file for each result
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.config.schema import resolve_path
from pipeline.data.answers import AnswerList
from pipeline.data.decode import Asked
from pipeline.data.rows import BadRow
from pipeline.data.storage import open_filesystem
from pipeline.data.text import Tokenizer
from pipeline.errors import UserError
from pipeline.tracking.tracker import RunRef

RECORD = "run.json"
CONFIG = "config.yaml"
META = "meta.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What must be known to go on with a run.

    `config` is the config as plain values, `attempts` how often its workers have been started,
    `asked` of a task with answers.
    """

    name: str
    config: dict[str, Any]
    tokenizer: Tokenizer
    data_digest: str
    mlflow_uri: str
    mlflow_run_id: str
    is_finished: bool
    attempts: int = 0
    asked: Asked | None = None

    @property
    def mlflow(self) -> RunRef:
        """Its MLflow run, where it was last."""
        return RunRef(uri=self.mlflow_uri, run_id=self.mlflow_run_id)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder on any filesystem pyarrow knows."""

    filesystem: pafs.FileSystem
    path: str
    url: str

    @staticmethod
    def of(storage: str, name: str) -> "RunFolder":
        """The folder of run `name` in `storage`, which need not exist yet."""
        try:
            filesystem, root = open_filesystem(storage)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"cluster.storage: {storage} cannot be reached: {error}") from error
        return RunFolder(filesystem, f"{root.rstrip('/')}/{name}", f"{storage.rstrip('/')}/{name}")

    def check_writable(self) -> None:
        """Raise `UserError` unless files can be written here."""
        probe = f"{self.path}/.probe"
        try:
            existed = self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound
            self.filesystem.create_dir(self.path, recursive=True)
            self.write_text(".probe", "ok")
            self.filesystem.delete_file(probe)
            if not existed:
                self.filesystem.delete_dir(self.path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cluster.storage: cannot write to {self.url} ({error}); choose another folder or "
                "mend its permissions"
            ) from error

    def write_text(self, name: str, text: str) -> None:
        """Write a small file: it is there as a whole, or as it was before."""
        path = f"{self.path}/{name}"
        # A filesystem that can rename shows what is being written; an object store does not.
        is_local = isinstance(self.filesystem, pafs.LocalFileSystem)
        target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if is_local else path
        with self.filesystem.open_output_stream(target) as file:
            file.write(text.encode())
        if is_local:
            self.filesystem.move(target, path)

    def read_text(self, name: str) -> str | None:
        """Read a small file; None when it is not there."""
        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type != pafs.FileType.File:
            return None
        with self.filesystem.open_input_file(path) as file:
            return file.read().decode()

    def remove(self, name: str) -> None:
        """Remove a folder of the run and all in it, if it is there; its manifest first."""
        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type != pafs.FileType.Directory:
            return
        if self.filesystem.get_file_info(f"{path}/{MANIFEST}").type == pafs.FileType.File:
            self.filesystem.delete_file(f"{path}/{MANIFEST}")
        self.filesystem.delete_dir(path)

    def write_record(self, record: RunRecord) -> None:
        """Write the run's record."""
        self.filesystem.create_dir(self.path, recursive=True)
        self.write_text(RECORD, json.dumps(asdict(record), indent=1))

    def read_record(self) -> RunRecord | None:
        """Read the run's record; None for a run that has none."""
        text = self.read_text(RECORD)
        if text is None:
            return None
        try:
            values = json.loads(text)
            values["tokenizer"] = Tokenizer(**values["tokenizer"])
            if (asked := values.get("asked")) is not None:
                answers = AnswerList(
                    names=tuple(asked["answers"]["names"]), is_open=asked["answers"]["is_open"]
                )
                values["asked"] = Asked(answers=answers, pictures=asked["pictures"])
            return RunRecord(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.url}/{RECORD}: not a run's record ({error}); remove the folder, or use "
                "another name"
            ) from error

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, oldest first: those that were published whole."""
        names = self.attempted()
        infos = self.filesystem.get_file_info([f"{self.path}/{name}/{MANIFEST}" for name in names])
        return [name for name, info in zip(names, infos, strict=True)
                if info.type == pafs.FileType.File]  # fmt: skip

    def checkpoint(self, name: str | None) -> str:
        """The newest checkpoint, or the one of that name. Raises `UserError` without."""
        names = self.checkpoints()
        if not names:
            raise UserError(f"{self.url}: it has no checkpoint yet; let it train until it has")
        chosen = name or names[-1]
        if chosen not in names:
            raise UserError(f"--checkpoint: {self.url} has no {chosen!r}; it has {names}")
        return chosen

    def attempted(self) -> list[str]:
        """Names of all folders of checkpoints, also of those that are not whole; oldest first."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        folders = [item for item in self.filesystem.get_file_info(selector)
                   if item.type == pafs.FileType.Directory]  # fmt: skip
        names = [PurePosixPath(item.path).name for item in folders]
        return sorted(name for name in names if name.startswith("step-"))

    def write_quarantine(self, name: str, rows: list[BadRow]) -> None:
        """Write dropped rows to quarantine/NAME.parquet: path, row_group, row, reason."""
        if not rows:
            return
        folder = f"{self.path}/quarantine"
        self.filesystem.create_dir(folder, recursive=True)
        table = pa.Table.from_pylist([asdict(row) for row in rows])
        with self.filesystem.open_output_stream(f"{folder}/{name}.parquet") as file:
            pq.write_table(table, file)

    def read_quarantine(self) -> list[BadRow]:
        """Give every dropped row once, though a resumed run may have met it twice."""
        selector = pafs.FileSelector(f"{self.path}/quarantine", allow_not_found=True)
        rows: dict[BadRow, None] = {}
        for item in self.filesystem.get_file_info(selector):
            with self.filesystem.open_input_file(item.path) as file:
                rows.update({BadRow(**row): None for row in pq.read_table(file).to_pylist()})
        return sorted(rows, key=lambda row: (row.path, row.row_group, row.row))


def find_run(storage: str, name: str) -> tuple[RunFolder, RunRecord | None]:
    """Give the folder to use for `name`: the unfinished run's, or the next free one's.

    A finished run stays as it is; the next is called NAME-2, then NAME-3.
    """
    number = 1
    while True:
        folder = RunFolder.of(storage, name if number == 1 else f"{name}-{number}")
        record = folder.read_record()
        if record is None or not record.is_finished:
            return folder, record
        number += 1


def open_run(run: str) -> tuple[RunFolder, RunRecord]:
    """The folder and record of the run at STORAGE/NAME. Raises `UserError` where there is none."""
    # Workers run in other folders.
    storage, _, name = resolve_path(run.rstrip("/"), Path.cwd()).rpartition("/")
    folder = RunFolder.of(storage, name)
    record = folder.read_record()
    if record is None:
        raise UserError(f"{run}: no run there; give the folder of a run, such as runs/demo")
    return folder, record


def list_runs(storage: str) -> list[RunFolder]:
    """Give the folders of all runs in `storage`, by name."""
    root = RunFolder.of(storage, "")
    selector = pafs.FileSelector(root.path.rstrip("/"), allow_not_found=True)
    names = [PurePosixPath(item.path).name for item in root.filesystem.get_file_info(selector)
             if item.type == pafs.FileType.Directory]  # fmt: skip
    folders = [RunFolder.of(storage, name) for name in sorted(names)]
    records = [f"{folder.path}/{RECORD}" for folder in folders]
    return [folder for folder, info in
            zip(folders, root.filesystem.get_file_info(records), strict=True)
            if info.type == pafs.FileType.File]  # fmt: skip


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which values of two flat configs differ, leaving out what a resumed run may change."""
    free = (
        "name",
        "data.val",
        "data.max_bad_fraction",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep",
        "train.max_nonfinite",
        "evaluate.",
        "tracking.",
        "cluster.",
    )
    keys = sorted(set(before) | set(now))
    return [
        f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
