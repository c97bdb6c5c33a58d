"""Parquet to batches, side by side in one run: our stream, a tuned torch DataLoader, WebDataset.

All three give batches of 256 pairs, [256, 224, 224, 3] uint8 and [256, 77] token ids, of the same
320x320 JPEGs, with the same decode, crop and tokenizer, from the page cache, shuffled, without end,
to a consumer that only takes them. DataLoader and WebDataset have one worker process per core that
builds whole batches; the DataLoader reads row groups and shuffles as much as we do. Each runs in a
process of its own, in turn, round after round. A rate is taken between two whole batches after the
warm-up; CPU is that of all processes started, by rows.

Then memory: an epoch of ours over some rows and over ten times as many, and a consumer slower than
the stream. Of Ray's task processes what is theirs alone, summed; of the object store what is used.

    python -m jobs.bench.ingest [--quick] [--json FILE]

Goals, or exit status 1: at least as many rows a second as each of the others (the median of the
rounds' ratios); peaks at ten times the rows at most 1.1 times; nothing spilled to disk.
"""

import io
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from jobs.bench.decode import draw_picture
from jobs.bench.report import arguments, conclude, show_table
from pipeline.data.batches import make_order, train_batches
from pipeline.data.decode import Recipe, View
from pipeline.data.image import RandomCrop, decode_train
from pipeline.data.layout import read_catalog
from pipeline.data.order import Cursor
from pipeline.data.text import Tokenizer, train_tokenizer

SIDE, LENGTH, BATCH = 224, 77, 256
CORES = 2
WINDOW_ROWS = 4096
GROUP_ROWS, SHARD_ROWS = 512, 2048
FEW_ROWS = 16_384  # enough to fill what the stream may hold
DRAWN = 256  # pictures; each is stored many times, since the bytes read are the same work
CROP, WHITE = (0.9, 1.0), (255, 255, 255)
WORDS = (
    "a",
    "the",
    "red",
    "large",
    "circle",
    "square",
    "dog",
    "on",
    "beside",
    "photo",
    "of",
    "two",
)

Arrays = tuple[torch.Tensor, torch.Tensor]
Stream = Callable[[Path, Tokenizer], Iterator[Arrays]]


def write_data(folder: Path, rows: int, kinds: tuple[str, ...] = ("parquet", "tar")) -> Tokenizer:
    """The same pairs as Parquet (`parquet/`) and as tar shards (`tar/`); gives a tokenizer."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(DRAWN):
        encoded = cv2.imencode(".jpg", draw_picture(320, 320, rng), [cv2.IMWRITE_JPEG_QUALITY, 90])
        pictures.append(encoded[1].tobytes())
    captions = [" ".join(rng.choice(WORDS, 12)) for _ in range(rows)]
    images = [pictures[row % DRAWN] for row in range(rows)]
    for name in kinds:
        (folder / name).mkdir()
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        mine = slice(start, min(start + SHARD_ROWS, rows))
        pq.write_table(
            pa.table({"image": images[mine], "caption": captions[mine]}),
            folder / "parquet" / f"{shard:05d}.parquet",
            row_group_size=GROUP_ROWS,
        )
        if "tar" not in kinds:
            continue
        with tarfile.open(folder / "tar" / f"{shard:05d}.tar", "w") as tar:
            for row in range(*mine.indices(rows)):
                for kind, data in (("jpg", images[row]), ("txt", captions[row].encode())):
                    member = tarfile.TarInfo(f"{row:09d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return train_tokenizer(captions[:1000], 400)


def _pixels(image: bytes, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    return decode_train(image, WHITE, SIDE, [RandomCrop(CROP, 0.0, rng)])[0]


def stream_ours(folder: Path, tokenizer: Tokenizer) -> Iterator[Arrays]:
    """Give the batches of one training worker of the demo's kind, alone on its machine."""
    catalog = read_catalog(str(folder / "parquet"), place="data.train")
    order = make_order(catalog, WINDOW_ROWS, seed=0)
    recipe = Recipe(
        tokenizer=tokenizer,
        context_length=LENGTH,
        image_size=SIDE,
        view=View(crop_scale=CROP, flip=0.0),
        background=WHITE,
        seed=0,
        train=True,
    )
    batches = train_batches(
        catalog, order, recipe, Cursor(digest=catalog.digest), world_size=1, rank=0,
        batch_size=BATCH, ingest_cpus=CORES,
    )  # fmt: skip
    for batch in batches:
        yield batch.images, batch.tokens


