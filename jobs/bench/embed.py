"""Bulk embedding beside the bare model: rows a second, on one core.

The job is `gammaray embed` from Parquet to Parquet: read, decode, tokenise, embed, write, on a Ray
of one CPU, all its processes pinned to one core. The bare model is a loop over the same batches,
decoded and tokenised before and kept in memory, that does nothing but call the towers; the memory
of freed arrays is kept in both. They take turns, round after round. The job's rate is taken from
its first finished piece to its last, so that the start of its process is not in it; the whole time
is listed beside. Where others compete for the core, time depends on who gets it; so CPU is given
too: of the process that embeds, by rows, and of all others of Ray and the driver, by time.

The model is a two-tower one with random weights, of the size of ViT-S/32 and a text tower of 12
layers by default: small, since decoding weighs less the larger the model is.

    python -m jobs.bench.embed --photos FOLDER [--rows N] [--quick] [--json FILE]

Goal, or exit status 1: the median of the rounds' ratios is at least 0.9.
"""

import contextlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from jobs.bench.report import arguments, conclude, show_table
from pipeline.config.load import parse_config
from pipeline.data.layout import read_captions, read_catalog
from pipeline.data.memory import keep_freed_memory
from pipeline.data.prepare.job import Runner
from pipeline.data.prepare.on_ray import Keepers, OnRay
from pipeline.data.text import train_tokenizer
from pipeline.embed.encoder import Encoder
from pipeline.embed.job import embed
from pipeline.embed.pieces import cut_pieces, read_piece
from pipeline.embed.work import Batch, embed_batches, read_batches
from pipeline.train.module import build_pretraining

GOAL = 0.9
ROUNDS = 5
GROUP_ROWS = 64  # a row group, and a piece
TOWERS = {
    "embed_dim": 384,
    "image": {"size": 224, "patch": 32, "width": 384, "layers": 12, "heads": 6},
    "text": {"context_length": 77, "width": 384, "layers": 12, "heads": 6},
}


@dataclass(frozen=True, slots=True)
class InMemory:
    """In place of a run's checkpoint."""

    encoder: Encoder
    name: str = "random weights"
    weights: str = ""
    url: str = "none"

    def read(self) -> Encoder:
        """Give the model."""
        return self.encoder


# Rows of a piece, and when it was finished: the time, CPU of its process, CPU of all processes.
Point = tuple[int, float, float, float]


@dataclass(frozen=True, slots=True)
class Timed:
    """Runs a function over items and notes when each was finished, where it was."""

    run: Runner
    points: list[Point]

    def __call__(
        self, function: Callable[[Any], dict[str, Any]], items: list[Any]
    ) -> Iterator[dict[str, Any]]:
        """As `Runner`."""
        root = os.getpid()

        def work(item: Any) -> dict[str, Any]:
            facts = function(item)
            at = (time.time(), time.process_time(), cpu_seconds(root))
            return {**facts, "at": at}

        for result in self.run(work, items):
            self.points.append((result["rows"], *result["at"]))
            yield result


def pace(points: list[Point]) -> tuple[float, float, float]:
    """From the first finished piece to the last: rows a second, rows by CPU second of the process
    that embeds, and the share of a core that all others took.
    """
    first, *rest = sorted(points, key=lambda point: point[1])
    seconds, own, total = (rest[-1][index] - first[index] for index in (1, 2, 3))
    rows = sum(point[0] for point in rest)
    return rows / seconds, rows / own, (total - own) / seconds


