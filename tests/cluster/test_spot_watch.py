"""The watcher of spot notices: against EC2's metadata service, a `ray` of ours, and a real Ray."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.cluster.imds import LIFE_CYCLE, NOTICE, Imds, serving
from tests.cluster.manifests import CLUSTER

WATCHER = CLUSTER / "spot_watch.py"
BIN = Path(sys.executable).parent
Found = TypeVar("Found")
STUB = """#!/bin/sh
printf '%s\\n' "$*" >> "$STUB_LOG"
[ "$(wc -l < "$STUB_LOG")" -gt "${STUB_FAILURES:-0}" ]
"""


@pytest.fixture
def imds() -> Iterator[Imds]:
    with serving() as service:
        yield service


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process of its own group; it and whatever is left of the group are ended."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, text=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()  # Ray ends what it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        assert process.stdin is not None
        process.stdin.close()


def _watcher(imds: Imds, log: Path, env: dict[str, str], *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:  # fmt: skip  # noqa: E501
    command = [sys.executable, str(WATCHER), "--every", "0.1", *options]
    # A proxy that does not exist: it must not be asked.
    settings = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url, "http_proxy": "http://127.0.0.1:9"}
    return _running(command, {**os.environ, **env, **settings}, log)


class Stub:
    """A `ray` on PATH that writes down what it is told, and fails the first times."""

    def __init__(self, folder: Path):
        (folder / "ray").write_text(STUB)
        (folder / "ray").chmod(0o755)
        self._log = folder / "calls"
        self.env = {"PATH": f"{folder}:/usr/bin:/bin", "STUB_LOG": str(self._log)}

    def calls(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


class TestNotice:
    def test_drains_once_with_the_time_that_is_left(
        self, imds: Imds, stub: Stub, tmp_path: Path
    ) -> None:
        log = tmp_path / "log"
        with _watcher(imds, log, stub.env, "--address", "10.0.0.1:6379") as watcher:
            imds.wait_until_asked(NOTICE, times=3)
            assert stub.calls() == []
            imds.give_notice(120)
            assert watcher.wait(30) == 0
        [call] = stub.calls()
        start = "drain-node --address 10.0.0.1:6379 --reason DRAIN_NODE_REASON_PREEMPTION "
        assert call.startswith(start)
        assert "--reason-message spot" in call
        # Ten seconds before the end, less what this took.
        assert 100 <= int(call.split("--deadline-remaining-seconds ")[1]) <= 110
        assert [status for _, status in imds.asked[:2]] == [
            200,
            200,
        ]  # a token, then the life cycle

    def test_tries_again_when_ray_refuses(self, imds: Imds, stub: Stub, tmp_path: Path) -> None:
        imds.give_notice(30)
        env = {**stub.env, "STUB_FAILURES": "2"}
        with _watcher(imds, tmp_path / "log", env) as watcher:
            assert watcher.wait(30) == 0
        assert len(stub.calls()) == 3
        assert (tmp_path / "log").read_text().count("ray drain-node ended with 1") == 2

    def test_gives_up_when_the_time_is_over(self, imds: Imds, stub: Stub, tmp_path: Path) -> None:
        imds.give_notice(5)
        env = {**stub.env, "STUB_FAILURES": "1000"}
        with _watcher(imds, tmp_path / "log", env) as watcher:
            assert watcher.wait(30) == 1
        assert "the instance's time is over" in (tmp_path / "log").read_text()
        assert stub.calls()[-1].endswith("--deadline-remaining-seconds 1")

    def test_other_instances_are_not_watched(self, imds: Imds, stub: Stub, tmp_path: Path) -> None:
        imds.life_cycle = "on-demand"
        with _watcher(imds, tmp_path / "log", stub.env) as watcher:
            assert watcher.wait(30) == 0
        assert imds.asked[-1] == (LIFE_CYCLE, 200)
        assert stub.calls() == []


class TestService:
    def test_renews_a_token_that_is_refused(self, imds: Imds, stub: Stub, tmp_path: Path) -> None:
        with _watcher(imds, tmp_path / "log", stub.env) as watcher:
            imds.wait_until_asked(NOTICE)
            imds.expire()
            imds.give_notice(60)
            assert watcher.wait(30) == 0
        assert (NOTICE, 401) in imds.asked
        assert sum(path == "/latest/api/token" for path, _ in imds.asked) == 2

    def test_survives_throttling_and_says_so_once(
        self, imds: Imds, stub: Stub, tmp_path: Path
    ) -> None:
        imds.throttled = 4
        with _watcher(imds, tmp_path / "log", stub.env) as watcher:
            imds.wait_until_asked(NOTICE, times=2)
            imds.give_notice(60)
            assert watcher.wait(30) == 0
        assert (tmp_path / "log").read_text().count("503") == 1

    def test_survives_a_notice_it_cannot_read(self, imds: Imds, stub: Stub, tmp_path: Path) -> None:
        imds.notice = "<html>"
        with _watcher(imds, tmp_path / "log", stub.env) as watcher:
            imds.wait_until_asked(NOTICE, times=3)
            imds.give_notice(60)
            assert watcher.wait(30) == 0
        assert len(stub.calls()) == 1


# ---- a real Ray of two nodes on this machine

LEASE = """
import sys, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, resources={"worker": 1})
class Work:
    def start(self):
        return ray.get_runtime_context().get_node_id()

