"""Which files at IN hold pairs, and of which form they are.

Enters: a folder, file, glob or URL. Leaves: `Found`, or a `UserError` that says what is there and
what to do. Must not know: what is in the files.
"""

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.layout import SPLITS
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError

Form = Literal["parquet", "webdataset", "table"]

PLACE = "IN"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
ANSWER_LIST = "answer_list.json"  # ALBEF's: what may be answered, beside its tables


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file: its path on its filesystem, its name below the source's folder, bytes, date."""

    path: str
    name: str
    size: int
    changed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The files at `path` that hold pairs, all of one form, below the folder `root`."""

    path: str
    root: str
    form: Form
    files: tuple[File, ...]

    @property
    def digest(self) -> str:
        """Changes when a file appears, vanishes, or changes its size or date."""
        lines = (f"{file.name} {file.size} {file.changed}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_files(path: str) -> Found:
    """Find out which files at `path` hold pairs. Raises `UserError`."""
    root, files = _list_files(path)
    form, files = _choose_form(path, files)
    _refuse_mixed_splits(path, files)
    return Found(path=path, root=root, form=form, files=tuple(files))


def _list_files(path: str) -> tuple[str, list[File]]:
    """The folder at or above `path`, as given, and all files under it."""
    is_glob = any(character in path for character in "*?[") and not Path(path).exists()
    try:
        if "://" not in path and is_glob:
            found = sorted(Path(item).absolute() for item in glob.glob(path, recursive=True))  # noqa: PTH207  the pattern may be absolute
            paths = [item for item in found if item.is_file()]
            if not paths:
                raise UserError(f"{PLACE}: no file matches {path}")
            root = os.path.commonpath([item.parent for item in paths])
            infos = pafs.LocalFileSystem().get_file_info([str(item) for item in paths])
            return root, [_as_file(info, root) for info in infos]
        filesystem, inner = open_filesystem(path)
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"{PLACE}: {path} does not exist")
        if info.type == pafs.FileType.File:
            parent = above(path)
            return parent, [_as_file(info, str(PurePosixPath(inner).parent))]
        listed = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{PLACE}: {path} cannot be reached: {error}") from error
    files = [_as_file(item, inner) for item in listed if item.type == pafs.FileType.File]
    shown = [file for file in files if not _is_hidden(file.name)]
    return path, sorted(shown, key=lambda file: file.name)


def _as_file(info: pafs.FileInfo, root: str) -> File:
    name = PurePosixPath(info.path).relative_to(root).as_posix()
    return File(path=info.path, name=name, size=info.size or 0, changed=info.mtime_ns or 0)


def _is_hidden(name: str) -> bool:
    return any(part[0] in "._" for part in PurePosixPath(name).parts)


def _choose_form(path: str, files: list[File]) -> tuple[Form, list[File]]:
    tars = [file for file in files if file.name.endswith(TAR_SUFFIXES)]
    parquet = [file for file in files if file.name.endswith(".parquet")]
    tables = [
        file
        for file in files
        if file.name.lower().endswith(TABLE_SUFFIXES)
        and not file.name.endswith(("_stats.json", ANSWER_LIST))
    ]
    if tars:
        # img2dataset writes an index of each tar beside it, without pixels.
        stems = {file.name.partition(".")[0] for file in tars}
        others = [file.name for file in parquet if file.name.partition(".")[0] not in stems]
        if others:
            raise UserError(
                f"{PLACE}: {path} holds tars and also Parquet ({others[0]}); give one kind, with a "
                "pattern such as 'FOLDER/*.tar'"
            )
        return "webdataset", tars
    if parquet:
        return "parquet", parquet
    is_pattern = any(character in path for character in "*?[")
    if len(tables) > 1 and not is_pattern and question_pair(tables) is None:
        raise UserError(
            f"{PLACE}: {path} holds {len(tables)} tables ({', '.join(t.name for t in tables[:4])}"
            f"{', ...' if len(tables) > 4 else ''}); give one, or a pattern of those that belong "
            "together, such as 'FOLDER/*.csv'"
        )
    if tables:
        return "table", tables
    kinds = sorted({PurePosixPath(file.name).suffix or file.name for file in files})
    pictures = {f".{name}" for name in TAR_IMAGES} & set(kinds)
    raise UserError(
        f"{PLACE}: {path} holds {len(files)} file(s) of kind {kinds[:8]}, and no Parquet, tar, "
        "CSV, TSV, JSON or JSONL"
        + ("; write a CSV with the columns image and caption" if pictures else "")
    )


def question_pair(files: Sequence[File]) -> tuple[File, File] | None:
    """VQA's questions and their annotations, where the files are just these two."""
    questions = [file for file in files if file.name.lower().endswith("questions.json")]
    answers = [file for file in files if file.name.lower().endswith("annotations.json")]
    is_pair = len(files) == 2 and len(questions) == len(answers) == 1
    return (questions[0], answers[0]) if is_pair else None


def read_answer_list(found: Found) -> bytes | None:
    """The content of ALBEF's list of answers, if it lies beside the first table."""
    path = join(above(join(found.root, found.files[0].name)), ANSWER_LIST)
    filesystem, inner = open_filesystem(path)
    if filesystem.get_file_info(inner).type != pafs.FileType.File:
        return None
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def _refuse_mixed_splits(path: str, files: list[File]) -> None:
    """Folders or files named for splits must not end in one set unseen."""
    names = sorted({name for group in SPLITS.values() for names in group for name in names})
    pattern = re.compile(rf"(?:^|/)({'|'.join(names)})(?=[-_./0-9])")
    found = {match[1]: file.name for file in files if (match := pattern.search(file.name))}
    if len(found) > 1:
        example = next(iter(found.values()))
        raise UserError(
            f"{PLACE}: {path} holds the splits {sorted(found)} (e.g. {example}), which would "
            "become one set; prepare each by itself, giving its folder or a pattern such as "
            "'FOLDER/train-*'"
        )


# ---- paths beside paths --------------------------------------------------------------------------


def above(path: str) -> str:
    """The folder of a file, as a path or URL."""
    if "://" not in path:
        return str(Path(path).absolute().parent)
    parts = urlsplit(path)
    return parts._replace(path=parts.path.rpartition("/")[0]).geturl()


def join(folder: str, path: str) -> str:
    """`path` seen from `folder`, which may be a URL with a query."""
    if "://" in path or path.startswith("/"):
        return path
    if "://" not in folder:
        return str(Path(folder).absolute() / path)
    parts = urlsplit(folder)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()
