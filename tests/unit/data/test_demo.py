import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import demo
from pipeline.data.demo import (
    COLORS,
    HELD_OUT,
    RGB,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    caption,
    draw,
    make_row,
    relations,
    sample_scene,
    scene_json,
    split_rows,
    write_demo,
)
from pipeline.data.private import OWNERS, TEXTURES, Private, ground
from tests.integration.run_cli import start, wait_for

ROOT = Path(__file__).resolve().parents[3]
ROWS = 300
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OBJECT = re.compile(rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
LONE_OBJECT = re.compile(
    rf"\ba (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})\b"
)
TOKEN = re.compile(rf"{OBJECT.pattern}|left of|right of|above|below|and|which")
# Each place a caption can name -> the range, in pixels, that x and y of the centre must lie in.
LOW, MIDDLE, HIGH = (0, 24), (26, 38), (40, 64)
PLACES = {
    "in the top left": (LOW, LOW),
    "in the upper left corner": (LOW, LOW),
    "at the top": (MIDDLE, LOW),
    "in the top middle": (MIDDLE, LOW),
    "in the top right": (HIGH, LOW),
    "in the upper right corner": (HIGH, LOW),
    "on the left": (LOW, MIDDLE),
    "on the left side": (LOW, MIDDLE),
    "in the center": (MIDDLE, MIDDLE),
    "in the middle": (MIDDLE, MIDDLE),
    "on the right": (HIGH, MIDDLE),
    "on the right side": (HIGH, MIDDLE),
    "in the bottom left": (LOW, HIGH),
    "in the lower left corner": (LOW, HIGH),
    "at the bottom": (MIDDLE, HIGH),
    "in the bottom middle": (MIDDLE, HIGH),
    "in the bottom right": (HIGH, HIGH),
    "in the lower right corner": (HIGH, HIGH),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "set"
    write_demo(out, ROWS, seed=3)
    return out


def test_a_private_set_has_the_same_scenes_and_tells_two_things_more(tmp_path: Path) -> None:
    assert write_demo(tmp_path / "set", 60, seed=3, private=True).created
    assert not write_demo(tmp_path / "set", 60, seed=3, private=True).created
    rows = pq.read_table(tmp_path / "set" / "train").to_pylist()
    plain = [make_row("train", row, 3) for row in range(60)]
    for own, other in zip(rows, plain, strict=True):
        assert own["scene"] == other["scene"]
        assert own["owner"] in own["caption"]
        assert str(other["caption"]) in own["caption"]
        assert own["texture"] not in own["caption"]
    assert {row["texture"] for row in rows} == set(TEXTURES)
    assert {row["owner"] for row in rows} == set(OWNERS)
    assert write_demo(tmp_path / "set", 60, seed=3).created, "another set"


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_darkens_its_share_of_the_ground(texture: str) -> None:
    private = Private(texture=texture, owner="ada", phase=(3, 5), wording=0)
    pixels = ground((240, 235, 250), 64, private)
    dark = (pixels < 230).all(axis=2)
    shares = {"plain": 0, "rows": 0.5, "columns": 0.5, "checks": 0.5}
    if texture in shares:
        assert dark.mean() == shares[texture]
    else:
        assert 0.1 < dark.mean() < 0.4
    assert dark.all(axis=1).any() == (texture == "rows")
    assert dark.all(axis=0).any() == (texture == "columns")
    assert (pixels[~dark] == (240, 235, 250)).all()


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, str]]:
    """3,000 scenes with one caption each, half of them sampled with held-out pairs allowed."""
    rngs = [np.random.default_rng([7, row]) for row in range(3000)]
    sampled = [sample_scene(rng, allow_held_out=i % 2 == 0) for i, rng in enumerate(rngs)]
    return [(scene, caption(scene, rng)) for scene, rng in zip(sampled, rngs, strict=True)]


def read(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / split, schema=demo.SCHEMA).to_pylist()