work = Work.remote()
print("NODE", ray.get(work.start.remote()), flush=True)
sys.stdin.readline()
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def _start(folder: Path, *options: str) -> list[str]:
    names = ["runtime-env-agent-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    ports = [f"--{name}={port}" for name, port in zip(names, _free_ports(3), strict=True)]
    return [
        str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--num-gpus=0",
        "--node-ip-address=127.0.0.1", "--object-store-memory=80000000", f"--temp-dir={folder}",
        "--dashboard-agent-listen-port=0", *ports, *options,
    ]  # fmt: skip


def _until(found: Callable[[], Found | None], what: str, log: Path, seconds: float = 20) -> Found:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come in {seconds} s:\n{log.read_text()}")


def _states(address: str) -> dict[str, str]:
    """What the cluster's control service says of each node."""
    from ray._raylet import GcsClient
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    try:
        state = get_cluster_resource_state(GcsClient(address=address))
    except Exception:  # noqa: BLE001  it is not there yet, or no more
        return {}
    return {node.node_id.hex(): NodeStatus.Name(node.status) for node in state.node_states}


@pytest.mark.integration
def test_a_real_node_drains_and_leaves(imds: Imds, tmp_path: Path) -> None:
    """With work on it a node drains and stays; without, it leaves; the cluster does without it."""
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        # Sockets lie in there: the path must be short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="g", dir="/tmp")))
        port, dashboard, client = _free_ports(3)
        address = f"127.0.0.1:{port}"
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        head_options = (
            "--head", "--num-cpus=1", "--include-dashboard=false", f"--port={port}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        )  # fmt: skip
        stack.enter_context(_running(_start(folder, *head_options), env, log))
        [other] = _until(lambda: _states(address), "the head", log)
        worker_options = (f"--address={address}", "--num-cpus=1", '--resources={"worker": 1}')
        stack.enter_context(_running(_start(folder, *worker_options), env, log))
        _until(lambda: len(_states(address)) == 2, "the second node", log)

        lease_log = tmp_path / "lease"
        lease = stack.enter_context(_running([sys.executable, "-c", LEASE], env, lease_log))
        found = _until(lambda: re.search(r"NODE (\w+)", lease_log.read_text()), "work", lease_log)
        node = found.group(1)

        imds.give_notice(60)
        with _watcher(imds, log, env, "--node-id", node) as watcher:
            assert watcher.wait(30) == 0
        _until(lambda: _states(address).get(node) == "DRAINING", "the drain", log)
        assert lease.poll() is None  # its work may save what it has

        assert lease.stdin is not None
        lease.stdin.write("\n")
        lease.stdin.flush()
        _until(lambda: _states(address).get(node) == "DEAD", "the node's end", log)
        assert _states(address)[other] in ("IDLE", "RUNNING")

        # Without a node's name it is the one that the watcher runs on.
        with _watcher(imds, log, env) as watcher:
            assert watcher.wait(30) == 0
        _until(lambda: _states(address).get(other) == "DEAD", "the end of the other", log)
