"""Real gloo processes on one machine: a function in each, and the bytes it receives."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def run_ranks(work: Callable[..., Any], world_size: int, *inputs: Any) -> list[Any]:
    """Call `work(*inputs)` in `world_size` gloo ranks; give their results in rank order.

    `work` must be importable (a module's top level). A failure in any rank fails the caller.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        spawn(_rank, (world_size, port, folder, work, inputs), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, folder: str, work: Callable[..., Any], inputs: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
    }
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        result = work(*inputs)
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Wire(TorchDispatchMode):
    """Counts the bytes this rank receives from others in what runs under it.

    A reduce-scatter counts what the parts summed for this rank weigh, an all-reduce twice that
    (it is a reduce-scatter and an all-gather).
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.received += _received(func.name().split("::")[1], args)
        return func(*args, **(kwargs or {}))


def _received(name: str, args: Any) -> int:
    """Bytes a rank receives in a c10d operation, whose arguments hold outputs, then inputs."""
    world_size = dist.get_world_size()
    if name.startswith("recv"):
        return _weight(args[0])
    if name.startswith(("send", "barrier")):
        return 0
    if name.startswith("allreduce"):
        return 2 * _weight(args[0]) * (world_size - 1) // world_size
    if name.startswith(("allgather", "_allgather")):
        return _weight(args[0]) * (world_size - 1) // world_size
    if name.startswith(("reduce_scatter", "_reduce_scatter")):
        return _weight(args[0]) * (world_size - 1)
    raise NotImplementedError(f"no rule for the bytes of c10d::{name}")


def _weight(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
