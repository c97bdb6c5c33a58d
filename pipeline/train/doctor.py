"""Looks over the machine, and over what a config points to."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.losses.tiles import find_c_compiler
from pipeline.tracking.tracker import check_reachable, tracking_uri
from pipeline.train.preflight import read_train, read_val
from pipeline.train.store import RunFolder

PACKAGES = ("gammaray", "ray", "torch", "deepspeed", "pyarrow", "s3fs", "mlflow", "transformers")
MIN_SHARED_MEMORY = 2 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what was found, and what to do when it is not as it should be."""

    name: str
    found: str
    is_ok: bool
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def examine(config: Config | None) -> list[Finding]:
    """Check this machine and, given a config, its storage, tracker and data."""
    findings = list(_machine())
    if config is not None:
        findings.extend(_places(config))
    return findings


def _machine() -> Iterator[Finding]:
    version = platform.python_version_tuple()
    yield Finding(
        name="python",
        found=platform.python_version(),
        is_ok=(int(version[0]), int(version[1])) >= (3, 11),
        advice="" if int(version[1]) >= 11 else "use Python 3.11 or later",
    )
    for name in PACKAGES:
        try:
            yield Finding(name=name, found=importlib.metadata.version(name), is_ok=True)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name=name, found="not installed", is_ok=False, advice="pip install gammaray"
            )
    cpus = os.cpu_count() or 1
    yield Finding(name="CPUs", found=str(cpus), is_ok=True)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Finding(name="GPUs", found=", ".join(gpus) or "none: training runs on CPUs", is_ok=True)
    yield Finding(
        name="C compiler",
        found=find_c_compiler() or "none: on GPUs the loss of large local batches is not compiled",
        is_ok=True,
    )
    yield _shared_memory()


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding(name="shared memory", found="no /dev/shm here", is_ok=True)
    enough = free >= MIN_SHARED_MEMORY
    return Finding(
        name="shared memory",
        found=f"{free / 2**30:.1f} GiB free in /dev/shm",
        is_ok=enough,
        advice="" if enough else "Ray's object store lives there: docker run --shm-size=8g",
    )


def _places(config: Config) -> Iterator[Finding]:
    uri = tracking_uri(config.tracking.uri, config.cluster.storage)

    def describe_val() -> str:
        val = read_val(config)
        return "none" if val is None else val.describe()

    checks = {
        "storage": lambda: _storage(config),
        "tracker": lambda: _tracker(uri),
        "data.train": lambda: read_train(config).describe(),
        "data.val": describe_val,
    }
    for name, check in checks.items():
        try:
            yield Finding(name=name, found=check(), is_ok=True)
        except UserError as error:
            yield Finding(name=name, found=str(error), is_ok=False, advice="see the message")


def _storage(config: Config) -> str:
    RunFolder.of(config.cluster.storage, config.name).check_writable()
    return f"{config.cluster.storage} can be written"


def _tracker(uri: str) -> str:
    check_reachable(uri)
    return f"{uri} answers" if uri.startswith("http") else uri
