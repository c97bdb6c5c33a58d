"""Image-text Parquet -> embeddings of all its rows, by a checkpoint of a run.

Every row of IN is a row of OUT, in the same order, and a row without an image, a caption, or both
says why. A task embeds a piece, neighbouring row groups, and commits its file by a rename, under
OUT/_work; a killed job goes on with what is missing. OUT, a folder whatever its name, shows files
when all are made, as `gammaray data prepare` does.

Enters: IN, OUT, a checkpoint. Leaves: files of Parquet and _embedding.json. Must not know: Ray.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.layout import Catalog, read_catalog
from pipeline.data.prepare.gather import read_shards
from pipeline.data.prepare.job import Listener, Runner, Silent, check_places, make_missing
from pipeline.data.prepare.stats import add_counts
from pipeline.data.prepare.store import PLAN, SHARDS, WORK, Store
from pipeline.data.storage import open_filesystem
from pipeline.embed.encoder import Checkpoint
from pipeline.embed.pieces import Piece, cut_pieces
from pipeline.embed.work import Embed
from pipeline.errors import UserError

FORMAT = 2  # raise it whenever the same rows and weights would give other files
FACTS = "_embedding.json"  # the mark that all is there; readers of a folder pass over such names
SHOWN = 4  # of changed files, by name
PIECE_ROWS = 2048  # a file holds at most so many rows, or one row group
IN, OUT = "IN", "OUT"
WORDS = {  # of the record: what differs, and what to do
    "format": "was made by another version of gammaray",
    "weights": "was made with another checkpoint, {before}, and this is {now}",
    "columns": "was made of other columns, {before}, now {now}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What lies in `out`: the content of _embedding.json; `embedded` rows are of this job."""

    out: str
    facts: dict[str, Any]
    embedded: int


def embed(
    checkpoint: Checkpoint,
    path: str,
    out: str,
    run: Runner,
    *,
    image_column: str = "auto",
    caption_column: str = "auto",
    listener: Listener | None = None,
    piece_rows: int = PIECE_ROWS,
) -> Outcome:
    """Embed the rows at `path` to the folder `out`; go on with what a killed job left there.

    `run` applies a function to items, in any order, and gives its results. Raises `UserError`.
    """
    store, listener = Store(root=out), listener or Silent()
    check_places(path, out)
    _check_folder(out)
    catalog = _read_catalog(path, image_column, caption_column)
    record = _make_record(checkpoint, catalog, piece_rows)
    begun = _look_at(store, record)
    if (finished := store.read_json(FACTS)) is not None:
        _check_files(store, finished)
        store.remove(WORK)
        return Outcome(out=out, facts=finished, embedded=0)
    listener.say(f"{catalog.describe()}.")
    for folder in (WORK, SHARDS):
        store.make(folder)
    if begun is None:
        store.write_json(PLAN, record)
    record = begun or record
    pieces = cut_pieces(catalog, record["piece_rows"])
    made = read_shards(store, pieces)
    there = sum(facts["rows"] for facts in made.values())
    if made:
        listener.say(f"{there:,} of {catalog.num_rows:,} rows are embedded already: going on.")
    if len(made) < len(pieces):
        work = Embed(
            store=store,
            encoder=checkpoint.read(),
            source=catalog.sources[0],
            origin={"run": record["run"], "checkpoint": checkpoint.name},
        )
        made_all = make_missing("embedding", work, pieces, made, run, listener)
    else:
        made_all = [made[piece.number] for piece in pieces]
    facts = _sum_up(record, catalog, pieces, made_all)
    store.publish(facts["files"], FACTS, facts)
    return Outcome(out=out, facts=facts, embedded=catalog.num_rows - there)


def _read_catalog(path: str, image: str, caption: str) -> Catalog:
    try:
        return read_catalog(path, IN, image, caption, split="all", either=True)
    except UserError as error:
        text = str(error)
        for column in ("image", "caption"):
            option = f"--{column}-column"
            text = text.replace(f"data.{column}_column=...", f"{option} NAME")
            text = text.replace(f"data.{column}_column", option)
        choose = "name the column with --image-column or --caption-column"
        raise UserError(text.replace("set the column in the config", choose)) from error


def _make_record(checkpoint: Checkpoint, catalog: Catalog, piece_rows: int) -> dict[str, Any]:
    columns = catalog.sources[0].columns
    return {
        "format": FORMAT,
        "run": checkpoint.url,
        "checkpoint": checkpoint.name,
        "weights": checkpoint.weights,
        "columns": [columns.image, columns.caption],
        "piece_rows": piece_rows,
        # A file's bytes and date, by which another one in its place is known.
        "shards": {shard.path: [shard.size, shard.modified] for shard in catalog.shards},
    }


def _sum_up(
    record: dict[str, Any], catalog: Catalog, pieces: list[Piece], made: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        **record,
        "in": catalog.root,
        "rows": sum(facts["rows"] for facts in made),
        "reasons": dict(add_counts(facts["reasons"] for facts in made)),
        "captions_cut": sum(facts["cut"] for facts in made),
        "files": [piece.name for piece in pieces],
    }


# ---- what is already there -----------------------------------------------------------------------


def _check_folder(out: str) -> None:
    try:
        filesystem, inner = open_filesystem(out)
        is_file = filesystem.get_file_info(inner).type == pafs.FileType.File
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{OUT}: {out} cannot be reached: {error}") from error
    if is_file:
        raise UserError(
            f"{OUT}: {out} is a file; embeddings are a folder of Parquet files, whatever its name: "
            "choose another, or remove the file"
        )


def _look_at(store: Store, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier job in the same folder, which must agree with this one."""
    begun = store.read_json(FACTS) or store.read_json(PLAN)
    if begun is None:
        names = [name for name in store.names("") if name != WORK]
        if names:
            store.refuse(names)
        return None
    if "weights" not in begun:
        raise UserError(
            f"{OUT}: {store.root} holds a `gammaray data prepare` that is not finished; choose "
            "another folder, or remove it"
        )
    for name, words in WORDS.items():
        if begun.get(name) != record[name]:
            said = words.format(before=_say(name, begun), now=_say(name, record))
            raise UserError(
                f"{OUT}: {store.root} {said}; {_remedy(name, begun, record)}choose another folder, "
                "or remove it"
            )
    changed = _changed(begun["shards"], record["shards"])
    if changed:
        raise UserError(
            f"{OUT}: {store.root} was made of other files than IN holds now (paths, sizes and "
            f"dates are compared): {changed}; restore them, choose another folder, or remove it"
        )
    return begun


def _changed(before: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> str:
    """Which files are not as they were, some by name; nothing where all are."""
    said = [
        f"{path} {'is new' if path not in before else 'is gone' if path not in now else 'changed'}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]
    return ", ".join(said[:SHOWN]) + (f" and {len(said) - SHOWN} more" if said[SHOWN:] else "")


def _say(name: str, record: dict[str, Any]) -> str:
    if name == "weights":
        return f"{record.get('checkpoint')} of {record.get('run')}"
    return " and ".join(each or "none" for each in record.get("columns", ()))


def _remedy(name: str, begun: dict[str, Any], record: dict[str, Any]) -> str:
    if name == "weights" and begun.get("run") == record["run"]:
        return f"go on with --checkpoint {begun.get('checkpoint')}, "
    return ""


def _check_files(store: Store, facts: dict[str, Any]) -> None:
    lost: Iterable[str] = set(facts["files"]) - set(store.names(""))
    if lost:
        raise UserError(
            f"{OUT}: {store.root} is finished, but {min(lost)} is not there; remove the folder and "
            "embed again"
        )
