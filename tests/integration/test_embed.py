"""`gammaray embed` as people run it: on Ray, killed, on real pictures, and searched."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data.layout import read_catalog
from pipeline.embed.encoder import read_encoder
from tests.integration.run_cli import kill_group, run, wait_for
from tests.tiny import tiny_config, tiny_module
from tests.tiny_run import publish_module

pytestmark = pytest.mark.integration

REAL = Path("../shared/data/openstax_alt")
README, QUERY = Path("README.md"), "a map of Europe"
VECTORS = ["image_embedding", "text_embedding"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_config()
    return publish_module(tmp_path_factory.mktemp("run"), config, tiny_module(config))[0].url


@pytest.fixture(scope="module")
def photos() -> Path:
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there: real data are not part of the project")
    return REAL


# A driver whose tasks take their time, so that it can be killed between two of them.
SCRIPT = """
import sys, time
from pipeline.data.prepare.on_ray import Keepers, OnRay
from pipeline.embed.encoder import find_checkpoint
from pipeline.embed.job import embed

with OnRay(Keepers()) as run:
    def slow(function, items):
        def work(item):
            result = function(item)
            time.sleep(0.5)
            return result
        return run(work, items)

    embed(find_checkpoint(sys.argv[1]), sys.argv[2], sys.argv[3], slow, piece_rows=300)
"""


def test_killed_it_goes_on_to_the_same_rows(trained: str, photos: Path, tmp_path: Path) -> None:
    source, out = photos / "train" / "part-00000.parquet", tmp_path / "out"
    said = run("embed", trained, str(source), str(tmp_path / "whole"))
    given = read_catalog(str(source), "IN", split="all")
    assert f"{given.num_rows:,} rows in 1 file(s) at {tmp_path / 'whole'}" in said
    whole = pq.read_table(tmp_path / "whole")
    assert whole.num_rows == given.num_rows == 2000

    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, trained, str(source), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    work = out / "_work"
    wait_for(lambda: any(work.glob("shards/*")) or job.poll() is not None)
    kill_group(job)
    made = {path.name: path.stat().st_mtime_ns for path in work.glob("shards/*.parquet")}
    assert 0 < len(made) < 8
    assert not list(out.glob("*.parquet"))

    said = run("embed", trained, str(source), str(out), "--json", str(tmp_path / "facts.json"))
    assert "2,000 rows are embedded already: going on." in said
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["embedded"] == 2000 - sum(pq.read_metadata(out / name).num_rows for name in made)
    after = {name: (out / name).stat().st_mtime_ns for name in made}
    assert after == made, "what was made is not made again"
    found = pq.read_table(out)
    assert found.drop_columns(VECTORS) == whole.drop_columns(VECTORS)
    for name in VECTORS:
        before, now = (np.array(table[name].to_pylist()) for table in (whole, found))
        assert np.allclose(before, now, atol=1e-6)
    places = list(zip(*(found[name].to_pylist() for name in ("file", "row_group", "row")),
                      strict=True))  # fmt: skip
    assert len(set(places)) == len(places)
    keys = pq.read_table(source, columns=["key"])["key"]
    assert found["key"].to_pylist() == keys.to_pylist()
    assert "it was finished already; nothing to do" in run("embed", trained, str(source), str(out))


def test_the_example_of_the_readme_searches(
    trained: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures.parquet"
    said = run("embed", trained, str(photos / "val"), str(out))
    assert "369 rows in 1 file(s)" in said
    assert "rows/s" in said or "embedding 100%" in said
    found = re.search(r"(?ms)^    import numpy as np$.*?^        print\(.*?$", README.read_text())
    assert found is not None
    given = f"run, out, query = {trained!r}, {str(out)!r}, {QUERY!r}"
    code, count = re.subn("(?m)^run, out, query = .*$", given, textwrap.dedent(found.group()))
    assert count == 1
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    table = pq.read_table(out)
    query = read_encoder(trained).texts([QUERY])
    sims = torch.tensor(table["image_embedding"].to_pylist()) @ torch.from_numpy(query[0])
    best = table["caption"][int(sims.argmax())].as_py()
    assert best[:40] in lines[0]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
