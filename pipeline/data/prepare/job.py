"""Pairs of any form -> well-shaped Parquet shards, by an external shuffle in Ray Data tasks.

Every source row has an order, a 64-bit hash of (seed, file, row), and the shards hold the rows in
that order: a random permutation of all rows, whatever the layout of the source. Tasks of the first
pass read a part of the source each, make its images small, and write its rows by bucket (a range
of the order). Tasks of the second pass collect a run of buckets and write a shard.

What a task has written it commits by a rename, under OUT/_work; a killed job goes on with what is
missing. OUT shows shards when all are made.

Enters: IN, OUT, options. Leaves: shards and stats.json. Must not know: training, the model, Ray.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.data.prepare.files import ANSWER_LIST, find_files, read_answer_list
from pipeline.data.prepare.gather import Gather, plan_shards, read_shards
from pipeline.data.prepare.scatter import Scatter, pack, read_parts, write_quarantine
from pipeline.data.prepare.sources import open_origin
from pipeline.data.prepare.stats import add_counts, make_stats
from pipeline.data.prepare.store import LISTING, PARTS, PLAN, QUARANTINE, SHARDS, STATS, WORK, Store
from pipeline.data.prepare.tasks import VQA
from pipeline.errors import UserError

FORMAT = 1  # raise it whenever the same source and options would give other shards

Runner = Callable[[Callable[[Any], dict[str, Any]], list[Any]], Iterable[dict[str, Any]]]


class Listener(Protocol):
    """Told what happens."""

    def say(self, text: str) -> None:
        """A sentence."""
        ...

    def show(self, what: str, done: int, total: int) -> None:
        """How much of something is done."""
        ...


class Silent:
    """Hears nothing."""

    def say(self, text: str) -> None:
        """A sentence."""

    def show(self, what: str, done: int, total: int) -> None:
        """How much of something is done."""


class Item(Protocol):
    """A part of the work; its result has the same `number`."""

    @property
    def number(self) -> int:
        """Its number among all."""
        ...

    @property
    def weight(self) -> int:
        """How much of the work it is."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user chooses. `images`: the folder of a table's image paths; empty: the table's."""

    short_side: int = 288
    seed: int = 0
    image_column: str = "auto"
    caption_column: str = "auto"
    images: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Bytes of encoded images: of the source in a part, in a bucket on the average, in a shard (of
    whole buckets), at most in a row group, and in a task's memory before it is written.
    """

    part: int = 64 * 2**20
    bucket: int = 64 * 2**20
    shard: int = 256 * 2**20
    row_group: int = 32 * 2**20
    buffer: int = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What lies in `out`: the content of stats.json; `created` is False when it was there."""

    out: str
    stats: dict[str, Any]
    created: bool


