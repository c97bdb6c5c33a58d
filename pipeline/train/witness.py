"""What happens in Ray Train's controller, and which actor it is, told to the driver.

A resize waits until all is saved.

The hooks are Ray Train's own, some of them internal to it: the version of Ray is pinned.
"""

import time
from typing import Any

import ray
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, TrainControllerState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from pipeline.train.board import Board
from pipeline.train.loop import Wish

RESIZE_PATIENCE = 300.0  # seconds for the workers to save; then they are stopped all the same


class Trainer(TorchTrainer):
    """Ray Train's, which at the end does not wait for an answer of a dashboard that is not there.

    What gives back the workers' resources after a controller that died asks the dashboard whether
    it lives. Without one, as in a Ray that `gammaray train` starts, the driver's end does it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if get_dashboard_url():
            return callbacks
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]


class Failures(UserCallback):
    """Posts why workers failed."""

    def __init__(self, board: Board):
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called for what a poll of the workers finds."""
        del run_context
        self._board.post("failed", message=blame(worker_exceptions))


def blame(exceptions: dict[int, Exception]) -> str:
    """The first cause among what the ranks raised: one that died takes the others with it."""
    order = sorted(exceptions, key=lambda rank: (not _is_dead(exceptions[rank]), rank))
    rank = order[0]
    lines = [line.strip() for line in str(exceptions[rank]).splitlines() if line.strip()]
    if _is_dead(exceptions[rank]):
        return f"worker {rank} died: {lines[0] if lines else 'no message'}"
    return f"worker {rank}: {lines[-1] if lines else type(exceptions[rank]).__name__}"


def _is_dead(error: BaseException) -> bool:
    return isinstance(error, RayActorError) or isinstance(error.__cause__, RayActorError)


class Introduction(ControllerCallback):
    """Tells the driver which actor the controller is, so that it can be ended."""

    def __init__(self, board: Board):
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called before the controller asks for workers."""
        del train_run_context
        self._board.post("controller", actor=ray.get_runtime_context().current_actor)


class PlannedResize(ControllerCallback):
    """Before Ray Train stops healthy workers to start another number, lets them save."""

    def __init__(self, board: Board):
        self._board = board

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called at every change; a planned resize is the one from running to resizing."""
        del previous_state
        if not isinstance(current_state, ResizingState):
            return
        decision = current_state.scaling_decision
        assert isinstance(decision, ResizeDecision), "there is no other to this state"
        self._board.post("resizing", workers=decision.num_workers)
        self._board.ask(Wish.MOVE)
        deadline = time.monotonic() + RESIZE_PATIENCE
        while not self._board.has_left() and time.monotonic() < deadline:
            time.sleep(0.5)
