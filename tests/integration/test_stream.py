"""The Ray Data stream on real files: the rows of the order, whole batches, honest counts."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.batches import Batch, eval_batches, make_order, train_batches
from pipeline.data.decode import Recipe, View
from pipeline.data.layout import mix, read_catalog
from pipeline.data.order import Cursor, as_intervals
from pipeline.data.text import train_tokenizer
from tests.tiny_data import jpeg, write_pairs

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

REAL = Path("../shared/data")
CAPTIONS = [f"picture number {row}" for row in range(60)]
TOKENIZER = train_tokenizer(CAPTIONS, 400)


def _recipe(train: bool = True, **changes: object) -> Recipe:
    values = {
        "tokenizer": TOKENIZER,
        "context_length": 8,
        "image_size": 16,
        "view": View(crop_scale=(0.5, 1.0), flip=0.5),
        "background": (255, 255, 255),
        "seed": 0,
        "train": train,
    }
    return Recipe(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def _batches(
    folder: Path, cursor: Cursor | None = None, world: int = 1, rank: int = 0, size: int = 8
) -> Iterator[Batch]:
    catalog = read_catalog(str(folder), "data.train")
    return train_batches(
        catalog,
        make_order(catalog, window_rows=16, seed=0),
        _recipe(),
        cursor or Cursor(digest=catalog.digest),
        world_size=world,
        rank=rank,
        batch_size=size,
        ingest_cpus=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows in 3 shards; row 7 holds no picture, row 30 no caption."""
    images = [jpeg((row * 4, 60, 30)) for row in range(60)]
    images[7] = b"broken"
    captions: list[str | None] = list(CAPTIONS)
    captions[30] = "   "
    return write_pairs(
        tmp_path_factory.mktemp("stream"), 60, shards=3, image=images, caption=captions
    )


def _texts(batch: Batch) -> list[str]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(TOKENIZER.json)
    return [backend.decode(row.tolist()).strip() for row in batch.tokens]


def test_ranks_together_see_every_good_row_of_an_epoch_once(folder: Path) -> None:
    seen: Counter[str] = Counter()
    used: Counter[int] = Counter()
    bad: list[tuple[str, int, str]] = []
    for rank in range(2):
        stream = _batches(folder, world=2, rank=rank, size=1)
        for batch in stream:
            if any(epoch > 0 for epoch in batch.used):
                bad += [
                    (row.path[-14:], row.row, row.reason) for row in batch.bad if 0 in batch.used
                ]
                used.update(batch.used.get(0, np.empty(0, int)).tolist())
                break
            seen.update(_texts(batch))
            used.update(batch.used[0].tolist())
            bad += [(row.path[-14:], row.row, row.reason) for row in batch.bad]
    assert seen == Counter(set(CAPTIONS) - {CAPTIONS[7], CAPTIONS[30]})
    assert used == Counter(range(60))
    assert sorted(bad) == [
        ("part-0.parquet", 7, "corrupt_image"),
        ("part-1.parquet", 10, "empty_caption"),
    ]


def test_batches_are_whole_and_cross_epochs(folder: Path) -> None:
    batches = list(itertools.islice(_batches(folder, size=24), 5))
    assert all(batch.rows == len(batch.images) == len(batch.tokens) == 24 for batch in batches)
    assert set(batches[2].used) == {0, 1}
    assert batches[0].images.shape == (24, 16, 16, 3)


