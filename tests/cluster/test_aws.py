"""The file for `ray up`: what Ray makes of it, and what it must promise."""

import copy
import re
import shlex
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.manifests import CLUSTER, Json, read

[CONFIG] = read(CLUSTER / "aws.yaml")
TYPES = CONFIG["available_node_types"]
# Of the instance types: GPUs, CPUs, GB of memory. EC2 is not asked.
INSTANCES = {"m7i.2xlarge": (0, 8, 32), "g6.12xlarge": (4, 48, 192), "c7i.8xlarge": (0, 32, 64)}


def _options(name: str) -> list[str]:
    """Give the words of `docker run` for a node of type `name`."""
    docker = CONFIG["docker"]
    own = (
        docker["head_run_options"]
        if name == "head"
        else TYPES[name]["docker"]["worker_run_options"]
    )
    return shlex.split(" ".join(docker["run_options"] + own))


def _start(name: str) -> str:
    return " ; ".join(CONFIG[f"{'head' if name == 'head' else 'worker'}_start_ray_commands"])


class TestSchema:
    def test_ray_takes_it(self) -> None:
        prepared = prepare_config(copy.deepcopy(CONFIG))
        validate_config(prepared)
        # Nothing is left of Ray's defaults, which install a nightly build on every node.
        assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []
        assert prepared["file_mounts"] == CONFIG["file_mounts"]

    def test_fields_that_ray_does_not_know_are_found(self) -> None:
        broken: Any = copy.deepcopy(CONFIG)
        broken["available_node_types"]["gpu_spot"]["max_worker"] = 4
        with pytest.raises(jsonschema.ValidationError, match="max_worker"):
            validate_config(prepare_config(broken))


class TestNodes:
    def test_limit_is_that_of_the_types(self) -> None:
        assert CONFIG["max_workers"] == sum(kind["max_workers"] for kind in TYPES.values())
        assert all(kind["min_workers"] == 0 for kind in TYPES.values())

    def test_head_takes_no_work_and_is_not_spot(self) -> None:
        head = TYPES[CONFIG["head_node_type"]]
        assert head["resources"] == {"CPU": 0}
        assert head["max_workers"] == 0
        assert "InstanceMarketOptions" not in head["node_config"]

    def test_gpus_are_spot_and_ingest_is_not(self) -> None:
        market = TYPES["gpu_spot"]["node_config"]["InstanceMarketOptions"]
        assert market == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in TYPES["ingest"]["node_config"]
        assert CONFIG["provider"]["cache_stopped_nodes"] is False

    def test_hold_the_run_of_the_example(self, example: Any) -> None:
        gpus, cpus = _largest()
        assert gpus >= example.max_workers * example.gpus_per_worker
        assert cpus >= example.max_workers * example.cpus_per_worker + example.ingest_cpus

    def test_size_in_the_comment_is_true(self) -> None:
        text = (CLUSTER / "aws.yaml").read_text()
        [(gpus, cpus)] = re.findall(r"(\d+) GPUs, (\d+) CPUs\.", text)
        assert (int(gpus), int(cpus)) == _largest()

    @pytest.mark.parametrize("name", TYPES)
    def test_machines_are_closed(self, name: str) -> None:
        node: Json = TYPES[name]["node_config"]
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
        # Whoever runs this must choose: an AMI belongs to a region, a profile to an account.
        assert node["ImageId"] == "ami-00000000000000000"
        assert set(node["IamInstanceProfile"]) == {"Name"}


def _largest() -> tuple[int, int]:
    sizes = [
        (kind["max_workers"], *INSTANCES[kind["node_config"]["InstanceType"]])
        for kind in TYPES.values()
    ]
    return sum(n * gpus for n, gpus, _, _ in sizes), sum(n * cpus for n, _, cpus, _ in sizes)


@pytest.mark.parametrize("name", TYPES)
class TestContainers:
    def test_ask_for_a_token(self, name: str) -> None:
        assert "RAY_AUTH_MODE=token" in _options(name)
        assert list(CONFIG["file_mounts"]) == ["/home/ray/.ray/auth_token"]

    def test_have_no_privileges(self, name: str) -> None:
        options = _options(name)
        assert options[options.index("--cap-drop") + 1] == "ALL"
        assert options[options.index("--security-opt") + 1] == "no-new-privileges"
        assert "--privileged" not in options

    def test_shared_memory_holds_the_object_store(self, name: str) -> None:
        [size] = [word for word in _options(name) if word.startswith("--shm-size=")]
        gigabytes = int(size.removeprefix("--shm-size=").removesuffix("g"))
        memory = INSTANCES[TYPES[name]["node_config"]["InstanceType"]][2]
        assert 0.3 * memory <= gigabytes <= 0.5 * memory

    def test_see_gpus_where_there_are_some(self, name: str) -> None:
        has_gpus = INSTANCES[TYPES[name]["node_config"]["InstanceType"]][0] > 0
        assert ("--gpus=all" in _options(name)) == has_gpus


def test_image_is_the_projects(version: str) -> None:
    assert CONFIG["docker"]["image"] == f"REGISTRY/gammaray:{version}"


def test_dashboard_listens_on_loopback() -> None:
    assert "--dashboard-host=127.0.0.1" in _start("head")
    assert "0.0.0.0" not in _start("head")


def test_workers_are_watched() -> None:
    assert "flock --nonblock /tmp/spot_watch.lock spot_watch.py" in _start("worker")
    order = _start("worker")
    assert order.index("ray start") < order.index("spot_watch.py")


def test_holds_no_secret() -> None:
    text = (CLUSTER / "aws.yaml").read_text()
    assert not re.search(r"AKIA|ASIA|aws_secret|ssh_private_key|password", text)
