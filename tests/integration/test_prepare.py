"""`gammaray data prepare` as people run it: on Ray, killed, on real sets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from pipeline.data.layout import read_catalog
from pipeline.data.prepare.job import Options, Sizes, prepare
from pipeline.data.prepare.on_ray import JobFailed, OnRay
from tests.integration.run_cli import kill_group, run, wait_for

pytestmark = pytest.mark.integration

REAL = Path("../shared/data")
ROWS = 400


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 pictures of 600 x 500, two of them broken, in row groups of 10."""
    folder = tmp_path_factory.mktemp("photos") / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images: list[bytes] = []
    for _ in range(ROWS):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        pixels = np.ascontiguousarray(np.kron(coarse, np.ones((100, 100, 1), np.uint8)))
        images.append(simplejpeg.encode_jpeg(pixels, quality=90))
    images[3], images[250] = b"broken", images[250][:-300]
    captions = [f"picture {row}" for row in range(ROWS)]
    table = pa.table({"key": captions, "image": images, "caption": captions})
    pq.write_table(table, folder / "0.parquet", row_group_size=10, compression="none",
                   use_dictionary=False)  # fmt: skip
    return folder


# A driver whose tasks take their time, so that it can be killed between two of them.
SCRIPT = """
import sys, time
from pipeline.data.prepare.job import Options, Sizes, prepare
from pipeline.data.prepare.on_ray import OnRay

sizes = Sizes(part=100_000, bucket=50_000, shard=100_000, row_group=50_000)
with OnRay() as run:
    def slow(function, items):
        def work(item):
            result = function(item)
            time.sleep(0.5)
            return result
        return run(work, items)

    prepare(sys.argv[1], sys.argv[2], Options(short_side=200), slow, sizes=sizes)
"""


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.usefixtures("local_ray")
def test_killed_in_both_passes_it_goes_on_to_the_same_content(photos: Path, tmp_path: Path) -> None:
    sizes = Sizes(part=100_000, bucket=50_000, shard=100_000, row_group=50_000)
    options = Options(short_side=200)
    with OnRay() as on_ray:
        whole = prepare(str(photos), str(tmp_path / "whole"), options, on_ray, sizes=sizes)
    assert whole.stats["rows_out"] == ROWS - 2
    assert whole.stats["dropped"] == {"corrupt_image": 2}
    assert len(whole.stats["shards"]) > 3

    out = tmp_path / "out"
    work = out / "_work"
    for made in ("parts/*.json", "shards/*.parquet"):
        job = _start(str(photos), str(out))
        wait_for(lambda made=made, job=job: any(work.glob(made)) or job.poll() is not None)
        kill_group(job)
        assert any(work.glob(made))
        assert not (out / "stats.json").exists()
    parts = {path: path.stat().st_mtime_ns for path in work.glob("parts/*.json")}
    seen: dict[Path, int] = {}

    class Look:
        def say(self, text: str) -> None: ...

        def show(self, what: str, done: int, total: int) -> None:
            seen.update({path: path.stat().st_mtime_ns for path in parts if path.exists()})

    with OnRay() as on_ray:
        resumed = prepare(str(photos), str(out), options, on_ray, Look(), sizes)
    assert seen == parts
    assert resumed.stats == whole.stats
    assert not work.exists()


@pytest.mark.usefixtures("local_ray")
def test_a_failed_task_ends_the_job_with_its_own_words() -> None:
    def fail(item: Exception) -> dict[str, int]:
        if item.args:
            raise item
        return {"done": 1}

    with OnRay() as on_ray:
        assert list(on_ray(fail, [])) == []
        assert list(on_ray(fail, [RuntimeError()] * 2)) == [{"done": 1}] * 2
        with pytest.raises(JobFailed, match=r"^x\.parquet: row group 3 cannot be read$"):
            list(on_ray(fail, [RuntimeError("x.parquet: row group 3 cannot be read")]))
        with pytest.raises(JobFailed, match=r"^KeyError at test_prepare\.py:\d+: 'key'$"):
            list(on_ray(fail, [KeyError("key")]))


@pytest.mark.parametrize("name", ["openstax_alt", "noto_emoji", "clothing_small"])
def test_real_sets(tmp_path: Path, name: str) -> None:
    source = REAL / name / "val"
    if not source.exists():
        pytest.skip(f"{source} is not there: real data are not part of the project")
    out = tmp_path / "out"
    said = run("data", "prepare", str(source), str(out), "--short-side", "100")
    stats = json.loads((out / "stats.json").read_text())
    given = read_catalog(str(source), "data.val")
    assert f"{given.num_rows:,} of {given.num_rows:,} rows" in said
    assert stats["content_hash"] in said
    catalog = read_catalog(str(out), "data.train")
    assert catalog.num_rows == stats["rows_out"] == given.num_rows
    assert stats["short_side"]["max"] <= 100
    rows = pq.read_table(out / catalog.shards[0].path).to_pylist()
    before = pq.read_table(given.shards[0].path, columns=["key", "image", "caption"]).to_pylist()
    by_key = {row["key"]: row for row in before}
    kept = [row for row in rows if row["image"] == by_key[row["key"]]["image"]]
    assert all(row["caption"] == " ".join(by_key[row["key"]]["caption"].split()) for row in rows)
    assert len(kept) == stats["images_kept"]
    assert "finished already; nothing to do" in run(
        "data", "prepare", str(source), str(out), "--short-side", "100"
    )