def prepare(
    path: str,
    out: str,
    options: Options,
    run: Runner,
    listener: Listener | None = None,
    sizes: Sizes | None = None,
) -> Outcome:
    """Write the pairs at `path` as shards to `out`; go on with what a killed job left there.

    `run` applies a function to items, in any order, and gives its results. Raises `UserError`.
    """
    sizes, listener = sizes or Sizes(), listener or Silent()
    store = Store(root=out)
    check_places(path, out)
    record = {**asdict(options), "sizes": asdict(sizes), "format": FORMAT}
    begun = _look_at(store, record)
    found = find_files(path)
    record["source"] = found.digest
    if begun is not None and begun.get("source") != found.digest:
        raise UserError(
            f"OUT: {out} was made from other files than {path} holds now (names, sizes and dates "
            "are compared); choose another folder, or remove it"
        )
    if (finished := store.read_json(STATS)) is not None:
        _check_shards(store, finished)
        store.remove(WORK)
        return Outcome(out=out, stats=finished, created=False)
    source = open_origin(
        found,
        image=options.image_column,
        caption=options.caption_column,
        images=options.images,
        scratch=store.url(LISTING),
    )
    listener.say(f"{source.describe()}.")
    for folder in (PARTS, SHARDS):
        store.make(folder)
    store.write_json(PLAN, record)

    parts = pack(source, sizes.part)
    scatter = Scatter(
        store=store,
        reader=source.reader,
        short_side=options.short_side,
        seed=options.seed,
        buckets=max(1, -(-source.num_bytes // sizes.bucket)),
        buffer=sizes.buffer,
    )
    summaries = make_missing("reading", scatter, parts, read_parts(store, parts), run, listener)
    write_quarantine(store, summaries)
    _check_any(store, summaries)
    shards = plan_shards(summaries, sizes.shard)
    gather = Gather(
        store=store,
        row_group=sizes.row_group,
        has_lists=any(summary["has_lists"] for summary in summaries),
        has_split=any(summary["has_split"] for summary in summaries),
        task=source.reader.task,
    )
    written = make_missing("writing", gather, shards, read_shards(store, shards), run, listener)
    stats = make_stats(source, record, summaries, written)
    if source.reader.task == VQA and (answer_list := read_answer_list(found)) is not None:
        store.write(ANSWER_LIST, lambda sink: sink.write(answer_list))
    store.publish([shard.name for shard in shards], STATS, stats)
    return Outcome(out=out, stats=stats, created=True)


def make_missing(
    what: str,
    function: Callable[[Any], dict[str, Any]],
    items: Sequence[Item],
    made: dict[int, dict[str, Any]],
    run: Runner,
    listener: Listener,
) -> list[dict[str, Any]]:
    """Make the items that are missing in `made`; give what is known of all, in order."""
    weight = {item.number: item.weight for item in items}
    total = sum(weight.values())
    done = sum(weight[number] for number in made)
    listener.show(what, done, total)
    for result in run(function, [item for item in items if item.number not in made]):
        made[result["number"]] = result
        done += weight[result["number"]]
        listener.show(what, done, total)
    return [made[item.number] for item in items]


def _check_any(store: Store, summaries: list[dict[str, Any]]) -> None:
    if any(summary["rows_out"] for summary in summaries):
        return
    reasons = add_counts(summary["dropped"] for summary in summaries)
    rows = sum(summary["rows_in"] for summary in summaries)
    why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))
    raise UserError(
        f"IN: none of {rows:,} rows is usable"
        + (f" ({why}); {store.url(QUARANTINE)} lists them" if rows else "")
        + "; look at the images and texts"
        + (", and at --images" if "missing_file" in reasons else "")
        + f", and remove {store.root} before another try"
    )


# ---- what is already there -----------------------------------------------------------------------


def check_places(path: str, out: str) -> None:
    """Raise `UserError` where OUT lies in IN."""
    if "://" in path or "://" in out:
        return
    inside = Path(out).absolute()
    if inside.is_relative_to(Path(path).absolute()):
        raise UserError(
            f"OUT: {out} lies in IN ({path}), where the next command would take it for source; "
            "choose a folder elsewhere"
        )


def _look_at(store: Store, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier job in the same folder, which must agree with this one."""
    stats = store.read_json(STATS)
    begun = stats.get("options") if isinstance(stats, dict) else store.read_json(PLAN)
    if begun is None:
        names = store.names("")
        if stats is not None or any(name != WORK for name in names):
            store.refuse(names)
        return None
    differing = [name for name, value in record.items() if begun.get(name) != value]
    if differing:
        said = ", ".join(f"{name} {begun.get(name)}, now {record[name]}" for name in differing)
        raise UserError(
            f"OUT: {store.root} was made with other options ({said}); use those, choose another "
            "folder, or remove it"
        )
    return begun


def _check_shards(store: Store, stats: dict[str, Any]) -> None:
    there = set(store.names(""))
    lost = [shard["name"] for shard in stats["shards"] if shard["name"] not in there]
    if lost:
        raise UserError(
            f"OUT: {store.root} is finished, but {lost[0]} is not there; remove the folder and "
            "prepare it again"
        )
