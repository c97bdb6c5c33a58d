"""OUT, a folder on any filesystem, and the names of what lies in it.

Enters: a local path or URL. Leaves: files that appear whole or not at all. Must not know: what is
in them.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError

STATS = "stats.json"
QUARANTINE = "_quarantine.parquet"  # readers of a folder of Parquet pass over such names
WORK = "_work"
PLAN = f"{WORK}/plan.json"
PARTS = f"{WORK}/parts"
SHARDS = f"{WORK}/shards"  # until all are made
LISTING = f"{WORK}/listing"


def name_part(number: int) -> str:
    """The name that a part's files have, without their endings."""
    return f"{PARTS}/{number:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """OUT: a local folder or URL. What is written appears whole or not at all."""

    root: str

    def _at(self, name: str) -> tuple[pafs.FileSystem, str]:
        filesystem, inner = open_filesystem(self.root)
        return filesystem, f"{inner.rstrip('/')}/{name}" if name else inner

    def url(self, name: str) -> str:
        """The place of `name` for other readers."""
        head, mark, query = self.root.partition("?")
        return f"{head.rstrip('/')}/{name}{mark}{query}"

    def names(self, folder: str) -> list[str]:
        """What lies in `folder`, sorted; nothing when it is absent."""
        filesystem, path = self._at(folder)
        try:
            selector = pafs.FileSelector(path, allow_not_found=True)
            return sorted(info.base_name for info in filesystem.get_file_info(selector))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"OUT: {self.root} cannot be used: {error}") from error

    def make(self, folder: str) -> None:
        """Make a folder and those above it."""
        filesystem, path = self._at(folder)
        try:
            filesystem.create_dir(path, recursive=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"OUT: {self.root} cannot be written: {error}") from error

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading."""
        filesystem, path = self._at(name)
        return filesystem.open_input_file(path)

    def read_json(self, name: str) -> Any:
        """The JSON at `name`; None when it is absent."""
        filesystem, path = self._at(name)
        if filesystem.get_file_info(path).type != pafs.FileType.File:
            return None
        with filesystem.open_input_file(path) as file:
            return json.loads(file.read())

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        content = (json.dumps(value, indent=1) + "\n").encode()
        self.write(name, lambda sink: sink.write(content))

    def write(self, name: str, fill: Callable[[Any], Any]) -> None:
        """Let `fill` write to a temporary file, and rename it."""
        filesystem, path = self._at(name)
        _, temporary = self._at(f"{WORK}/{uuid.uuid4().hex}.tmp")
        with filesystem.open_output_stream(temporary) as sink:
            fill(sink)
        filesystem.move(temporary, path)

    def move(self, name: str, target: str) -> None:
        """Rename a file."""
        filesystem, path = self._at(name)
        filesystem.move(path, self._at(target)[1])

    def publish(self, names: Iterable[str], mark: str, facts: Mapping[str, Any]) -> None:
        """Show the files that wait in SHARDS, then the mark that all are there; forget the work."""
        waiting = set(self.names(SHARDS))
        for name in names:
            if name in waiting:
                self.move(f"{SHARDS}/{name}", name)
        self.write_json(mark, facts)
        self.remove(WORK)

    def refuse(self, names: Sequence[str]) -> NoReturn:
        """Raise `UserError`: OUT is not this command's."""
        raise UserError(
            f"OUT: {self.root} holds other files ({', '.join(names[:4])}); choose another folder, "
            "or remove it"
        )

    def remove(self, folder: str) -> None:
        """Remove a folder, if it is there."""
        filesystem, path = self._at(folder)
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            filesystem.delete_dir(path)
