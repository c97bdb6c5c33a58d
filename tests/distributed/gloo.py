"""Runs a function in real gloo processes and gives what each rank returns."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(work: Callable[..., Any], world_size: int, *inputs: Any) -> list[Any]:
    """Call `work(*inputs)` in `world_size` gloo ranks; give their results in rank order.

    `work` must be importable (a module's top level). A failure in any rank fails the caller.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_rank, (world_size, port, folder, work, inputs), nprocs=world_size)
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
