"""pyarrow's S3 filesystem against s3fs, side by side in one run, as the reader uses them.

A real S3 server (moto's, of the packages `dev`) runs on this machine, behind a proxy that adds the
same latency to each request and counts requests, connections and bytes. What is called is the
project's own: `open_filesystem` (of s3:// and, through fsspec, of s3fs), `read_catalog`,
`read_rows`, `Store`. Processes that read are long-lived, so each operation has been done once
before; s3fs forgets its listings in between, since other processes made them. s3fs comes as it is
(50 MB read ahead) and without its cache.

    python -m jobs.bench.storage [--quick] [--json FILE] [--figure FILE]

Counts are the evidence, times follow: the median of interleaved rounds with its range, and the
median of the rounds' ratios to pyarrow's. Bytes cost nothing here, as they do on a network, and a
connection costs no TLS. A row group's table has an unused column between the caption's and the
image's.

Goals, or exit status 1, for reads of a row group through s3://: at most 1.05 times the bytes of
either s3fs, and at most 1.1 times its time at 20 ms a request.
"""

import importlib.metadata
import io
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import s3fs

from jobs.bench.report import arguments, conclude, show_table
from jobs.bench.s3 import ENVIRONMENT, CountingProxy, Traffic, counting_proxy, moto_server
from pipeline.data.layout import Columns, read_catalog
from pipeline.data.prepare.store import Store
from pipeline.data.rows import read_rows
from pipeline.data.storage import open_filesystem

BUCKET = "pairs"
IMAGE_BYTES, UNUSED_BYTES = 20_000, 5_000  # of a row
MEGABYTE = 2**20
COLUMNS = Columns(image="image", caption="caption")
GOAL_LATENCY, MOST_BYTES, MOST_TIME = 0.02, 1.05, 1.1
Put = Callable[[str, bytes], None]  # a key, what it holds


class _ReadsAhead(s3fs.S3FileSystem):
    """s3fs as it comes, under a scheme that leads to it."""

    protocol = ("s3fs",)


class _ReadsExactly(s3fs.S3FileSystem):
    """s3fs that asks for what is read and no more."""

    protocol = ("s3fs-exact",)

    def __init__(self, **options: Any):
        super().__init__(**options, default_cache_type="none")


CLIENTS = {"s3": "pyarrow", "s3fs": "s3fs", "s3fs-exact": "s3fs, no cache"}  # by scheme
OTHERS = (_ReadsAhead, _ReadsExactly)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """Something the project does with a storage; `run` is given the URL of the bucket."""

    name: str
    run: Callable[[str], object]
    is_row_group: bool = False


def _footer(url: str, key: str) -> None:
    """As `read_catalog` reads each shard's."""
    filesystem, path = open_filesystem(f"{url}/{key}")
    with filesystem.open_input_file(path) as file:
        file.size()
        pq.read_metadata(file)


def _rows(url: str, key: str, groups: range) -> None:
    """As the stream reads row groups: each with a filesystem of its own."""
    for group in groups:
        filesystem, path = open_filesystem(f"{url}/{key}")
        read_rows(filesystem, path, group, COLUMNS)


def _list(url: str, folder: str) -> None:
    filesystem, path = open_filesystem(f"{url}/{folder}")
    filesystem.get_file_info(pafs.FileSelector(path, recursive=True))


