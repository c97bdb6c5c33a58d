"""Parquet on a real S3 server with bad moments: the same rows, or a message that says why not."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipeline.data.layout import read_catalog
from pipeline.data.order import union
from pipeline.data.rows import read_rows
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError
from tests.integration import s3
from tests.integration.run_cli import (
    finish,
    kill_a_worker,
    mlflow_runs,
    points,
    start,
    used_rows,
    wait_for,
    write_run,
)

pytestmark = pytest.mark.integration

GROUPS, ROWS = 4, 25
EPOCHS = 30


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    import boto3

    before = dict(os.environ)
    os.environ.update(s3.ENVIRONMENT)
    try:
        with s3.s3_server() as port:
            boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(
                Bucket="pairs"
            )
            yield port
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def bad_weather(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    with s3.proxy(server) as state:
        monkeypatch.setenv("AWS_ENDPOINT_URL", state.url)
        yield state


def _upload(port: int, file: Path, key: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").upload_file(str(file), "pairs", key)


@pytest.fixture(scope="module")
def table(server: int, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """A shard of four row groups, at s3://pairs/set/0.parquet."""
    draw = random.Random(0)
    rows = GROUPS * ROWS
    table = pa.table(
        {"image": [draw.randbytes(20_000) for _ in range(rows)], "caption": map(str, range(rows))}
    )
    file = tmp_path_factory.mktemp("set") / "0.parquet"
    pq.write_table(table, file, row_group_size=ROWS)
    _upload(server, file, "set/0.parquet")
    return table


def _read(url: str) -> list[dict[str, list]]:
    catalog = read_catalog(url, "data.train")
    filesystem, _ = open_filesystem(catalog.root)
    return [
        row
        for shard in catalog.shards
        for group in range(len(shard.row_groups))
        for row in read_rows(filesystem, shard.path, group, catalog.sources[0].columns).to_pylist()
    ]


@pytest.mark.parametrize("fault", [s3.reset, s3.unavailable, s3.truncated, s3.slow])
def test_a_bad_moment_changes_no_row(
    bad_weather: s3.Proxy, table: pa.Table, fault: s3.Fault
) -> None:
    bad_weather.spoil = lambda path, count: fault if "0.parquet" in path and count % 2 else None
    rows = _read("s3://pairs/set")
    assert bad_weather.spoiled >= 4
    assert [row["image"] for row in rows] == [[image] for image in table["image"].to_pylist()]
    assert [row["caption"] for row in rows] == [[text] for text in table["caption"].to_pylist()]


def test_expired_credentials_are_named_at_once(bad_weather: s3.Proxy, table: pa.Table) -> None:
    del table
    catalog = read_catalog("s3://pairs/set", "data.train")
    filesystem, _ = open_filesystem(catalog.root)
    bad_weather.spoil = lambda path, count: s3.expired
    said = r"pairs/set/0.parquet.*AWS Error .*the storage refuses these credentials: renew them"
    with pytest.raises(RuntimeError, match=rf"{said}"):
        read_rows(filesystem, catalog.shards[0].path, 0, catalog.sources[0].columns)
    assert bad_weather.spoiled == 1, "what will not pass is not tried again"
    with pytest.raises(UserError, match=r"^data.train: .*refuses these credentials"):
        read_catalog("s3://pairs/set", "data.train")


def test_what_is_not_there_is_said(bad_weather: s3.Proxy, table: pa.Table) -> None:
    del table, bad_weather
    with pytest.raises(UserError, match="s3://pairs/none does not exist"):
        read_catalog("s3://pairs/none", "data.train")
    with pytest.raises(UserError, match=r"no-such-bucket.* does not exist|cannot be reached"):
        read_catalog("s3://no-such-bucket/a", "data.train")
    with pytest.raises(UserError, match=r"\['bucket'\] is not among \['endpoint_override'"):
        read_catalog("s3://pairs/set?bucket=x", "data.train")


def test_a_run_reads_every_row_through_bad_weather(
    bad_weather: s3.Proxy, server: int, tmp_path: Path
) -> None:
    """One GET in four is reset, refused (503), cut short or late; then the credentials expire."""
    config = write_run(tmp_path, rows=200)
    for split in ("train", "val"):
        for shard in (tmp_path / "data" / split).glob("*.parquet"):
            _upload(server, shard, f"run/{split}/{shard.name}")
            shard.unlink()
    draw = random.Random(0)
    faults = [s3.reset, s3.unavailable, s3.truncated, s3.slow]

    def sometimes(path: str, count: int) -> s3.Fault | None:
        del count
        is_shard = path.endswith(".parquet")
        return draw.choice(faults) if is_shard and draw.random() < 0.25 else None

    bad_weather.spoil = sometimes
    places = ["data.train=s3://pairs/run/train", "data.val=s3://pairs/run/val"]
    finish(start("train", str(config), *places))
    assert bad_weather.spoiled >= 3
    used = used_rows(tmp_path / "runs" / "tiny")
    assert union(used[0]) == ((0, 200),)
    assert sum(end - begin for begin, end in used[0]) == 200, "each row once"

    def expire(path: str, count: int) -> s3.Fault | None:
        del count
        nonlocal reads
        reads += path.endswith(".parquet")
        return s3.expired if path.endswith(".parquet") and reads > 30 else None

    reads = 0
    bad_weather.spoil = expire
    process = start(
        "train", str(config), *places, "name=other", "train.epochs=50", "cluster.max_failures=0"
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    flat = " ".join(output.split())
    assert "pairs/run/train/part-00000.parquet: row group" in flat
    assert "the storage refuses these credentials" in flat


@pytest.mark.chaos
def test_checkpoints_outlive_their_storage_and_a_kill_while_they_are_sent(
    bad_weather: s3.Proxy, tmp_path: Path
) -> None:
    """Nobody answers for 20 s; later a worker is killed when half a checkpoint is there."""
    config = write_run(tmp_path, train={"epochs": EPOCHS, "checkpoint_every": 20})
    driver = start(
        "train", str(config), "cluster.storage=s3://pairs/runs",
        f"tracking.uri=sqlite:///{tmp_path}/runs/mlflow.db",
    )  # fmt: skip

    def whole() -> int:
        return sum(path.endswith("manifest.json") for path in bad_weather.puts)

    wait_for(whole, driver=driver)
    bad_weather.is_down = True
    time.sleep(20)
    bad_weather.is_down = False
    before = whole()
    wait_for(lambda: whole() > before, driver=driver)
    bad_weather.put_seconds = 2
    begun = len(bad_weather.puts)
    wait_for(lambda: any("/step-" in path for path in bad_weather.puts[begun:]), driver=driver)
    kill_a_worker(driver)
    bad_weather.put_seconds = 0
    output = finish(driver)
    assert "restarting" in output
    assert mlflow_runs(tmp_path / "runs") == ["FINISHED"]
    steps = [step for step, _ in points(tmp_path / "runs", "train/loss")]
    assert len(steps) == len(set(steps)) == EPOCHS * 300 // 16
    filesystem, root = open_filesystem("s3://pairs/runs")
    pafs.copy_files(f"{root}/tiny", str(tmp_path / "copy"), source_filesystem=filesystem)
    rows = {epoch: union(pairs) for epoch, pairs in used_rows(tmp_path / "copy").items()}
    assert all(rows[epoch] == ((0, 300),) for epoch in range(EPOCHS - 1))
    assert sum(end - begin for pairs in rows.values() for begin, end in pairs) == 16 * len(steps)
