"""Ray's own autoscaler starts nodes for a run and takes them away; its nodes are processes here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.run_cli import (
    finish,
    kill_group,
    mlflow_runs,
    points,
    start,
    wait_for,
    write_run,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(900)]

PORT = 6379  # the one that Ray's provider of such nodes knows
MOST_NODES = 3
IDLE_MINUTES = 0.2
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


class _Head:
    """A head without CPUs, whose autoscaler may start nodes of 2 CPUs."""

    def __init__(self, folder: Path):
        import ray
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        with socket.create_server(("127.0.0.1", 0)) as probe:
            dashboard = probe.getsockname()[1]
        self.address = f"{ray.util.get_node_ip_address()}:{PORT}"
        nothing: dict[str, Any] = {
            name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter",
                                  "initialization_commands", "setup_commands",
                                  "head_setup_commands", "worker_setup_commands",
                                  "head_start_ray_commands", "worker_start_ray_commands")
        }  # fmt: skip
        config = {
            "cluster_name": "test",
            # Ray runs on such a node from the start: there is nothing to install over ssh.
            "provider": {"type": "external", "module": PROVIDER, "launch_multiple": True,
                         "head_node_id": FAKE_HEAD_NODE_ID, "disable_node_updaters": True},
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "upscaling_speed": 1.0,
            "file_mounts_sync_continuously": False,
            "max_workers": MOST_NODES,
            "idle_timeout_minutes": IDLE_MINUTES,
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": {"CPU": 2, "object_store_memory": 2**28},
                           "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES},
            },
            **nothing,
        }  # fmt: skip
        path = folder / "cluster.json"
        path.write_text(json.dumps(config))
        self._process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
                "--port", str(PORT), "--num-cpus", "0", "--dashboard-port", str(dashboard),
                "--autoscaling-config", str(path), "--object-store-memory", str(2**28),
            ],
            env=os.environ
            | {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                "RAY_AUTH_MODE": "disabled",
            },
            stdout=(folder / "head.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: self.nodes() == 0, 90)

    def nodes(self) -> int:
        """Raylets beside the head's; -1 before it is there."""
        names = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    names.append(process.name())
            except psutil.Error:
                continue
        return names.count("raylet") - 1

    def close(self) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=60)  # the next head wants the same port


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Head]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT} is taken, by another Ray cluster perhaps")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = _Head(tmp_path)
    yield found
    found.close()


def test_nodes_come_for_a_run_and_go_after_it(head: _Head, tmp_path: Path) -> None:
    """Two nodes are filled by the two workers, so reading needs a third; no fourth is allowed."""
    config = write_run(
        tmp_path,
        cluster={"address": head.address, "workers": {"min": 1, "max": 2, "check_every_s": 2},
                 "cpus_per_worker": 2, "ingest_cpus": 1},
    )  # fmt: skip
    driver = start("train", str(config), "train.epochs=20", "train.checkpoint_every=50")
    seen: set[int] = set()
    deadline = time.monotonic() + 600
    while driver.poll() is None and time.monotonic() < deadline:
        seen.add(head.nodes())
        time.sleep(0.2)
    if driver.poll() is None:
        kill_group(driver)
    output = finish(driver)
    assert max(seen) == MOST_NODES, output
    assert mlflow_runs(tmp_path / "runs") == ["FINISHED"]
    sizes = [size for _, size in points(tmp_path / "runs", "train/world_size")]
    assert sizes[-1] == 2
    assert set(sizes) <= {1, 2}
    wait_for(lambda: head.nodes() == 0, 60 * IDLE_MINUTES + 120)


def test_a_run_that_no_node_can_hold_says_what_is_missing(head: _Head, tmp_path: Path) -> None:
    config = write_run(
        tmp_path, cluster={"address": head.address, "workers": 1, "cpus_per_worker": 64}
    )
    driver = start("train", str(config))
    assert driver.stdout is not None
    output = ""
    for line in driver.stdout:
        output += line
        if "waiting for nodes" in line:
            break
    driver.send_signal(signal.SIGINT)
    output += driver.communicate(timeout=120)[0]
    log = [path.read_text() for path in (tmp_path / "runs" / "logs").glob("*")]
    assert driver.returncode == 130, (output, log)
    assert "waiting for nodes" in output, (output, log)
    assert "did not end" not in output, (output, log)
    assert head.nodes() == 0, "nothing is started that would not help"