def test_the_stream_is_a_function_of_its_inputs(folder: Path) -> None:
    """Same seed, same pixels, tokens and order, crops included; another epoch, other crops."""
    first, again = (list(itertools.islice(_batches(folder), 9)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert (one.images == other.images).all()
        assert (one.tokens == other.tokens).all()
    assert not (first[0].images == first[8].images).all()


def test_a_cursor_leaves_out_what_was_used(folder: Path) -> None:
    before = list(itertools.islice(_batches(folder), 3))
    cursor = Cursor(digest="any")
    for batch in before:
        for epoch, positions in batch.used.items():
            cursor.add(epoch, as_intervals(positions))
    used = {text for batch in before for text in _texts(batch)}
    after: set[str] = set()
    for batch in _batches(folder, cursor, size=1):
        if 1 in batch.used:
            break
        after |= set(_texts(batch))
    assert not after & used
    assert after | used == set(CAPTIONS) - {CAPTIONS[7], CAPTIONS[30]}


def test_one_caption_of_several_is_drawn_each_epoch(tmp_path: Path) -> None:
    several = [[CAPTIONS[row], CAPTIONS[row + 30], ""] for row in range(30)]
    write_pairs(tmp_path, 30, caption=several)
    stream = _batches(tmp_path, size=30)
    first, second = _texts(next(stream)), _texts(next(stream))
    assert len(set(first)) == 30
    assert set(first) != set(second)
    drawn_late = sum(text in CAPTIONS[30:] for text in first)
    assert 5 <= drawn_late <= 25


def test_sources_are_mixed_exactly_each_with_its_own_columns(tmp_path: Path) -> None:
    """60 rows seen half, 6 rows seen twice: 42 an epoch; two epochs see all of the first once."""
    large = write_pairs(tmp_path / "large", 60, shards=3, caption=CAPTIONS)
    small = write_pairs(tmp_path / "small", 6)
    (shard,) = small.glob("*.parquet")
    images = pq.read_table(shard)["image"]
    pq.write_table(pa.table({"jpg": images, "words": [["picture number 60"]] * 6}), shard)
    parts = [
        read_catalog(str(large), "data.train"),
        read_catalog(str(small), "data.train", caption="words"),
    ]
    catalog = mix(parts, [0.5, 2.0], "data.train")
    order = make_order(catalog, window_rows=16, seed=0)
    assert order.num_rows == catalog.rows_an_epoch == 42
    seen: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for rank in range(2):
        stream = train_batches(
            catalog, order, _recipe(), Cursor(digest=catalog.digest), world_size=2, rank=rank,
            batch_size=7, ingest_cpus=1,
        )  # fmt: skip
        for batch in itertools.islice(stream, 6):  # 21 rows an epoch: no batch lies in two
            (epoch,) = batch.used
            keys = batch.keys.tolist()
            seen[epoch].update(keys)
            numbers = [int(text.split()[-1]) for text in _texts(batch)]
            assert numbers == [min(key, 60) for key in keys]
    for counts in seen.values():
        assert [counts[key] for key in range(60, 66)] == [2] * 6
        assert sum(counts[key] for key in range(60)) == 30
    assert all(seen[0][key] + seen[1][key] == 1 for key in range(60))


def test_evaluation_reads_in_order_pads_and_keeps_every_caption(tmp_path: Path) -> None:
    several = [[CAPTIONS[row], CAPTIONS[row + 30]] for row in range(11)]
    labels = pa.array([None if row == 4 else f"class {row % 2}" for row in range(11)])
    write_pairs(tmp_path, 11, caption=several, kind=labels)
    catalog = read_catalog(str(tmp_path), "data.val")
    texts: list[str] = []
    kinds: list[str] = []
    for rank in range(2):
        stream = eval_batches(
            catalog,
            _recipe(train=False, labels=("kind",)),
            max_rows=10,
            world_size=2,
            rank=rank,
            batch_size=4,
            ingest_cpus=1,
        )
        batches = list(stream)
        assert [batch.rows for batch in batches] == [4, 1]
        assert all(len(batch.images) == 4 for batch in batches)
        for batch in batches:
            texts += _texts(batch)[: batch.rows]
            kinds += batch.labels["kind"]
            assert [len(more) for more in batch.more_tokens] == [1] * batch.rows
    assert texts == CAPTIONS[:10]
    assert kinds == ["" if row == 4 else f"class {row % 2}" for row in range(10)]


def test_struct_images_and_long_captions(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(), "path": "x.jpg"}] * 3 + [{"bytes": None, "path": "y.jpg"}]
    write_pairs(tmp_path, 4, image=images, caption=["one " * 50, "two", "three", "four"])
    (batch,) = itertools.islice(_batches(tmp_path, size=3), 1)
    assert batch.cut == 1
    assert (batch.tokens[:, -1] == TOKENIZER.end).sum() == 1


def test_evaluation_is_read_while_training_pauses(folder: Path) -> None:
    """Tasks that wait for room keep their CPUs: those of both streams must fit, or it waits."""
    catalog = read_catalog(str(folder), "data.train")
    training = train_batches(
        catalog,
        make_order(catalog, window_rows=4, seed=0),
        _recipe(),
        Cursor(digest=catalog.digest),
        world_size=1,
        rank=0,
        batch_size=1,
        ingest_cpus=2,
    )
    next(training)
    evaluation = eval_batches(
        catalog, _recipe(train=False), max_rows=60, world_size=1, rank=0, batch_size=8,
        ingest_cpus=2,
    )  # fmt: skip
    assert sum(batch.rows for batch in evaluation) == 58
    assert next(training).rows == 1


def test_no_usable_row_is_an_error_not_an_endless_search(tmp_path: Path) -> None:
    write_pairs(tmp_path, 6, image=[b"broken"] * 6)
    with pytest.raises(RuntimeError, match=r"none of \d+ rows in a row is usable .*corrupt_image"):
        next(_batches(tmp_path, size=2))


def test_real_sets_as_they_are_mixed_by_weight() -> None:
    """Pictures and captions of three makers: every row of an epoch, none unusable."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there: real data are not part of the project")
    weights = {"openstax_alt": 0.25, "noto_emoji": 1.0, "clothing_small": 1.5}
    catalogs = [read_catalog(str(REAL / name / "train"), "data.train") for name in weights]
    catalog = mix(catalogs, list(weights.values()), "data.train")
    batches = train_batches(
        catalog,
        make_order(catalog, window_rows=1024, seed=0),
        _recipe(image_size=32),
        Cursor(digest=catalog.digest),
        world_size=1,
        rank=0,
        batch_size=32,
        ingest_cpus=1,
    )
    seen: Counter[int] = Counter()
    while sum(seen.values()) + 32 <= catalog.rows_an_epoch:
        batch = next(batches)
        assert not batch.bad
        assert all(image.std() > 0 for image in batch.images.float())
        seen.update(batch.keys.tolist())
    ends = np.cumsum([each.num_rows for each in catalogs])
    found = Counter(int(np.searchsorted(ends, key, side="right")) for key in seen.elements())
    for number, (each, weight) in enumerate(zip(catalogs, weights.values(), strict=True)):
        # The last batch that is not whole is not looked at.
        assert abs(found[number] - round(weight * each.num_rows)) < 32
    assert max(seen.values()) == 2
