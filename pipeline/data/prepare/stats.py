"""What is counted of a part, and what stats.json says of the whole.

Enters: the tallies of all parts, the facts of all shards. Leaves: one record.
Must not know: how parts and shards are made.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pipeline.data.prepare.sources import Origin
from pipeline.data.prepare.store import QUARANTINE


@dataclass(kw_only=True, slots=True)
class Tally:
    """What is counted of a part; its JSON is the part's commit mark."""

    number: int
    rows_in: int = 0
    rows_out: int = 0
    kept_images: int = 0
    further_images: int = 0
    has_lists: bool = False
    has_split: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    batches: list[tuple[int, int, int]] = field(default_factory=list)  # bucket, rows, bytes
    labels: Counter[str] = field(default_factory=Counter)
    spreads: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))


def make_stats(
    source: Origin,
    record: dict[str, Any],
    summaries: list[dict[str, Any]],
    written: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of stats.json."""
    dropped = add_counts(summary["dropped"] for summary in summaries)
    content = hashlib.sha256("\n".join(fact["digest"] for fact in written).encode())
    rows_out = sum(fact["rows"] for fact in written)
    kept = sum(summary["kept_images"] for summary in summaries)
    task = source.reader.task
    labels = add_counts(summary.get("labels", {}) for summary in summaries)
    return {
        "content_hash": content.hexdigest(),
        "rows_in": sum(summary["rows_in"] for summary in summaries),
        "rows_out": rows_out,
        "dropped": dict(sorted(dropped.items())),
        "quarantine": QUARANTINE if dropped else "empty",
        "images_kept": kept,
        "images_encoded": rows_out * task.num_pictures - kept,
        "further_images_left_out": sum(summary["further_images"] for summary in summaries),
        "image_bytes": sum(fact["image_bytes"] for fact in written),
        **{
            name: _spread(add_counts(summary["spreads"].get(name, {}) for summary in summaries))
            for name in task.spreads
        },
        **({"labels": dict(sorted(labels.items()))} if labels else {}),
        "shards": [
            {name: fact[name] for name in ("name", "rows", "image_bytes", "digest")}
            for fact in written
        ],
        "source": {
            "path": source.path,
            "form": source.reader.form,
            "task": task.name,
            "files": source.num_files,
            "bytes": source.num_bytes,
        },
        "options": record,
        "version": version("gammaray"),
    }


def _spread(counts: Counter[Any]) -> dict[str, float]:
    """Smallest, largest, mean and some quantiles of counted values."""
    values = sorted((int(value), count) for value, count in counts.items())
    total = sum(count for _, count in values)
    ends = list(itertools.accumulate(count for _, count in values))

    def quantile(share: float) -> int:
        return next(
            value for (value, _), end in zip(values, ends, strict=True) if end >= share * total
        )

    return {
        "min": values[0][0],
        "p05": quantile(0.05),
        "median": quantile(0.5),
        "mean": round(sum(value * count for value, count in values) / total, 2),
        "p95": quantile(0.95),
        "max": values[-1][0],
    }


def add_counts(counters: Iterable[dict[Any, int]]) -> Counter[Any]:
    """The sum of counters, whose keys JSON may have made texts."""
    total: Counter[Any] = Counter()
    for counter in counters:
        for value, count in counter.items():
            total[str(value)] += count
    return total
