"""The file for `ray up`: what Ray makes of it, and what it must promise."""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import boto3
import jsonschema
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
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


# ---- Ray's own code for EC2, against an EC2 that is played

IAM = {path.stem: json.loads(path.read_text()) for path in (CLUSTER / "iam").glob("*.json")}


def _actions(*policies: str) -> set[str]:
    found: set[str] = set()
    for policy in policies:
        for statement in IAM[policy]["Statement"]:
            action = statement["Action"]
            found |= {action} if isinstance(action, str) else set(action)
    return found


@pytest.fixture(scope="module")
def ec2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An account with what cluster/README.md makes in it before the first `ray up`."""
    with pytest.MonkeyPatch.context() as monkeypatch, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "none")
        # Ray writes the ssh key that it makes to ~/.ssh.
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for role in ("gammaray-head", "gammaray-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=role)
        client = boto3.client("ec2", region_name=CONFIG["provider"]["region"])
        [vpc] = client.describe_vpcs()["Vpcs"]
        name = CONFIG["provider"]["security_group"]["GroupName"]
        group = client.create_security_group(GroupName=name, Description="Ray", VpcId=vpc["VpcId"])[
            "GroupId"
        ]
        client.authorize_security_group_ingress(
            GroupId=group,
            IpPermissions=[
                {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
                {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22,
                 "IpRanges": [{"CidrIp": "192.0.2.1/32"}]},
            ],
        )  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def bootstrapped(ec2: Any) -> Json:
    """What `ray up` makes of the file before it starts the head."""
    config = copy.deepcopy(CONFIG)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        kind["node_config"]["ImageId"] = image
    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    validate_config(config)
    return AWSNodeProvider.bootstrap_config(config)


class TestEc2:
    def test_ray_finds_the_resources_of_the_types(self, bootstrapped: Json) -> None:
        types = bootstrapped["available_node_types"]
        assert types["head"]["resources"] == {"CPU": 0}
        for name in ("gpu_spot", "ingest"):
            gpus, cpus, _ = INSTANCES[types[name]["node_config"]["InstanceType"]]
            resources = types[name]["resources"]
            assert (resources.get("GPU", 0), resources["CPU"]) == (gpus, cpus)

    def test_only_known_addresses_reach_ssh(self, ec2: Any, bootstrapped: Json) -> None:
        groups = ec2.describe_security_groups()["SecurityGroups"]
        assert not any(group["GroupName"].startswith("ray-autoscaler") for group in groups)
        [ours] = [group for group in groups if group["GroupName"] == "gammaray"]
        for kind in bootstrapped["available_node_types"].values():
            assert kind["node_config"]["SecurityGroupIds"] == [ours["GroupId"]]
        ranges = [found["CidrIp"] for rule in ours["IpPermissions"] for found in rule["IpRanges"]]
        assert ranges == ["192.0.2.1/32"]

    def test_head_may_do_what_its_autoscaler_does(self, bootstrapped: Json) -> None:
        provider = AWSNodeProvider(bootstrapped["provider"], bootstrapped["cluster_name"])
        asked: set[str] = set()
        for resource in (provider.ec2, provider.ec2_fail_fast):
            resource.meta.client.meta.events.register(
                "before-call.ec2", lambda model, **_: asked.add(f"ec2:{model.name}")
            )
        kind = bootstrapped["available_node_types"]["gpu_spot"]
        tags = {"ray-node-type": "worker", "ray-node-name": "ray-gammaray-worker"}
        nodes = provider.create_node(kind["node_config"], tags, 1)
        [node] = provider.non_terminated_nodes({})
        provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
        provider.internal_ip(node)
        provider.terminate_nodes([node])

        assert asked <= _actions("head")
        assert {"ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances"} <= asked
        [instance] = nodes.values()
        assert instance.instance_lifecycle == "spot"
        assert {"Key": "ray-cluster-name", "Value": "gammaray"} in instance.tags


class TestRoles:
    def test_head_starts_the_workers_and_nothing_else(self) -> None:
        text = json.dumps(IAM["head"])
        types = {
            kind["node_config"]["InstanceType"] for name, kind in TYPES.items() if name != "head"
        }
        [start] = [
            found["Condition"]["StringEquals"]
            for found in IAM["head"]["Statement"]
            if found["Sid"] == "StartInstancesOfThisCluster"
        ]
        assert set(start["ec2:InstanceType"]) == types
        assert start["aws:RequestTag/ray-cluster-name"] == CONFIG["cluster_name"]
        worker = TYPES["gpu_spot"]["node_config"]["IamInstanceProfile"]["Name"]
        assert f"arn:aws:iam::ACCOUNT:role/{worker}" in text

    def test_name_no_action_by_pattern(self) -> None:
        assert not any("*" in action for action in _actions("head", "run"))
        for policy in ("head", "run"):
            for statement in IAM[policy]["Statement"]:
                if statement["Resource"] == "*":
                    # The only two that cannot be narrowed.
                    assert statement["Action"] in (
                        "ec2:DescribeInstances", "ecr:GetAuthorizationToken"
                    )  # fmt: skip

    def test_workers_reach_the_bucket_and_the_image_alone(self) -> None:
        assert {action.split(":")[0] for action in _actions("run")} == {"s3", "ecr"}


def test_nodes_may_use_docker_before_they_pull() -> None:
    """Ray keeps a connection open from before: what it may do does not follow the group."""
    docker, login = CONFIG["initialization_commands"]
    assert "chown ubuntu /var/run/docker.sock" in docker
    registry = CONFIG["docker"]["image"].split("/")[0]
    assert login.endswith(f"docker login --username AWS --password-stdin {registry}")
    assert f"--region {CONFIG['provider']['region']} " in login


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
    assert not re.search(r"AKIA|ASIA|aws_secret|ssh_private_key|password *[:=]", text)
