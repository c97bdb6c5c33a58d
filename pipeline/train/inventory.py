"""What checkpoints a run has, from a listing of its folder and the small files in it.

Enters: a run's folder. Leaves: one `Entry` for each checkpoint, oldest first.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.fs as pafs

from pipeline.train.publish import Damaged, read_manifest
from pipeline.train.store import MANIFEST, META, RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A checkpoint, or the remains of one.

    `samples` and `saved_at` (seconds since 1970) are None where they cannot be known. `size` in
    bytes and `files` are of all that lies in its folder. `damage` says how it differs from its
    manifest, as far as that was looked at.
    """

    name: str
    step: int
    samples: int | None
    saved_at: float | None
    size: int
    files: int
    is_published: bool
    damage: str | None

    @property
    def is_whole(self) -> bool:
        """Whether a run could go on from it, as far as is known."""
        return self.is_published and self.damage is None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "is_whole": self.is_whole}


def list_checkpoints(run: RunFolder) -> list[Entry]:
    """Every checkpoint of the run; that files have the right sizes is looked at, no more."""
    return [_look(run, name) for name in run.attempted()]


def _look(run: RunFolder, name: str) -> Entry:
    selector = pafs.FileSelector(f"{run.path}/{name}", recursive=True, allow_not_found=True)
    found = {
        info.path.rpartition(f"/{name}/")[2]: info
        for info in run.filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File
    }
    is_published = MANIFEST in found
    times = [info.mtime_ns for info in found.values() if info.mtime_ns is not None]
    sizes = {path: info.size or 0 for path, info in found.items()}
    return Entry(
        name=name,
        step=int(name.removeprefix("step-")),
        samples=_samples(run, name) if META in found else None,
        saved_at=max(times) / 1e9 if times else None,
        size=sum(sizes.values()),
        files=len(found),
        is_published=is_published,
        damage=_damage(run, name, sizes) if is_published else None,
    )


def _samples(run: RunFolder, name: str) -> int | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return int(json.loads(run.read_text(f"{name}/{META}") or "")["progress"]["samples"])
    return None


def _damage(run: RunFolder, name: str, sizes: dict[str, int]) -> str | None:
    try:
        wanted = read_manifest(run, name)
    except Damaged as damage:
        return str(damage)
    for path, sum_ in sorted(wanted.items()):
        place = f"{run.path}/{name}/{path}"
        if path not in sizes:
            return f"{place} is not there"
        if sizes[path] != sum_.size:
            return f"{place} has {sizes[path]:,} bytes, its manifest says {sum_.size:,}"
    return None