class _RowGroups(IterableDataset[Arrays]):
    """Row groups in random order, packed into windows whose rows are shuffled; whole batches."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._files = sorted((folder / "parquet").iterdir())
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[Arrays]:
        cv2.setNumThreads(1)
        worker = get_worker_info()
        rng = np.random.default_rng(0 if worker is None else worker.id)
        groups = [
            (file, index)
            for file in self._files
            for index in range(pq.ParquetFile(file).num_row_groups)
        ]
        if worker is not None:
            groups = groups[worker.id :: worker.num_workers]
        a_window = WINDOW_ROWS // GROUP_ROWS
        images = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
        captions: list[str] = []
        while True:
            mixed = [groups[index] for index in rng.permutation(len(groups))]
            for start in range(0, len(mixed), a_window):
                window = pa.concat_tables(
                    pq.ParquetFile(file).read_row_group(index, columns=["image", "caption"])
                    for file, index in mixed[start : start + a_window]
                )
                for row in rng.permutation(window.num_rows):
                    images[len(captions)] = _pixels(window["image"][int(row)].as_py(), rng)
                    captions.append(window["caption"][int(row)].as_py())
                    if len(captions) == BATCH:
                        tokens, _ = self._tokenizer.encode(captions, LENGTH)
                        yield torch.from_numpy(images), torch.from_numpy(tokens)
                        images, captions = np.empty_like(images), []


def stream_dataloader(folder: Path, tokenizer: Tokenizer) -> Iterator[Arrays]:
    """Give the batches of a DataLoader over the Parquet; its workers collate in shared memory."""
    dataset = _RowGroups(folder, tokenizer)
    yield from DataLoader(dataset, batch_size=None, num_workers=CORES, prefetch_factor=4)


class _TarRow:
    """One sample of WebDataset -> pixels and caption."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng()

    def __call__(self, sample: tuple[bytes, bytes]) -> tuple[np.ndarray[Any, Any], str]:
        return _pixels(sample[0], self._rng), sample[1].decode()


class _Collate:
    """Samples of WebDataset -> a batch."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, samples: list[tuple[np.ndarray[Any, Any], str]]) -> Arrays:
        tokens, _ = self._tokenizer.encode([caption for _, caption in samples], LENGTH)
        images = np.stack([image for image, _ in samples])
        return torch.from_numpy(images), torch.from_numpy(tokens)


def stream_webdataset(folder: Path, tokenizer: Tokenizer) -> Iterator[Arrays]:
    """Give the batches of WebDataset over the tar shards, set up as its guide says."""
    from webdataset.compat import WebDataset, WebLoader

    shards = [str(file) for file in sorted((folder / "tar").iterdir())]
    dataset = (
        WebDataset(shards, shardshuffle=False, resampled=True)
        .shuffle(1000)
        .to_tuple("jpg", "txt")
        .map(_TarRow())
        .batched(BATCH, collation_fn=_Collate(tokenizer), partial=False)
    )
    yield from WebLoader(dataset, batch_size=None, num_workers=CORES, prefetch_factor=4)


STREAMS: dict[str, Stream] = {
    "ours": stream_ours,
    "DataLoader": stream_dataloader,
    "WebDataset": stream_webdataset,
}


def _cpu_seconds() -> float:
    """Of this process and all it started."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def measure(
    name: str, folder: Path, tokenizer: Tokenizer, warm_up: float, seconds: float
) -> dict[str, float]:
    """In a fresh process: seconds to the first batch, rows a second and CPU time by row after."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    if name == "ours":
        import ray

        ray.init(address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    ready = time.perf_counter()
    batches = STREAMS[name](folder, tokenizer)
    next(batches)
    first = time.perf_counter()
    while time.perf_counter() < first + warm_up:
        next(batches)
    cpu, begun, rows = _cpu_seconds(), time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds:
        images, _ = next(batches)
        rows += len(images)
    cpu = _cpu_seconds() - cpu
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return {
        "start": ready - started,
        "first_batch": first - ready,
        "rows_per_s": rows / elapsed,
        "cpu_ms_per_row": 1000 * cpu / rows,
    }


def measure_memory(
    folder: Path, tokenizer: Tokenizer, rows: int, seconds: float, pause: float
) -> dict[str, float]:
    """In a fresh process: peaks while `rows` rows, or `seconds`, are streamed; in bytes.

    The consumer rests for `pause` seconds after a batch.
    """
    import ray
    from ray._private.internal_api import node_stats

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    node = ray.nodes()[0]
    peaks = {"tasks": 0.0, "store": 0.0, "spilled": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
            now = {
                "tasks": _private_bytes("ray::Read"),
                "store": stats.store_stats.object_store_bytes_used,
                "spilled": stats.store_stats.spilled_bytes_total,
            }
            for name, value in now.items():
                peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, seen = time.perf_counter(), 0
    for images, _ in stream_ours(folder, tokenizer):
        seen += len(images)
        if seen >= rows or time.perf_counter() > begun + seconds:
            break
        time.sleep(pause)
    done.set()
    watcher.join()
    return peaks | {"rows": seen, "seconds": time.perf_counter() - begun}


def _private_bytes(name: str) -> float:
    """Memory that is theirs alone, of all child processes whose name begins so."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(name):
                total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total


