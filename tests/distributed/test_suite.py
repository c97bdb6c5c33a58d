"""What is shown and what is probed is the same on all ranks, and that of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.ranks import run_ranks
from pipeline.config.schema import EvaluateConfig, LinearProbeTask
from pipeline.errors import RunStop
from pipeline.evaluate.embed import Embedded, Parts, embed_rows
from pipeline.evaluate.gallery import classified_cases, retrieval_cases
from pipeline.evaluate.retrieval import rank_by_contrast
from pipeline.evaluate.suite import RowSet, Suite, _probe, row_sets
from tests.tiny import tiny_batch, tiny_pairs, tiny_tokenizer

CPU = torch.device("cpu")
VAL = RowSet("val", "/t", "auto")
SHARES = [[4, 4, 4, 4, 3], [4, 4, 1]]  # for each rank the rows of its batches of four
PROBES = (
    LinearProbeTask(column="half", train="/t", shots=(3, 5)),
    LinearProbeTask(column="half", train="/t", modality="text"),
    LinearProbeTask(column="one", train="/t"),
)


def _forward(images: Tensor | None, tokens: Tensor | None) -> Parts:
    """Random projections; by a picture's corner, a text's words."""
    draw = torch.Generator().manual_seed(0)
    from_image, from_text = (torch.randn(n, 6, generator=draw) for n in (12, 8))
    return Parts(
        None if images is None else F.normalize(
            images[:, :2, :2].flatten(1).float() / 128 @ from_image - 1, dim=1),
        None if tokens is None else F.normalize(tokens.float() / 128 @ from_text - 1, dim=1),
    )  # fmt: skip


def _rows(shares: list[list[int]]) -> Embedded:
    batches = []
    for share in shares:
        for index, rows in enumerate(share):
            batch = tiny_batch(4, rows=rows, seed=100 * len(share) + index)
            half = ["dark" if image[0, 0, 0] < 128 else "light" for image in batch.images[:rows]]
            batch.labels = {"half": half, "one": ["all"] * rows}
            batches.append(batch)
    return embed_rows(_forward, iter(batches), tiny_pairs(4), CPU, keeps_pictures=True)


def _suite(probes: tuple[LinearProbeTask, ...]) -> Suite:
    anything: Any = None
    return Suite(
        config=EvaluateConfig(linear_probe=probes),
        catalog=anything,
        recipe=anything,
        classes=(),
        probed={},
        val=VAL,
        ingest_cpus=1,
    )


def _both(rows: Embedded) -> dict[RowSet, Embedded]:
    """The rows that a probe is fitted to and tested on."""
    return dict.fromkeys(row_sets(PROBES[0], VAL), rows)


def _found(shares: list[list[int]]) -> dict[str, Any]:
    rows = _rows(shares)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    ranks = rank_by_contrast(rows.image, rows.text, rows.owners)
    classes = F.normalize(torch.ones(2, 6) * torch.tensor([[1.0], [-1.0]]), dim=1)
    images, captions = retrieval_cases(rows, ranks, tiny_tokenizer())
    shown = classified_cases(rows, rows.labels["half"], ["dark", "light"], classes)
    with pytest.raises(RunStop, match="1 class"):
        dict(_probe(_suite(PROBES), _both(rows), world, rank))
    return {
        "probes": dict(_probe(_suite(PROBES[:2]), _both(rows), world, rank)),
        "answers": [(each.pictures.tolist(), each.said, each.answers) for each in shown],
        "images": [(each.text, each.pictures.tolist(), each.right, each.rank) for each in images],
        "captions": [(each.picture.tolist(), *each[1:]) for each in captions],
    }


@pytest.mark.distributed
def test_two_ranks_show_and_probe_what_one_process_does() -> None:
    """The second rank has fewer rows; a probe that cannot be fitted stops both."""
    one = _found(SHARES)
    assert all(one.values())
    first, second = run_ranks(_of_rank, 2)
    assert first == second == one


def _of_rank() -> dict[str, Any]:
    return _found([SHARES[dist.get_rank()]])
