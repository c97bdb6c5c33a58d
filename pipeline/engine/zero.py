"""DeepSpeed ZeRO behind a few methods, the same on CPU (gloo) and CUDA (NCCL).

Enters: a module, optimiser settings, an initialised process group. Leaves: forward, backward,
step, save, load. Must not know: what the module computes.
"""

import argparse
import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.schema import EngineConfig, OptimConfig
from pipeline.engine.optimizer import make_optimizer, parameter_groups

TAG = "state"
GATHERED = 2**24  # elements of parameters made whole at once
UNIVERSAL = "universal"  # the same state, in the form that any number of workers can load


class Engine:
    """One model under ZeRO. Every method but the constructor's inputs is the same at every stage.

    All ranks must call `__call__`, `backward`, `step`, `save`, `load` and the reductions equally
    often and in the same order.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        engine: EngineConfig,
        optim: OptimConfig,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
        loads_universal: bool = False,
    ):
        """`micro_batch` pairs per worker in a forward, `accumulation` of them per step.

        `layout`: the parameters' names in the order in which ZeRO lays them end to end, by group.

        `loads_universal`: what `load` will read was saved by another number of workers.
        """
        deepspeed = _import_deepspeed(device)
        self.device = device
        self.zero_stage = engine.zero_stage
        self._is_bf16 = engine.precision == "bf16"
        # At stage 0 nothing is partitioned: every worker reads the same file.
        self._loads_universal = loads_universal and engine.zero_stage > 0
        module.to(device)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optim.grad_clip,
            "zero_optimization": {
                "stage": engine.zero_stage,
                # False would drop gradients on CPU in some versions.
                "contiguous_gradients": True,
                "overlap_comm": device.type == "cuda",
            },
            "bf16": {"enabled": engine.precision == "bf16"},
            "steps_per_print": 10**12,
            "checkpoint": {"load_universal": self._loads_universal},
        }
        groups = parameter_groups(module, optim)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.layout = [[names[id(each)] for each in group["params"]] for group in groups]
        optimizer = make_optimizer(groups, optim, device)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings
        )

    @property
    def loads_by_name(self) -> bool:
        """Whether `load` finds each parameter by its name, not by its place in the `layout`."""
        return self._loads_universal

    @property
    def module(self) -> nn.Module:
        """The module; call the engine, not this, to run it."""
        return self._engine.module

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Run the module's forward."""
        return self._engine(*inputs)

    def whole_parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Give each parameter named `prefix`... without the prefix, whole while it is looked at.

        To be gone through to the end by all ranks: at stage 3 they are gathered, some at a time.
        """
        import deepspeed

        chosen = [
            (name.removeprefix(prefix), parameter)
            for name, parameter in self._engine.module.named_parameters()
            if name.startswith(prefix)
        ]
        for part in _parts_of(chosen, GATHERED):
            parameters = [parameter for _, parameter in part]
            with deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3):
                yield from ((name, parameter.detach()) for name, parameter in part)

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` / accumulation to the step's gradient."""
        self._engine.backward(loss)

    def step(self, lr_factor: float) -> float | None:
        """Count one micro batch; at the last of the step update, with all rates times `lr_factor`.

        Gives the gradient norm before clipping after an update, else None.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        norm = self._unpartitioned_norm()
        if norm is not None and not bool(norm.isfinite()):
            self._leave_weights()
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return float("nan") if norm is None else float(norm)

    def _leave_weights(self) -> None:
        """Make the coming update move nothing; stages 1 to 3 skip such a step by themselves."""
        for parameter in self._engine.module.parameters():
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0

    def _unpartitioned_norm(self) -> Tensor | None:
        """The gradient norm where DeepSpeed keeps none: stage 0 without a master copy."""
        if self.zero_stage > 0 or self._is_bf16:
            return None
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def save(self, folder: Path) -> None:
        """Write this rank's part of the state under `folder`."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote at the same ZeRO stage.

        Of another number of workers only with `loads_universal`; `folder` then gets a converted
        copy, made by one worker of each node.
        """
        if self._loads_universal:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                make_universal(folder)
            dist.barrier()
        tag = UNIVERSAL if self._loads_universal else TAG
        groups = [_without_parameters(group) for group in self._optimizer.param_groups]
        with _plainly_named(folder) as named:
            path, _ = self._engine.load_checkpoint(str(named), tag=tag)
        if path is None:
            raise RuntimeError(f"{folder}: no DeepSpeed state in the checkpoint")
        if self._loads_universal:
            # At stage 3 DeepSpeed gives all groups the settings of the first, and all parameters
            # one and the same step counter, which each of them then advances.
            for group, settings in zip(self._optimizer.param_groups, groups, strict=True):
                group.update(settings)
            for state in self._optimizer.state.values():
                state["step"] = state["step"].clone()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a small vector over ranks."""
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks."""
        values = torch.tensor([value], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; every rank gets the same answer."""
        return bool(self.sum(torch.tensor([float(flag)])).item() > 0)


def _parts_of(
    named: Sequence[tuple[str, nn.Parameter]], most: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Cut into runs of at most so many elements, or of one parameter."""
    part: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        count = getattr(parameter, "ds_numel", parameter.numel())  # of the whole, if partitioned
        if part and size + count > most:
            yield part
            part, size = [], 0
        part.append((name, parameter))
        size += count
    if part:
        yield part


def gather(value: Any) -> list[Any]:
    """Give every rank's `value`, any object that can be pickled, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _import_deepspeed(device: torch.device) -> Any:
    """Import late: in a process without its accelerator the import itself would choose wrongly."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        from deepspeed import ops

        # DeepSpeed would compile a shared-memory all-reduce, which training does not use, and so
        # need a C++ compiler on every node. With CUDA it has none, and to look at this table makes
        # it probe the compiler and the GPU for every operator there is.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def make_universal(folder: Path) -> None:
    """Convert what `Engine.save` wrote to the form that any number of workers can load.

    Kept beside it, and made once. Runs in one process; stage 0 needs none.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    target = folder / UNIVERSAL
    if target.exists():
        return
    unfinished = Path(tempfile.mkdtemp(prefix=f".{UNIVERSAL}-", dir=folder))
    with _plainly_named(folder) as named:
        main(
            argparse.Namespace(
                input_folder=str(named / TAG),
                output_folder=str(named / unfinished.name),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # asked for by models that are not Megatron's
            )
        )
    try:
        unfinished.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(unfinished)  # a node that shares the folder was faster


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """The folder by a name without brackets and the like: DeepSpeed takes paths for patterns."""
    with tempfile.TemporaryDirectory() as plain:
        named = Path(plain) / "checkpoint"
        named.symlink_to(folder.absolute())
        yield named


def load_weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    """Read the module's weights, as fp32, from what `Engine.save` wrote, at any world size.

    They are the optimiser's fp32 masters, but for stage 0, which saves what the forward uses (in
    bf16: rounded). `zero_stage` is the stage it was saved under. Runs in one process, without an
    engine.
    """
    _import_deepspeed(torch.device("cpu"))
    if zero_stage == 0:
        # Our own checkpoint; DeepSpeed's file holds more than tensors.
        state = torch.load(
            folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
        )
        return {name: tensor.float() for name, tensor in state["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()  # its progress, in whatever program reads the weights
    with (
        _plainly_named(folder) as named,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(named), tag=TAG)
    assert weights is not None, "DeepSpeed gives None only where it merges files in place"
    return weights