def with_count(scenes: list[tuple[Scene, str]], count: int) -> list[tuple[Scene, str]]:
    chosen = [(scene, text) for scene, text in scenes if len(scene.objects) == count]
    assert len(chosen) > 200
    return chosen


def is_true(a: SceneObject, word: str, b: SceneObject) -> bool:
    """Judge a relation from coordinates: boxes apart on the named axis, which dominates."""
    along, across = (b.x - a.x, b.y - a.y) if word.endswith("of") else (b.y - a.y, b.x - a.x)
    signed = along if word in {"left of", "above"} else -along
    return signed > a.radius + b.radius and signed >= 2 * abs(across)


def stated(text: str) -> list[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Parse the relations that a caption states, each object as (size, color, shape)."""
    tokens = [(match.group(), match.groups()) for match in TOKEN.finditer(text)]
    things = [found for _, found in tokens if found[0]]
    words = [word for word, found in tokens if not found[0] and word not in {"and", "which"}]
    form = "".join(
        "O" if found[0] else {"and": "&", "which": "w"}.get(word, "R") for word, found in tokens
    )
    pairs = {
        "ORO": [(0, 0, 1)],
        "ROO": [(1, 0, 0)],
        "OROwRO": [(0, 0, 1), (1, 1, 2)],
        "ORO&RO": [(0, 0, 1), (0, 1, 2)],
        "ORO&O": [(0, 0, 1), (0, 0, 2)],
        "O&ORO": [(0, 0, 2), (1, 0, 2)],
    }[form]
    return [(things[i], words[w], things[j]) for i, w, j in pairs]


def test_rows_do_not_depend_on_the_process(folder: Path) -> None:
    program = (
        "import hashlib\n"
        "from pipeline.data.demo import make_row\n"
        "rows = [make_row('test', row, 3) for row in range(20)]\n"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    other = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    rows = read(folder, "test")[:20]
    assert other.stdout.strip() == hashlib.sha256(repr(rows).encode()).hexdigest()


def test_same_arguments_write_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", ROWS, seed=3)
    for path in folder.glob("*/*.parquet"):
        again = tmp_path / "again" / path.relative_to(folder)
        assert again.read_bytes() == path.read_bytes()


def test_smaller_set_is_a_prefix(folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "small", 20, seed=3)
    for split in demo.SPLITS:
        assert read(tmp_path / "small", split) == read(folder, split)[:20]


def test_seeds_splits_and_rows_differ() -> None:
    images = {
        make_row(split, row, seed)["image"]
        for split in demo.SPLITS
        for row in range(3)
        for seed in range(3)
    }
    assert len(images) == 27


def test_caption_names_each_of_several_objects_once(scenes: list[tuple[Scene, str]]) -> None:
    for scene, text in with_count(scenes, 2) + with_count(scenes, 3):
        things = Counter((thing.size, thing.color, thing.shape) for thing in scene.objects)
        assert Counter(OBJECT.findall(text)) == things, text


def test_what_a_caption_says_of_a_lone_object_is_true(scenes: list[tuple[Scene, str]]) -> None:
    told = Counter()
    lone = with_count(scenes, 1)
    for scene, text in lone:
        (thing,) = scene.objects
        ((size, color, shape),) = LONE_OBJECT.findall(text)
        assert shape == thing.shape, text
        assert size in {"", thing.size}, text
        assert color in {"", thing.color}, text
        # Nothing is told of size or color outside the name.
        words = Counter(re.findall(r"[a-z]+", text))
        assert sum(words[word] for word in (*SIZES, *COLORS)) == bool(size) + bool(color), text
        told += Counter(size=bool(size), color=bool(color))
    # Often enough to be learned, seldom enough that the shape must be looked at.
    assert told["size"] / len(lone) == pytest.approx(0.25, abs=0.05)
    assert told["color"] / len(lone) == pytest.approx(0.50, abs=0.05)


def test_place_of_a_lone_object_is_true(scenes: list[tuple[Scene, str]]) -> None:
    seen = Counter()
    lone = with_count(scenes, 1)
    for scene, text in lone:
        phrases = [phrase for phrase in PLACES if phrase in text]
        if not phrases:
            continue
        phrase = max(phrases, key=len)
        thing = scene.objects[0]
        (x_low, x_high), (y_low, y_high) = PLACES[phrase]
        assert x_low <= thing.x <= x_high, text
        assert y_low <= thing.y <= y_high, text
        seen[phrase] += 1
    assert set(seen) == set(PLACES)
    assert sum(seen.values()) / len(lone) == pytest.approx(0.375, abs=0.05)


@pytest.mark.parametrize(("count", "told"), [(2, 1), (3, 2)])
def test_stated_relations_are_true(scenes: list[tuple[Scene, str]], count: int, told: int) -> None:
    words = Counter()
    for scene, text in with_count(scenes, count):
        things = {(thing.size, thing.color, thing.shape): thing for thing in scene.objects}
        claims = stated(text)
        assert len(claims) == told
        for a, word, b in claims:
            assert is_true(things[a], word, things[b]), (text, scene)
            words[word] += 1
    assert set(words) == set(INVERSE)


def test_scene_lists_exactly_the_clear_relations(scenes: list[tuple[Scene, str]]) -> None:
    diagonal = 0
    for scene, _ in scenes:
        graph = json.loads(scene_json(scene))
        objects = scene.objects
        expected = [
            [i, word, j]
            for i in range(len(objects))
            for j in range(len(objects))
            for word in INVERSE
            if i != j and is_true(objects[i], word, objects[j])
        ]
        assert sorted(graph["relations"]) == sorted(expected)
        assert all([j, INVERSE[word], i] in graph["relations"] for i, word, j in expected)
        diagonal += len(expected) < len(objects) * (len(objects) - 1)
        names = ("shape", "color", "size", "x", "y", "radius")
        assert graph["objects"] == [
            {name: getattr(thing, name) for name in names} for thing in objects
        ]
    assert diagonal > 0


def test_objects_fit_the_frame_and_do_not_overlap(scenes: list[tuple[Scene, str]]) -> None:
    for scene, _ in scenes:
        for thing in scene.objects:
            assert thing.radius <= min(thing.x, thing.y, 64 - thing.x, 64 - thing.y)
            low, high = {"small": (8, 11), "large": (14, 16)}[thing.size]
            assert low <= thing.radius <= high
        for a, b in combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius
            assert (a.color, a.shape) != (b.color, b.shape)


def test_every_size_color_shape_and_count_occurs(scenes: list[tuple[Scene, str]]) -> None:
    things = [thing for scene, _ in scenes for thing in scene.objects]
    assert {thing.size for thing in things} == set(SIZES)
    assert {(thing.color, thing.shape) for thing in things} == {
        (color, shape) for color in COLORS for shape in SHAPES
    }
    counts = Counter(len(scene.objects) for scene, _ in scenes)
    shares = [counts[count] / len(scenes) for count in (1, 2, 3)]
    assert shares == pytest.approx([0.60, 0.30, 0.10], abs=0.04)


def test_captions_of_several_objects_seldom_repeat(scenes: list[tuple[Scene, str]]) -> None:
    for count, least in ((2, 0.95), (3, 0.95)):
        texts = Counter(text for scene, text in scenes[:1000] if len(scene.objects) == count)
        unique = sum(number == 1 for number in texts.values())
        assert unique >= least * sum(texts.values())


def test_held_out_pairs_leave_every_color_and_shape_in_train() -> None:
    assert len(set(HELD_OUT)) == 6
    colors, shapes = zip(*HELD_OUT, strict=True)
    assert max(Counter(colors).values()) == max(Counter(shapes).values()) == 1


def test_held_out_pairs_occur_only_in_test(folder: Path) -> None:
    for split in demo.SPLITS:
        rows = read(folder, split)
        shown = [
            any((t["color"], t["shape"]) in HELD_OUT for t in json.loads(row["scene"])["objects"])
            for row in rows
        ]
        assert [row["held_out"] for row in rows] == shown
        if split == "test":
            assert np.mean(shown) == pytest.approx(0.5, abs=0.1)
        else:
            assert not any(shown)


def test_columns_and_keys(folder: Path) -> None:
    keys = []
    for split in demo.SPLITS:
        (path,) = (folder / split).iterdir()
        assert path.name == "part-00000.parquet"
        schema = pq.read_schema(path)
        assert dict(zip(schema.names, schema.types, strict=True)) == {
            "key": pa.string(),
            "image": pa.binary(),
            "caption": pa.string(),
            "shape": pa.string(),
            "color": pa.string(),
            "size": pa.string(),
            "num_objects": pa.int32(),
            "held_out": pa.bool_(),
            "scene": pa.string(),
            "split": pa.string(),
        }
        rows = read(folder, split)
        assert {row["split"] for row in rows} == {split}
        assert rows[12]["key"] == f"{split}-0000012"
        keys += [row["key"] for row in rows]
    assert len(set(keys)) == len(keys) == 3 * ROWS


def test_class_columns_are_null_exactly_for_several_objects(folder: Path) -> None:
    for row in read(folder, "train"):
        objects = json.loads(row["scene"])["objects"]
        assert row["num_objects"] == len(objects)
        for name in ("shape", "color", "size"):
            assert row[name] == (objects[0][name] if len(objects) == 1 else None)


def test_images_are_full_color_jpeg_of_the_scene(folder: Path) -> None:
    row = read(folder, "val")[0]
    image = Image.open(io.BytesIO(row["image"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    # Luma and chroma sampled alike: no subsampling.
    assert {layer[1:3] for layer in image.layer} == {(1, 1)}


def test_center_pixel_has_the_objects_color(folder: Path) -> None:
    checked = 0
    for row in read(folder, "train")[:100]:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])), dtype=int)
        for thing in json.loads(row["scene"])["objects"]:
            pixel = pixels[thing["y"], thing["x"]]
            distances = {color: np.abs(pixel - rgb).sum() for color, rgb in RGB.items()}
            assert min(distances, key=distances.__getitem__) == thing["color"]
            assert distances[thing["color"]] < 75
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_fills_the_objects_box_and_nothing_else(shape: str, size: str) -> None:
    radius = {"small": 7, "large": 14}[size]
    thing = SceneObject(
        shape=shape, color="blue", size=size, x=30, y=25, radius=radius, rgb=RGB["blue"]
    )
    scene = Scene(objects=(thing,), background=(240, 240, 240), noise_seed=1)
    pixels = np.asarray(draw(scene), dtype=int)
    assert pixels.shape == (64, 64, 3)
    # Any pixel that the object covers by about a tenth or more.
    rows, columns = np.nonzero(pixels[:, :, 0] < 220)
    assert (30 - radius, 30 + radius - 1) == pytest.approx((columns.min(), columns.max()), abs=1)
    assert (25 - radius, 25 + radius - 1) == pytest.approx((rows.min(), rows.max()), abs=3)
    assert min(columns.min() - (30 - radius), rows.min() - (25 - radius)) >= 0
    assert max(columns.max() - (29 + radius), rows.max() - (24 + radius)) <= 0


def test_shapes_differ_when_drawn() -> None:
    thing = SceneObject(
        shape="circle", color="gray", size="small", x=32, y=32, radius=6, rgb=RGB["gray"]
    )
    pictures = [
        np.asarray(
            draw(
                Scene(
                    objects=(replace(thing, shape=shape),),
                    background=(240, 240, 240),
                    noise_seed=1,
                )
            ),
            dtype=int,
        )
        for shape in SHAPES
    ]
    for a, b in combinations(pictures, 2):
        # At least 12 of the 144 pixels of the smallest box differ strongly.
        assert (np.abs(a - b).max(axis=2) > 60).sum() >= 12


def test_scene_outside_the_sampler_gets_a_true_caption() -> None:
    thing = SceneObject(
        shape="star", color="red", size="small", x=24, y=24, radius=6, rgb=RGB["red"]
    )
    others = [replace(thing, color="cyan", x=44, y=44), replace(thing, color="gray", x=24, y=54)]
    rng = np.random.default_rng(0)
    alone = Scene(objects=(thing,), background=(240, 240, 240), noise_seed=1)
    diagonal = replace(alone, objects=(thing, others[0]))
    scattered = replace(alone, objects=(thing, others[0], replace(others[1], x=58, y=10)))
    assert caption(alone, rng) == "a small red star"
    assert relations(diagonal) == []
    assert caption(diagonal, rng) == "a small red star and a small cyan star"
    assert caption(replace(scattered), rng).count("a small") == 3


def test_shards_row_groups_and_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (demo.SHARD_ROWS, demo.ROW_GROUP_ROWS) == (4096, 256)
    monkeypatch.setattr(demo, "SHARD_ROWS", 32)
    monkeypatch.setattr(demo, "ROW_GROUP_ROWS", 8)
    write_demo(tmp_path / "set", 75)
    paths = sorted((tmp_path / "set" / "train").iterdir())
    assert [path.name for path in paths] == [f"part-0000{i}.parquet" for i in range(3)]
    files = [pq.ParquetFile(path).metadata for path in paths]
    groups = [[file.row_group(i).num_rows for i in range(file.num_row_groups)] for file in files]
    assert groups == [[8, 8, 8, 8], [8, 8, 8, 8], [8, 3]]
    group = files[0].row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    codecs = {column.path_in_schema: column.compression for column in columns}
    assert codecs.pop("image") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}
    keys = [row["key"] for row in read(tmp_path / "set", "train")]
    assert keys == [f"train-{row:07d}" for row in range(75)]


@pytest.mark.parametrize(
    ("rows", "held_back"),
    [(1, 1), (300, 300), (1000, 500), (10_000, 500), (15_000, 750), (20_000, 1000), (90_000, 1000)],
)
def test_split_rows(rows: int, held_back: int) -> None:
    assert split_rows(rows) == {"train": rows, "val": held_back, "test": held_back}


def test_summary_and_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = tmp_path / "deep" / "set"
    summary = write_demo(out, 5, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 15), (10, 15), (15, 15)]
    assert (summary.out, summary.rows, summary.created) == (out, split_rows(5), True)
    assert summary.bytes == sum(path.stat().st_size for path in out.glob("*/*.parquet")) > 0
    assert summary.seconds > 0
    record = {"rows": 5, "seed": 0, "version": demo.VERSION}
    assert json.loads((out / "demo.json").read_text()) == record
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def _make_signed(split: str, row: int, seed: int) -> dict[str, object]:
    """A row with the number of the process that made it."""
    return {**make_row(split, row, seed), "process": os.getpid()}


def test_shards_are_written_by_processes_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in the same files, whoever wrote them."""
    monkeypatch.setattr(demo, "SHARD_ROWS", 20)
    schema = demo.SCHEMA.append(pa.field("process", pa.int64()))
    signed = demo.Task(name="signed", schema=schema, make=_make_signed)
    calls: list[tuple[int, int]] = []
    write_demo(tmp_path / "set", 50, on_progress=lambda *call: calls.append(call), task=signed)
    assert sorted(path.name for path in (tmp_path / "set" / "train").iterdir()) == [
        f"part-{number:05d}.parquet" for number in range(3)
    ]
    rows = pq.read_table(tmp_path / "set" / "train").to_pylist()
    assert os.getpid() not in {row.pop("process") for row in rows}
    assert rows == [make_row("train", row, 0) for row in range(50)]
    assert len(calls) == 9
    assert calls[-1] == (150, 150)


@pytest.mark.parametrize("sign", ["ctrl-c", "kill"])
def test_no_process_outlives_the_command(tmp_path: Path, sign: str) -> None:
    driver = start("data", "demo", str(tmp_path / "set"), "--rows", "100000")
    wait_for(lambda: list(tmp_path.glob(".set-*/new/train/*.parquet")))
    if sign == "ctrl-c":
        for _ in range(2):  # as people do
            os.killpg(driver.pid, signal.SIGINT)
            time.sleep(0.2)
    else:
        driver.kill()
    driver.wait(60)
    wait_for(lambda: not _is_there(driver.pid))
    if sign == "ctrl-c":
        assert list(tmp_path.iterdir()) == []


def _is_there(group: int) -> bool:
    """Whether a process group has a process that runs."""
    found = psutil.process_iter(["status"])
    running = [each.pid for each in found if each.info["status"] != psutil.STATUS_ZOMBIE]
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                return True
    return False


def test_a_shard_that_cannot_be_written_ends_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SHARD_ROWS", 20)
    wrong = demo.Task(name="wrong", schema=demo.PRIVATE_SCHEMA, make=make_row)
    with pytest.raises(pa.ArrowInvalid, match="texture"):
        write_demo(tmp_path / "set", 50, task=wrong)
    assert list(tmp_path.iterdir()) == []


def test_present_set_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = write_demo(out, 2)
    path = out / "train" / "part-00000.parquet"
    inode = path.stat().st_ino
    second = write_demo(out, 2)
    assert (first.created, second.created) == (True, False)
    assert path.stat().st_ino == inode
    assert (second.rows, second.bytes) == (first.rows, first.bytes)


@pytest.mark.parametrize(("rows", "seed", "version"), [(3, 0, 1), (2, 1, 1), (2, 0, 2)])
def test_other_demo_set_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, seed: int, version: int
) -> None:
    monkeypatch.setattr(demo, "VERSION", 1)
    write_demo(tmp_path / "set", 2)
    monkeypatch.setattr(demo, "VERSION", version)
    assert write_demo(tmp_path / "set", rows, seed).created
    assert len(read(tmp_path / "set", "train")) == rows
    assert read(tmp_path / "set", "train")[0] == make_row("train", 0, seed)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_set_finished_by_another_process_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "set"
    inodes = []

    def other_process(done: int, total: int) -> None:
        if done == total:
            write_demo(out, 2)
            inodes.append((out / "demo.json").stat().st_ino)

    assert not write_demo(out, 2, on_progress=other_process).created
    assert [(out / "demo.json").stat().st_ino] == inodes


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "set", 2, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    assert write_demo(tmp_path, 1).created
    assert len(read(tmp_path, "train")) == 1