def cpu_seconds(root: int) -> float:
    """CPU of a process and all that it has started."""
    mine = psutil.Process(root)
    total = 0.0
    for process in [mine, *mine.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def copy_rows(photos: str, out: Path, rows: int) -> None:
    """Write the first rows of a folder of Parquet as one file, in row groups of GROUP_ROWS."""
    catalog = read_catalog(photos, "--photos", split="all")
    columns = catalog.sources[0].columns
    names = [columns.image, columns.caption]
    tables = [pq.read_table(shard.path, columns=names) for shard in catalog.shards]
    table = pa.concat_tables(tables).slice(0, rows).rename_columns(["image", "caption"])
    out.mkdir()
    pq.write_table(table, out / "0.parquet", row_group_size=GROUP_ROWS, compression="none",
                   use_dictionary=False)  # fmt: skip


def build_encoder(path: Path) -> Encoder:
    """Towers with random weights, and a tokenizer of the captions at `path`."""
    captions = read_captions(read_catalog(str(path), "--photos"), 5000)
    values: dict[str, Any] = {
        "name": "bench",
        "data": {"train": str(path), "tokenizer": "train", "vocab_size": 8000},
        "model": TOWERS,
        "engine": {"precision": "fp32"},
        "train": {"samples": 512},
    }
    config = parse_config(values, "bench")
    tokenizer = train_tokenizer(captions, config.data.vocab_size)
    return Encoder(config, tokenizer, build_pretraining(config, tokenizer))


def read_all(encoder: Encoder, path: Path) -> list[Batch]:
    """The batches that the job makes, decoded."""
    catalog = read_catalog(str(path), "IN", split="all", either=True)
    source = catalog.sources[0]
    return [
        batch
        for piece in cut_pieces(catalog, GROUP_ROWS)
        for batch in read_batches(encoder, source, read_piece(source, piece), encoder.batch_size)
    ]


def time_bare(encoder: Encoder, batches: list[Batch]) -> tuple[float, float]:
    """Rows a second of the towers alone, and by CPU second."""
    began, cpu = time.perf_counter(), time.process_time()
    rows = sum(len(batch.rows) for batch, _, _ in embed_batches(encoder, batches))
    return rows / (time.perf_counter() - began), rows / (time.process_time() - cpu)


def time_job(encoder: Encoder, path: Path, out: Path) -> tuple[float, float, float, float]:
    """As `pace` of the job, and the seconds of all of it."""
    points: list[Point] = []
    began = time.perf_counter()
    checkpoint: Any = InMemory(encoder)
    with OnRay(Keepers()) as run:
        embed(checkpoint, str(path), str(out), Timed(run, points), piece_rows=GROUP_ROWS)
    return *pace(points), time.perf_counter() - began


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This process, and those it starts, on the last of its cores; Ray with one CPU."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    keep_freed_memory()
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def main() -> None:
    """Measure both, print the table, say whether the goal is met."""
    parser = arguments(__doc__)
    parser.add_argument("--photos", required=True, help="folder of Parquet with pictures")
    parser.add_argument("--rows", type=int, default=1024, help="rows to embed")
    given = parser.parse_args()
    rows = 4 * GROUP_ROWS if given.quick else given.rows
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary, one_core():
        folder = Path(temporary)
        copy_rows(given.photos, folder / "in", rows)
        encoder = build_encoder(folder / "in")
        began = time.perf_counter()
        batches = read_all(encoder, folder / "in")
        reading = time.perf_counter() - began
        time_bare(encoder, batches[:1])
        for number in range(3 if given.quick else ROUNDS):
            bare, bare_cpu = time_bare(encoder, batches)
            job, job_cpu, others, seconds = time_job(
                encoder, folder / "in", folder / f"out-{number}"
            )
            rounds.append(
                {
                    "bare": bare, "job": job, "ratio": job / bare, "bare_cpu": bare_cpu,
                    "job_cpu": job_cpu, "cpu_ratio": job_cpu / bare_cpu, "others": others,
                    "seconds": seconds,
                }
            )  # fmt: skip
    names = ("bare", "job", "ratio", "bare_cpu", "job_cpu", "cpu_ratio", "others", "seconds")
    show_table(
        f"{rows:,} rows, batches of {encoder.batch_size}",
        ["round", "bare rows/s", "job rows/s", "ratio", "bare rows/CPU s", "job rows/CPU s",
         "ratio", "others, of a core", "with start, s"],
        [
            [str(number), *(f"{each[name]:.2f}" for name in names)]
            for number, each in enumerate(rounds)
        ],
    )  # fmt: skip
    ratio = statistics.median(each["ratio"] for each in rounds)
    by_cpu = statistics.median(each["cpu_ratio"] for each in rounds)
    print(f"reading, decoding and tokenising alone: {reading / rows * 1e3:.2f} ms a row")
    print(f"median ratio: {ratio:.3f}; of CPU by rows {by_cpu:.3f}")
    missed = [f"{GOAL} of the bare model's speed: {ratio:.3f}"] * (ratio < GOAL)
    conclude({"rounds": rounds, "ratio": ratio, "reading_s": reading}, missed, given.json)


if __name__ == "__main__":
    main()
