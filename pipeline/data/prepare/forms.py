"""Entries of tables for the tasks of a fusion model, each form as its authors publish it.

Enters: the objects of one file, and what lies around it. Leaves: the form, chosen by the keys of
the first object, and entries. What is wrong with one entry is left to be counted; what is wrong
with all is a `UserError`. Must not know: how entries are kept, decoding.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.layout import CAPTION_NAMES, IMAGE_NAMES, SPLIT_NAME, as_captions
from pipeline.data.prepare.files import PLACE, TAR_IMAGES
from pipeline.data.prepare.tasks import LABEL, NLVR, NLVR2, SNLI_VE, VQA, Task
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError

PATH_NAMES = (
    *IMAGE_NAMES, "image_path", "filepath", "file_path", "file_name", "filename", "path",
)  # fmt: skip
TRUTHS = frozenset({"true", "false"})
ENTAILMENT = frozenset({"entailment", "neutral", "contradiction"})
FLICKR_NAMES = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")  # the second is the authors' own
PERMUTATIONS = 6  # NLVR draws each example's three boxes in every order
NLVR_SPLITS = ("train", "dev", "test", "hidden")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of a table: the paths of its images as written there, and what belongs to them.

    `texts` are the task's columns of one text each, None where the table has nothing usable.
    """

    image: str | None
    second: str | None = None
    captions: list[str] = field(default_factory=list)
    texts: dict[str, str | None] = field(default_factory=dict)
    key: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The picture files in and below a folder, by their names without ending."""

    folder: str

    @cached_property
    def paths(self) -> dict[str, list[str]]:
        """Their paths below the folder; listed when they are first asked for."""
        try:
            filesystem, inner = open_filesystem(self.folder)
            selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
            infos = filesystem.get_file_info(selector)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"--images: {self.folder} cannot be listed: {error}") from error
        paths: dict[str, list[str]] = {}
        for info in infos:
            path = PurePosixPath(info.path)
            if _is_picture(path) and info.type == pafs.FileType.File:
                paths.setdefault(path.stem, []).append(path.relative_to(inner).as_posix())
        return paths

    def look_for(self, *names: str) -> str | None:
        """The path of the first of `names` that is there. Raises `BadTable` for two of a name."""
        found = next((self.paths[name] for name in names if name in self.paths), None)
        if found is not None and len(found) > 1:
            raise BadTable(
                f"{found[0]} and {found[1]} have the name of its picture; name the folder of the "
                "right one with --images"
            )
        return found[0] if found else None

    def find(self, *names: str) -> str:
        """As `look_for`; where none is there, a path that will be missed."""
        return self.look_for(*names) or f"{names[0]}.jpg"


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What lies around a table: pictures, and the answers to its questions by their id."""

    pictures: Pictures
    answers: dict[str, list[str]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How entries are written: its name, what they are for, and the reader of one."""

    name: str
    task: Task
    read: Callable[[dict[str, Any]], list[Entry]]


class BadTable(Exception):
    """An entry that shows that its table cannot be used so; the text says why, and the remedy."""


def choose_form(name: str, record: dict[str, Any], around: Around) -> Form | None:
    """The form whose keys `record` has, the first object of `name`; None when it is no task."""
    pictures = around.pictures
    labels = [record[key] for key in (LABEL, "gold_label") if key in record]
    is_entailment = any(label in ENTAILMENT for label in map(str, labels))
    is_unlabelled = "sentence" in record and any(label in (None, "", "-") for label in labels)
    has_path = any(key in record for key in PATH_NAMES)
    if "question" in record:
        if not has_path:
            raise UserError(
                f"{PLACE}: entry 0 of {name} is a question without the path of an image; its keys "
                f"are {list(record)}, known is image"
            )
        return Form(name="ALBEF's questions about images", task=VQA,
                    read=partial(_albef_question, pictures))  # fmt: skip
    if isinstance(record.get("images"), list) and "sentence" in record:
        return Form(name="ALBEF's statements about two images", task=NLVR2, read=_albef_statement)
    if "left_url" in record or (_is_statement(record, 4) and not has_path):
        _check_nlvr2(name, record, pictures)
        return Form(name="NLVR2's statements about two images", task=NLVR2,
                    read=partial(_nlvr2_statement, pictures))  # fmt: skip
    if _is_statement(record, 2) and not has_path:
        return Form(name="NLVR's statements about images", task=NLVR,
                    read=partial(_nlvr_statements, pictures))  # fmt: skip
    if "sentence2" in record and any(key in record for key in FLICKR_NAMES):
        return Form(name="SNLI-VE's hypotheses about images", task=SNLI_VE,
                    read=partial(_snli_hypothesis, pictures))  # fmt: skip
    if has_path and (is_entailment or is_unlabelled):
        return Form(name="ALBEF's hypotheses about images", task=SNLI_VE,
                    read=partial(_albef_hypothesis, pictures))  # fmt: skip
    return None


def read_each(
    name: str, records: Iterable[Any], read: Callable[[dict[str, Any]], list[Entry]]
) -> Iterator[Entry]:
    """The entries of all objects, with their split where they name it."""
    for number, record in enumerate(records):
        try:
            entries = read(check_object(name, number, record))
        except BadTable as error:
            raise UserError(f"{PLACE}: entry {number} of {name}: {error}") from error
        split = record.get(SPLIT_NAME)
        for entry in entries:
            yield replace(entry, split=split) if isinstance(split, str) and split else entry


def check_object(name: str, number: int, record: Any) -> dict[str, Any]:
    """An entry, which must be an object."""
    if not isinstance(record, dict):
        raise UserError(
            f"{PLACE}: entry {number} of {name} is {str(record)[:60]}; every entry must be an "
            "object, such as one with an image and a caption"
        )
    return record


# ---- questions -----------------------------------------------------------------------------------


def _albef_question(pictures: Pictures, record: dict[str, Any]) -> list[Entry]:
    identity = _identity(record.get("question_id"))
    return [
        Entry(
            image=_path(pictures, _first(record, PATH_NAMES)),
            captions=_answers(_first(record, ("answers", "answer"))),
            texts={"question": _text(record.get("question")), "question_id": identity},
            key=identity,
        )
    ]


def read_answers(name: str, value: Any) -> dict[str, list[str]]:
    """The answers of VQA's file of annotations, by the id of their question."""
    items = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise UserError(
            f"{PLACE}: {name} lies beside questions, but holds no annotations: it must be an "
            "object with the key annotations, as VQA's"
        )
    answers: dict[str, list[str]] = {}
    for number, item in enumerate(items):
        identity = str(check_object(name, number, item).get("question_id"))
        answers.setdefault(identity, []).extend(_answers(item.get("answers")))
    return answers


def read_questions(name: str, value: dict[str, Any], around: Around) -> Iterator[Entry]:
    """VQA's questions with their answers; answers to no question are a row without question."""
    answers = dict(around.answers or {})
    subset = re.search(r"(train|val|test)\d{4}", str(value.get("data_subtype") or name))
    subsets = [subset[0]] if subset else ["train2014", "val2014"]

    def read(item: dict[str, Any]) -> list[Entry]:
        identity, image = str(item.get("question_id")), _identity(item.get("image_id"))
        return [
            Entry(
                image=around.pictures.find(*_coco_names(image, subsets)) if image else None,
                captions=answers.pop(identity, []),
                texts={"question": _text(item.get("question")), "question_id": identity},
                key=identity,
            )
        ]

    yield from read_each(name, value["questions"], read)
    for identity in answers:
        texts = {"question": None, "question_id": identity}
        yield Entry(image=None, texts=texts, key=identity)


def _coco_names(image: str, subsets: list[str]) -> list[str]:
    """What the picture of this number is called in the years of COCO."""
    padded = image.zfill(12)
    return [*(f"COCO_{subset}_{padded}" for subset in subsets), padded, image]


def _answers(value: Any) -> list[str]:
    """All answers, repeated as given: texts, one text, or VQA's objects."""
    items = value if isinstance(value, list) else [value]
    return as_captions([item.get("answer") if isinstance(item, dict) else item for item in items])


# ---- statements, true or false -------------------------------------------------------------------


def _albef_statement(record: dict[str, Any]) -> list[Entry]:
    paths = [_checked(path) if isinstance(path, str) else None for path in record["images"]]
    left, right = paths if len(paths) == 2 else (next(iter(paths), None), None)
    return [Entry(image=left, second=right, texts=_statement(record))]


def _check_nlvr2(name: str, record: dict[str, Any], pictures: Pictures) -> None:
    if "identifier" in record and any(stem.endswith("-img0") for stem in pictures.paths):
        return
    raise UserError(
        f"{PLACE}: entry 0 of {name} names its two pictures by links (left_url, right_url) or not "
        f"at all, and no picture of NLVR2 lies in {pictures.folder}; ask its authors for the "
        "pictures (the form at github.com/lil-lab/nlvr, nlvr2), or fetch them by its "
        "util/download_images.py, so that SPLIT-SET-PAIR-img0.png and -img1.png are there, and "
        "name their folder with --images"
    )


def _nlvr2_statement(pictures: Pictures, record: dict[str, Any]) -> list[Entry]:
    identity = str(record.get("identifier"))
    stem = identity.rpartition("-")[0]  # both sentences about a pair have the same pictures
    left, right = (pictures.find(f"{stem}-img{side}") for side in range(2))
    return [Entry(image=left, second=right, texts=_statement(record), key=identity)]


def _nlvr_statements(pictures: Pictures, record: dict[str, Any]) -> list[Entry]:
    """A row for each picture of the example that is there."""
    identity, texts = str(record.get("identifier")), _statement(record)
    stems = [identity, *(f"{split}-{identity}" for split in NLVR_SPLITS)]
    numbers = [f"{identity}-{number}" for number in range(PERMUTATIONS)]
    found = {
        numbers[number]: pictures.look_for(*(f"{stem}-{number}" for stem in stems))
        for number in range(PERMUTATIONS)
    }
    found = {key: path for key, path in found.items() if path is not None}
    return [
        Entry(image=path, texts=texts, key=key)
        for key, path in (found or {numbers[0]: pictures.find(numbers[0])}).items()
    ]


def _is_statement(record: dict[str, Any], parts: int) -> bool:
    """Whether it has a sentence, a label, and an identifier of at least so many parts."""
    identity = record.get("identifier")
    return (
        {"sentence", LABEL} <= set(record)
        and isinstance(identity, str)
        and identity.count("-") >= parts - 1
    )


def _statement(record: dict[str, Any]) -> dict[str, str | None]:
    label = _label(record.get(LABEL), TRUTHS)
    return {"statement": _text(record.get("sentence")), LABEL: label}


# ---- hypotheses ----------------------------------------------------------------------------------


def _albef_hypothesis(pictures: Pictures, record: dict[str, Any]) -> list[Entry]:
    text = _first(record, ("hypothesis", "sentence2", "sentence", *CAPTION_NAMES))
    label = _label(_first(record, (LABEL, "gold_label")), ENTAILMENT)
    texts = {"hypothesis": _text(text), LABEL: label}
    return [Entry(image=_path(pictures, _first(record, PATH_NAMES)), texts=texts)]


def _snli_hypothesis(pictures: Pictures, record: dict[str, Any]) -> list[Entry]:
    name = _identity(_first(record, FLICKR_NAMES))
    label = _label(record.get("gold_label"), ENTAILMENT)
    texts = {"hypothesis": _text(record.get("sentence2")), LABEL: label}
    image = None if name is None else pictures.find(_stem(name))
    return [Entry(image=image, texts=texts, key=_identity(record.get("pairID")))]


# ---- cells ---------------------------------------------------------------------------------------


def _first(record: dict[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of `names` that the object has."""
    return next((record[name] for name in names if name in record), None)


def _text(value: Any) -> str | None:
    return next(iter(as_captions(value)), None)


def _identity(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _label(value: Any, known: frozenset[str]) -> str | None:
    label = str(value).strip().lower()
    return label if label in known else None


def _path(pictures: Pictures, value: Any) -> str | None:
    """A path as it is given; a name without ending is looked for."""
    name = _identity(value)
    if name is None or _is_picture(PurePosixPath(name)):
        return None if name is None else _checked(name)
    return pictures.find(PurePosixPath(_checked(name)).name)


def _checked(path: str) -> str:
    if path.startswith(("http://", "https://")):
        raise BadTable(
            f"its picture is a link, {path[:60]}; download the pictures first, and write the names "
            "of their files in the links' place"
        )
    return path


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if _is_picture(path) else path.name


def _is_picture(path: PurePosixPath) -> bool:
    return path.suffix[1:].lower() in TAR_IMAGES