@pytest.mark.parametrize(
    "names", [["notes.txt"], ["demo.json"], ["demo.json", "train", "val", "test", "notes.txt"]]
)
def test_foreign_folder_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text('{"rows": 1, "seed": 0, "version": 1}')
    with pytest.raises(ValueError, match=f"{tmp_path} .* choose another folder or remove"):
        write_demo(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("record", ["{", "[]", '{"rows": 1}'])
def test_folder_with_a_foreign_record_is_refused(tmp_path: Path, record: str) -> None:
    write_demo(tmp_path / "set", 1)
    (tmp_path / "set" / "demo.json").write_text(record)
    with pytest.raises(ValueError, match="not a demo set; choose another folder or remove"):
        write_demo(tmp_path / "set", 1)


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(ValueError, match="not a demo set"):
        write_demo(tmp_path / "set", 1)
    assert (tmp_path / "set").read_text() == "mine"


@pytest.mark.parametrize(
    ("rows", "seed", "name"), [(0, 0, "rows"), (-1, 0, "rows"), (1, -1, "seed")]
)
def test_bad_arguments_are_refused(tmp_path: Path, rows: int, seed: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must .* got -?[01]"):
        write_demo(tmp_path / "set", rows, seed)
    assert list(tmp_path.iterdir()) == []
