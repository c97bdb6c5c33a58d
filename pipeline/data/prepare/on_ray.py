"""Tasks on Ray Data.

Enters: a function and items. Leaves: the results as they come, or `PrepareFailed`.
The one file here that knows Ray. Must not know: what the tasks do.
"""

import json
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from pipeline.errors import UserError

TASKS_PLANNED = 4096


class PrepareFailed(Exception):
    """The job failed; the same command goes on with what is missing."""


class OnRay:
    """Runs a function over items as Ray Data tasks, one each, and gives results as they come.

    Uses the Ray of this process; else joins the cluster a job was submitted to (RAY_ADDRESS), else
    starts one on this machine. Leaving the context ends what it began.
    """

    def __init__(self) -> None:
        self._is_mine = False

    def __enter__(self) -> "OnRay":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_mine:
            ray.shutdown()

    def __call__(  # noqa: D102  as Runner
        self, function: Callable[[Any], dict[str, Any]], items: list[Any]
    ) -> Iterator[dict[str, Any]]:
        if not items:
            return
        self._start()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # they would tear the command's own
        context.execution_options.preserve_order = False
        if hasattr(context, "execution_no_progress_timeout_s"):
            context.execution_no_progress_timeout_s = -1  # a part may be one huge tar

        def call(row: dict[str, Any]) -> dict[str, Any]:
            # An error is a result like others: Ray would bury it in its own frames.
            try:
                return {"result": json.dumps(function(pickle.loads(row["item"]))), "error": ""}
            except RuntimeError as error:
                return {"result": "", "error": str(error)}
            except Exception as error:  # noqa: BLE001  whatever it is, it stops the job
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                return {"result": "", "error": f"{type(error).__name__} at {place}: {error}"}

        try:
            for start in range(0, len(items), TASKS_PLANNED):
                some = [{"item": pickle.dumps(item)} for item in items[start:][:TASKS_PLANNED]]
                dataset = ray.data.from_items(some, override_num_blocks=len(some)).map(call)
                for row in dataset.iter_rows():
                    if row["error"]:
                        raise PrepareFailed(row["error"])
                    yield json.loads(row["result"])
        except RayError as error:
            raise PrepareFailed(f"Ray: {str(error).strip().splitlines()[0]}") from error

    def _start(self) -> None:
        if ray.is_initialized():
            return
        self._is_mine = True
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            if "RAY_ADDRESS" in os.environ:
                ray.init(**quiet)
            else:
                ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS: no Ray cluster to work on ({error}); unset it to use this machine, "
                "or start one with `ray start --head`"
            ) from error
