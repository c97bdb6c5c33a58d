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

from pipeline.data.demo import write_demo
from pipeline.data.image import decode_eval
from pipeline.embed.encoder import read_encoder
from tests.integration.run_cli import kill_group, run, wait_for
from tests.tiny import tiny_config, tiny_module, tiny_tokenizer
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


# A driver whose tasks but for the first stop before they begin, so that it is killed amid them.
MADE = 3
SCRIPT = """
import sys, time
from pipeline.data.prepare.on_ray import Keepers, OnRay
from pipeline.embed.encoder import find_checkpoint
from pipeline.embed.job import embed

run_folder, source, out, made = sys.argv[1:]
with OnRay(Keepers()) as run:
    def stopping(function, items):
        def work(item):
            if item.number >= int(made):
                time.sleep(3600)
            return function(item)
        return run(work, items)

    embed(find_checkpoint(run_folder), source, out, stopping, piece_rows=30)
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated pictures: 300 rows of training, in row groups small enough for many pieces."""
    folder = tmp_path_factory.mktemp("scenes")
    write_demo(folder / "demo", 300)
    (folder / "in").mkdir()
    table = pq.read_table(folder / "demo" / "train")
    pq.write_table(table, folder / "in" / "scenes.parquet", row_group_size=30)
    return folder / "in"


def test_on_ray_it_gives_what_the_towers_give(trained: str, scenes: Path, tmp_path: Path) -> None:
    """By the command, on scenes; the towers are asked here, by ways of their own."""
    said = run("embed", trained, str(scenes), str(tmp_path / "out"))
    assert f"300 rows in 1 file(s) at {tmp_path / 'out'}, of step-00000004: 300 of them" in said
    assert re.search(r"embedding 100%  \S+ rows/s", said)
    found, given = pq.read_table(tmp_path / "out"), pq.read_table(scenes)
    assert found["caption"].to_pylist() == given["caption"].to_pylist()
    assert found["row_group"].to_pylist() == [row // 30 for row in range(300)]
    module = tiny_module(tiny_config()).eval()
    tokens, _ = tiny_tokenizer().encode(given["caption"].to_pylist(), 8)
    pixels = np.stack([decode_eval(image, (255, 255, 255), 16)
                       for image in given["image"].to_pylist()])  # fmt: skip
    with torch.no_grad():
        outputs = module(torch.from_numpy(pixels), torch.from_numpy(tokens))
    for name, expected in zip(VECTORS, (outputs.image, outputs.text), strict=True):
        assert torch.allclose(torch.tensor(found[name].to_pylist()), expected, atol=1e-5), name


def test_killed_it_goes_on_to_the_same_rows(trained: str, scenes: Path, tmp_path: Path) -> None:
    source, out = scenes / "scenes.parquet", tmp_path / "out"
    run("embed", trained, str(source), str(tmp_path / "whole"))
    whole = pq.read_table(tmp_path / "whole")

    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, trained, str(source), str(out), str(MADE)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    shards = out / "_work" / "shards"
    wait_for(lambda: len(list(shards.glob("*.parquet"))) == MADE or job.poll() is not None)
    assert job.poll() is None, "it stops before its fourth piece"
    kill_group(job)
    made = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert sorted(made) == [f"part-{number:07d}.parquet" for number in range(MADE)]
    assert not list(out.glob("*.parquet"))

    said = run("embed", trained, str(source), str(out), "--json", str(tmp_path / "facts.json"))
    assert "90 of 300 rows are embedded already: going on." in said
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["embedded"] == 210
    after = {name: (out / name).stat().st_mtime_ns for name in made}
    assert after == made, "what was made is not made again"
    found = pq.read_table(out)
    assert found.drop_columns(VECTORS) == whole.drop_columns(VECTORS)
    for name in VECTORS:
        before, now = (np.array(table[name].to_pylist()) for table in (whole, found))
        assert np.allclose(before, now, atol=1e-6)
    places = list(zip(*(found[name].to_pylist() for name in ("file", "row_group", "row")),
                      strict=True))  # fmt: skip
    assert len(set(places)) == len(places) == 300
    assert "it was finished already; nothing to do" in run("embed", trained, str(source), str(out))


def test_the_example_of_the_readme_searches(
    trained: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures.parquet"
    said = run("embed", trained, str(photos / "val"), str(out))
    assert "369 rows in 1 file(s)" in said
    assert re.search(r"embedding 100%  \S+ rows/s", said)
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
