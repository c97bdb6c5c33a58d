"""Ray Data streams: pieces of the order -> blocks of decoded, tokenised rows.

Each training worker runs its own stream over its share of the order, with block order preserved.
Reading, decoding and tokenising happen in Ray Data's tasks, which import this module.
Must not know: batches, torch (tasks start sooner and smaller without).
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data._internal.usage.actor import get_or_create_usage_collection_actor
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayTaskError

from pipeline.data.decode import Decode, ReadPiece, Recipe
from pipeline.data.layout import Catalog
from pipeline.data.memory import keep_freed_memory
from pipeline.data.order import Order, Piece

BLOCK_BYTES = 32 * 2**20  # a decoded block: small enough for a quick first batch
REST_SECONDS = 0.02  # while blocks wait to be taken; a batch takes longer to train on
PIECES_PER_EXECUTION = 512  # read tasks planned at once; bounds the plan of a web-scale epoch


def start_ray_data_here() -> None:
    """Start Ray Data's own actors on this node, before a worker's stream would start them.

    They stay on the node that asks first, for as long as the cluster lives, and no autoscaler takes
    a node away while an actor is on it.
    """
    get_or_create_stats_actor()
    get_or_create_usage_collection_actor()


class _Rest(ExecutionCallback):
    """Ray Data's loop sleeps while there is something to take.

    When its tasks wait for room it would go round without a pause, in a thread of the trainer's
    process, and take a good part of a core from training.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called after each turn of the loop."""
        if not executor._consumer_idling():
            time.sleep(REST_SECONDS)


def decoded_blocks(
    catalog: Catalog,
    order: Order,
    recipe: Recipe,
    pieces: Iterator[Piece],
    world_size: int,
    ingest_cpus: float,
) -> Iterator[dict[str, Any]]:
    """Run Ray Data over `pieces`, a bounded number at a time; give decoded blocks in order.

    Raises RuntimeError of a read that failed, with the task's own words.
    """
    keep_freed_memory()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    # A long evaluation or checkpoint leaves the stream idle; idleness is no error.
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_Rest]
    store = ray.cluster_resources().get("object_store_memory", 2**30)
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=0.25 * store / world_size
    )
    # A paused task keeps its CPUs, and each worker may have two streams open (training's pauses
    # while evaluation reads): all of them must fit into ingest_cpus at once, or they wait forever.
    concurrency = max(1, int(ingest_cpus // world_size))
    # One more than CPUs: none is idle while a task ends and the next one begins.
    concurrency += concurrency > 1
    # Rounded down: Ray rounds to four places, and what is rounded up does not fit.
    share = math.floor(1e4 * ingest_cpus / (2 * world_size * concurrency)) / 1e4
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1
    while planned := list(itertools.islice(pieces, PIECES_PER_EXECUTION)):
        tasks = [ReadPiece.of(catalog, order, piece, recipe.labels) for piece in planned]
        dataset = ray.data.read_datasource(
            _Pieces(tasks, Decode(recipe)),
            override_num_blocks=len(tasks),
            num_cpus=share,
            concurrency=min(concurrency, len(tasks)),
        )
        iterator: Any = dataset.iterator()
        try:
            # No batch size: whole blocks, zero-copy; batches are cut here, where bad rows drop out.
            yield from iterator.iter_batches(
                batch_size=None, batch_format="numpy", prefetch_batches=2
            )
        except RayTaskError as error:
            # Ray wraps what a task raised in frames and advice of its own.
            said = [line.removeprefix(_RAISED) for line in str(error).splitlines()
                    if line.startswith(_RAISED)]  # fmt: skip
            raise RuntimeError(said[-1] if said else str(error)) from error


_RAISED = "RuntimeError: "


@dataclass(frozen=True, slots=True)
class _DecodePiece:
    """Reads and decodes a piece, in one go: between two operators Ray would copy every picture."""

    read: ReadPiece
    decode: Decode

    def __call__(self) -> Iterator[Block]:
        keep_freed_memory()
        for rows in self.read():
            yield BlockAccessor.batch_to_block(self.decode(rows))


class _Pieces(Datasource):
    """One task per piece."""

    def __init__(self, tasks: list[ReadPiece], decode: Decode):
        super().__init__()
        self._tasks = tasks
        self._decode = decode

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                _DecodePiece(task, self._decode),
                BlockMetadata(
                    num_rows=task.rows, size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for task in self._tasks
        ]
