"""Tasks on Ray Data.

Enters: a function and items. Leaves: the results as they come, or `JobFailed`.
The one file here that knows Ray. Must not know: what the tasks do.
"""

import json
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from pipeline.data.connect import connecting

TASKS_PLANNED = 4096
CPUS_EACH = 4  # of a keeper on CPUs, at most: more threads than that gain little in one
RESTARTS = 3  # of a keeper, and tries more of an item that ended it
CALLS_AT_ONCE = 2  # in a keeper: while one item ends, the next begins

Function = Callable[[Any], dict[str, Any]]


class JobFailed(Exception):
    """The job failed; the same command goes on with what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keepers:
    """Processes that are given the function once, for one that is large: how many, with what each.

    Left at 0, `count` is one for each GPU there is, else as many as the CPUs allow. With `on_gpu`
    each has a GPU even if none is there yet.
    """

    count: int = 0
    on_gpu: bool = False


class OnRay:
    """Runs a function over items as Ray Data tasks, one each, and gives results as they come.

    Uses the Ray of this process; else joins the cluster a job was submitted to (RAY_ADDRESS), else
    starts one on this machine. Leaving the context ends what it began. With `keepers` tasks run in
    these.
    """

    def __init__(self, keepers: Keepers | None = None) -> None:
        self._is_mine = False
        self._keepers = keepers

    def __enter__(self) -> "OnRay":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_mine:
            ray.shutdown()

    def __call__(self, function: Function, items: list[Any]) -> Iterator[dict[str, Any]]:  # noqa: D102  as Runner
        if not items:
            return
        self._start()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # they would tear the command's own
        context.execution_options.preserve_order = False
        if hasattr(context, "execution_no_progress_timeout_s"):
            context.execution_no_progress_timeout_s = -1  # a part may be one huge tar
        apply = self._in_tasks(function) if self._keepers is None else self._in_keepers(function)
        try:
            for start in range(0, len(items), TASKS_PLANNED):
                some = [{"item": pickle.dumps(item)} for item in items[start:][:TASKS_PLANNED]]
                dataset = apply(ray.data.from_items(some, override_num_blocks=len(some)))
                for row in dataset.iter_rows():
                    if row["error"]:
                        raise JobFailed(row["error"])
                    yield json.loads(row["result"])
        except RayError as error:
            raise JobFailed(f"Ray: {str(error).strip().splitlines()[0]}") from error

    def _in_tasks(self, function: Function) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
        return lambda items: items.map(lambda row: _attempt(function, row))

    def _in_keepers(self, function: Function) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
        assert self._keepers is not None, "it is asked for with them"
        held = [ray.put(function)]  # in a list, or Ray would hand over a copy with every call
        cpus, gpus, count = _shares(self._keepers)
        keeper: Any = _Keeper  # Ray types `map` for functions alone

        def apply(items: ray.data.Dataset) -> ray.data.Dataset:
            pool = ray.data.ActorPoolStrategy(
                size=count,
                max_concurrent_calls_per_actor=CALLS_AT_ONCE,
                enable_true_multi_threading=True,
            )
            return items.map(
                keeper,
                fn_constructor_args=(held,),
                compute=pool,
                num_cpus=cpus,
                num_gpus=gpus,
                max_restarts=RESTARTS * count,
                max_task_retries=RESTARTS,  # Ray's own is for ever: a deadly item would stall
            )

        return apply

    def _start(self) -> None:
        if ray.is_initialized():
            return
        self._is_mine = True
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        remedy = "unset it to use this machine, or start one with `ray start --head`"
        with connecting("RAY_ADDRESS: no Ray cluster to work on", remedy):
            if "RAY_ADDRESS" in os.environ:
                ray.init(**quiet)
            else:
                ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)


class _Keeper:
    """A process that keeps the function. OMP_NUM_THREADS says its CPUs, as Ray sets it."""

    def __init__(self, held: list[Any]):
        self._function: Function = ray.get(held[0])

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _attempt(self._function, row)


def _attempt(function: Function, row: dict[str, Any]) -> dict[str, Any]:
    """An error is a result like others: Ray would bury it in its own frames."""
    try:
        return {"result": json.dumps(function(pickle.loads(row["item"]))), "error": ""}
    except RuntimeError as error:
        return {"result": "", "error": str(error)}
    except Exception as error:  # noqa: BLE001  whatever it is, it stops the job
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {"result": "", "error": f"{type(error).__name__} at {place}: {error}"}


def _shares(keepers: Keepers) -> tuple[int, int, int]:
    """CPUs and GPUs of each keeper, and how many there are."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if any(gpus):
        # A node's CPUs are shared evenly by its GPUs: they decode.
        each = min(cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu)
        return max(1, each), 1, keepers.count or sum(gpus)
    if keepers.on_gpu:
        return CPUS_EACH, 1, keepers.count or 1
    most = sum(cpus) // keepers.count if keepers.count else max(cpus)
    each = max(1, min(CPUS_EACH, most))
    return each, 0, keepers.count or max(1, sum(cpu // each for cpu in cpus))