def _table(size: int) -> pa.Table:
    """Rows with `size` bytes of images, which do not compress."""
    rng = np.random.default_rng(0)
    rows = max(1, size // IMAGE_BYTES)
    return pa.table(
        {
            "caption": [f"caption {row}" for row in range(rows)],
            "unused": [rng.bytes(UNUSED_BYTES) for _ in range(rows)],
            "image": [rng.bytes(IMAGE_BYTES) for _ in range(rows)],
        }
    )


def _parquet(table: pa.Table, groups: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=-(-table.num_rows // groups))
    return sink.getvalue()


def _row_groups(put: Put, quick: bool) -> list[Operation]:
    """Put shards with row groups of several sizes; say how they are read."""
    operations: list[Operation] = []
    for size, groups in ((1, 32), (16, 3)) if quick else ((1, 32), (16, 4), (64, 1)):
        key = f"shape/{size}.parquet"
        put(key, _parquet(_table(size * groups * MEGABYTE), groups))
        middle, some = range(groups // 2, groups // 2 + 1), range(min(groups, 4 if quick else 8))
        operations.append(
            Operation(
                name=f"a row group of {size} MB",
                run=lambda url, key=key, middle=middle: _rows(url, key, middle),
                is_row_group=True,
            )
        )
        if groups > 1:
            operations.append(
                Operation(
                    name=f"{len(some)} row groups of {size} MB",
                    run=lambda url, key=key, some=some: _rows(url, key, some),
                )
            )
    return operations


def _folders(put: Put, quick: bool) -> list[Operation]:
    """Put folders of small files; say how they are read."""
    shards, files, pictures = (16, 1100, 32) if quick else (64, 2500, 200)
    small = _parquet(_table(10 * IMAGE_BYTES), 1)
    for number in range(shards):
        put(f"set/{number:05d}.parquet", small)
    for number in range(files):
        put(f"many/{number % 10}/{number:05d}.parquet", b"")
    names = [f"{number:05d}.jpg" for number in range(pictures)]
    for name in names:
        put(f"paths/{name}", bytes(IMAGE_BYTES))
    put("paths/0.parquet", _parquet(pa.table({"caption": names, "image": names}), 1))
    return [
        Operation(name="footer of a shard", run=lambda url: _footer(url, "set/00000.parquet")),
        Operation(name=f"catalog of {shards} shards",
                  run=lambda url: read_catalog(f"{url}/set", "data.train")),
        Operation(name=f"list {files:,} files", run=lambda url: _list(url, "many")),
        Operation(name=f"{pictures} images by path",
                  run=lambda url: _rows(url, "paths/0.parquet", range(1))),
    ]  # fmt: skip


def _writes() -> list[Operation]:
    """As `gammaray data prepare` writes: under another name, then renamed."""
    table = _table(16 * MEGABYTE)
    return [
        Operation(
            name="write 1 kB",
            run=lambda url: Store(root=f"{url}/out").write_json("part.json", ["x" * 1000]),
        ),
        Operation(
            name="write a shard of 16 MB",
            run=lambda url: Store(root=f"{url}/out").write(
                "shard.parquet", lambda sink: pq.write_table(table, sink)
            ),
        ),
    ]


def measure(
    operation: Operation, proxy: CountingProxy, latency: float, rounds: int
) -> list[dict[str, Any]]:
    """Do one operation with every client in turn, round after round; give a cell for each."""
    seconds: dict[str, list[float]] = {scheme: [] for scheme in CLIENTS}
    traffic: dict[str, list[Traffic]] = {scheme: [] for scheme in CLIENTS}
    schemes = list(CLIENTS)
    for turn in range(rounds + 1):
        proxy.delay(latency if turn else 0.0)
        for scheme in (*schemes[turn % 3 :], *schemes[: turn % 3]):
            for other in OTHERS:
                fsspec.filesystem(other.protocol[0]).invalidate_cache()
            proxy.take()
            started = time.perf_counter()
            operation.run(f"{scheme}://{BUCKET}")
            took = time.perf_counter() - started
            if turn:  # the first warms up
                seconds[scheme].append(took)
                traffic[scheme].append(proxy.take())
    cells: list[dict[str, Any]] = []
    for scheme, client in CLIENTS.items():
        mine = traffic[scheme]
        ratios = [a / b for a, b in zip(seconds[scheme], seconds["s3"], strict=True)]
        cells.append(
            {
                "operation": operation.name,
                "client": client,
                "latency": latency,
                "is_row_group": operation.is_row_group,
                "seconds": seconds[scheme],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "requests": str(mine[-1]),
                "num_requests": statistics.median(sum(one.requests.values()) for one in mine),
                "connections": statistics.median(one.connections for one in mine),
                "received": statistics.median(one.received for one in mine),
                "sent": statistics.median(one.sent for one in mine),
            }
        )
    return cells


def _missed(cells: list[dict[str, Any]]) -> list[str]:
    missed: list[str] = []
    chosen = [cell for cell in cells if cell["is_row_group"] and cell["latency"] == GOAL_LATENCY]
    ours = {cell["operation"]: cell for cell in chosen if cell["client"] == CLIENTS["s3"]}
    for cell in chosen:
        mine, what = ours[cell["operation"]], f"{cell['operation']} than {cell['client']}"
        if mine["received"] > MOST_BYTES * cell["received"]:
            missed.append(
                f"pyarrow moves {mine['received'] / cell['received']:.2f} times the bytes for "
                f"{what}; {MOST_BYTES} are allowed"
            )
        if MOST_TIME * cell["ratio"] < 1:
            missed.append(
                f"pyarrow takes {1 / cell['ratio']:.2f} times the time for {what}; "
                f"{MOST_TIME} are allowed"
            )
    return missed


def _show(cells: list[dict[str, Any]]) -> None:
    shown = max(cell["latency"] for cell in cells)
    show_table(
        "On the wire, for one operation (bodies only)",
        ["operation", "client", "requests", "of which", "connections", "MB down", "MB up"],
        [
            [
                cell["operation"] if cell["client"] == CLIENTS["s3"] else "",
                cell["client"],
                f"{cell['num_requests']:,.0f}",
                cell["requests"],
                f"{cell['connections']:.0f}",
                f"{cell['received'] / 1e6:,.2f}",
                f"{cell['sent'] / 1e6:,.2f}",
            ]
            for cell in cells
            if cell["latency"] == shown
        ],
    )
    show_table(
        "Time: median (range) of the rounds, and of their ratios to pyarrow's",
        ["operation", "client", "latency", "time in ms", "range", "of pyarrow's", "range"],
        [
            [
                cell["operation"],
                cell["client"],
                f"{1000 * cell['latency']:.0f} ms",
                f"{1000 * statistics.median(cell['seconds']):,.0f}",
                "-".join(f"{1000 * end(cell['seconds']):,.0f}" for end in (min, max)),
                f"{cell['ratio']:.2f}",
                "-".join(f"{end(cell['ratios']):.2f}" for end in (min, max)),
            ]
            for cell in cells
        ],
    )


def main() -> None:
    """Measure, print, draw."""
    options = arguments(__doc__).parse_args()
    os.environ.update(ENVIRONMENT)
    for other in OTHERS:
        fsspec.register_implementation(other.protocol[0], other, clobber=True)
    latencies = (0.0, GOAL_LATENCY) if options.quick else (0.0, GOAL_LATENCY, 0.1)
    cells: list[dict[str, Any]] = []
    with moto_server() as port, counting_proxy(port) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        direct = pafs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{port}",
            allow_bucket_creation=True,
            allow_delayed_open=True,
        )
        direct.create_dir(BUCKET)

        def put(key: str, body: bytes) -> None:
            with direct.open_output_stream(f"{BUCKET}/{key}") as sink:
                sink.write(body)

        operations = _row_groups(put, options.quick) + _folders(put, options.quick) + _writes()
        few, many = (3, 5) if options.quick else (7, 15)
        for operation in operations:
            for latency in latencies:
                rounds = many if operation.is_row_group else few
                cells += measure(operation, proxy, latency, rounds)
    _show(cells)
    if options.figure is not None:
        draw(cells, options.figure)
    versions = {name: importlib.metadata.version(name) for name in ("pyarrow", "s3fs", "moto")}
    conclude({"cells": cells, "versions": versions}, _missed(cells), options.json)


def draw(cells: list[dict[str, Any]], file: Path) -> None:
    """Draw time and requests of both s3fs as a share of pyarrow's."""
    from matplotlib.figure import Figure

    latency = max(cell["latency"] for cell in cells)
    names = list(dict.fromkeys(cell["operation"] for cell in cells))
    found = {(cell["operation"], cell["client"]): cell
             for cell in cells if cell["latency"] == latency}  # fmt: skip
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("bytes, down and up", "requests", f"time at {1000 * latency:.0f} ms a request")
    for panel, title in zip(panels, titles, strict=True):
        for index, client in enumerate(list(CLIENTS.values())[1:]):
            shares: list[float] = []
            for name in names:
                cell, ours = found[name, client], found[name, CLIENTS["s3"]]
                moved = [one["received"] + one["sent"] for one in (cell, ours)]
                shares.append(
                    cell["ratio"]
                    if panel is panels[2]
                    else cell["num_requests"] / ours["num_requests"]
                    if panel is panels[1]
                    else moved[0] / moved[1]
                )
            panel.barh(np.arange(len(names)) + 0.4 * (index - 0.5), shares, 0.4, label=client)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=title, xlabel="of pyarrow's")
        panel.grid(alpha=0.3, axis="x")
    panels[0].set(xscale="log", xlim=(0.5, None))
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].set_yticks(np.arange(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