def _measure_decode(folder: Path, seconds: float) -> float:
    """CPU milliseconds by row of decode and crop alone."""
    cv2.setNumThreads(1)
    file = next((folder / "parquet").iterdir())
    images = pq.ParquetFile(file).read_row_group(0)["image"].to_pylist()
    rng = np.random.default_rng(0)
    started, rows = time.process_time(), 0
    while time.process_time() < started + seconds:
        for image in images[:64]:
            _pixels(image, rng)
        rows += 64
    return 1000 * (time.process_time() - started) / rows


def main() -> None:
    """Measure, print, draw."""
    options = arguments(__doc__).parse_args()
    rows, rounds, warm_up, seconds = (8192, 3, 3, 6) if options.quick else (32_768, 7, 5, 20)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STREAMS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_data(folder, rows)
        for _ in range(rounds):
            for name in STREAMS:
                found[name].append(_alone(measure, name, folder, tokenizer, warm_up, seconds))
        decode = _measure_decode(folder, 2)
        memory = _measure_memories(folder, options.quick)
    ratios = {
        name: [
            ours["rows_per_s"] / other["rows_per_s"]
            for ours, other in zip(found["ours"], others, strict=True)
        ]
        for name, others in found.items()
    }
    show_table(
        f"Parquet or tar to batches of {BATCH}, {CORES} cores, medians of {rounds} rounds (range)",
        ["stream", "rows/s", "range", "ours over it", "range", "CPU ms/row", "of it decode",
         "first batch s", "start s"],
        [
            [
                name,
                f"{_median(runs, 'rows_per_s'):,.0f}",
                f"{min(run['rows_per_s'] for run in runs):,.0f}-"
                f"{max(run['rows_per_s'] for run in runs):,.0f}",
                f"{statistics.median(ratios[name]):.2f}",
                f"{min(ratios[name]):.2f}-{max(ratios[name]):.2f}",
                f"{_median(runs, 'cpu_ms_per_row'):.3f}",
                f"{decode / _median(runs, 'cpu_ms_per_row'):.0%}",
                f"{_median(runs, 'first_batch'):.2f}",
                f"{_median(runs, 'start'):.2f}",
            ]
            for name, runs in found.items()
        ],
    )  # fmt: skip
    missed = [
        f"{statistics.median(values):.2f} times the rows a second of {name}; 1 is asked"
        for name, values in ratios.items()
        if statistics.median(values) < 1
    ]
    for key in ("tasks", "store"):
        ratio = memory["ten times"][key] / memory["once"][key]
        if ratio > 1.1:
            missed.append(
                f"peak of {key} at ten times the rows is {ratio:.2f} times; 1.1 is allowed"
            )
    missed += [
        f"{peaks['spilled'] / 1e6:,.0f} MB spilled to disk ({name})"
        for name, peaks in memory.items()
        if peaks["spilled"]
    ]
    results = {"streams": found, "decode_ms": decode, "ratios": ratios, "memory": memory}
    conclude(results, missed, options.json)


def _alone(work: Callable[..., dict[str, float]], *inputs: Any) -> dict[str, float]:
    """In a process of its own: what one leaves behind cannot slow the next down."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *inputs).result()


def _measure_memories(folder: Path, is_quick: bool) -> dict[str, dict[str, float]]:
    """Peaks over an epoch of some rows, of ten times as many, and with a slow consumer."""
    found: dict[str, dict[str, float]] = {}
    tokenizers: dict[int, Tokenizer] = {}
    for name, rows, limit, pause in (
        ("once", FEW_ROWS, 600.0, 0.0),
        ("ten times", 10 * FEW_ROWS, 600.0, 0.0),
        ("slow consumer", 10 * FEW_ROWS, 30.0 if is_quick else 600.0, 1.0),
    ):
        data = folder / f"{rows}"
        data.mkdir(exist_ok=True)
        tokenizer = tokenizers.get(rows) or write_data(data, rows, kinds=("parquet",))
        tokenizers[rows] = tokenizer
        found[name] = _alone(measure_memory, data, tokenizer, rows, limit, pause)
    show_table(
        "Memory of our stream",
        ["run", "rows", "seconds", "task processes MB", "object store MB", "spilled MB"],
        [
            [name, f"{peaks['rows']:,.0f}", f"{peaks['seconds']:.0f}"]
            + [f"{peaks[key] / 1e6:,.0f}" for key in ("tasks", "store", "spilled")]
            for name, peaks in found.items()
        ],
    )
    return found


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    main()
