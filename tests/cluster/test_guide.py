"""The guide: what its commands name exists, and what they say is said in words that are taken."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.config.load import load_config
from tests.cluster.manifests import CLUSTER, KUBERAY, ROOT, kubernetes_objects, pinned, read

TEXT = (CLUSTER / "README.md").read_text()
FENCE = re.compile(r"^( *)```sh\n(.*?)^ *```$", re.M | re.S)
BLOCKS = [
    re.sub(f"(?m)^{found[1]}", "", found[2]).replace("\\\n", " ") for found in FENCE.finditer(TEXT)
]
PROSE = FENCE.sub("", TEXT)
INLINE = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", PROSE)]
SHELL = "\n".join(BLOCKS)
# Templates by folder, as the two functions `fill` of the guide take them.
FILLED = {
    CLUSTER / "iam": set(re.findall(r"\(fill (\w+)", SHELL)),
    KUBERAY: set(re.findall(r"(?m)^fill (\w+)", SHELL)),
}
# A command ends with its line, at a pipe or a bracket, or where its output goes elsewhere.
COMMANDS = [
    command.strip()
    for line in (*SHELL.splitlines(), *INLINE)
    for command in re.split(r"[;|()]|[12]?>", re.sub(r"\{min: 4, max: 8\}", "RANGE", line))
]


def _words(program: str) -> list[list[str]]:
    """What `program` is told, in blocks and in the text, where it is told anything."""
    found = [shlex.split(text) for text in COMMANDS if text.startswith(f"{program} ")]
    return [words[1:] for words in found]


def _parse(cli: Any, words: list[str]) -> None:
    """Have a click command take `words`, without running it. Raises what it would refuse with."""
    command, name, rest, context = cli, "cli", list(words), None
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        name, command, rest = command.resolve_command(context, rest)
        if command is None:
            raise LookupError(f"No such command among those of {context.info_name}: {words}")
    if rest:
        command.make_context(name, rest, parent=context)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


class TestCommands:
    @pytest.mark.parametrize("block", BLOCKS)
    def test_blocks_are_shell(self, block: str) -> None:
        done = subprocess.run(
            ["bash", "-n"], input=block, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def test_gammaray_takes_them(self) -> None:
        from typer.main import get_command

        from pipeline.cli import app

        # In the text a command may stand for itself, without what it needs.
        told = [words for words in _words("gammaray") if len(words) > 1 or words == ["jobs"]]
        for words in told:
            _parse(get_command(app), [word.replace("CONFIG", _config()) for word in words])
        taken = {words[0] for words in told}
        assert taken == {
            "submit",
            "jobs",
            "status",
            "logs",
            "stop",
            "checkpoints",
            "doctor",
            "train",
        }

    def test_ray_takes_them(self) -> None:
        from ray.scripts.scripts import cli

        told = _words("ray")
        for words in told:
            _parse(cli, [*words, "my-cluster.yaml"] if words in (["up"], ["down"]) else words)
        assert {"start", "stop", "up", "down", "exec", "dashboard", "monitor"} <= {
            words[0] for words in told
        }

    def test_what_they_do_not_take_is_found(self) -> None:
        from ray.scripts.scripts import cli
        from typer.main import get_command

        from pipeline.cli import app

        for command, words in (
            (get_command(app), ["submit", _config(), "--adress", "x"]),
            (get_command(app), ["sumbit", _config()]),
            (cli, ["start", "--haed"]),
        ):
            # Typer brings a click of its own, with errors of its own.
            with pytest.raises(Exception, match=r"No such (option|command)"):
                _parse(command, words)

    def test_overrides_are_taken_by_the_config(self) -> None:
        [submit] = [words for words in _words("gammaray") if words[0] == "submit"]
        config, *rest = (word for word in submit[1:] if not word.startswith("-"))
        overrides = [word.replace("RANGE", "{min: 4, max: 8}") for word in rest if "=" in word]
        assert len(overrides) == 5
        run = load_config(ROOT / config, overrides)
        assert (run.cluster.min_workers, run.cluster.max_workers) == (4, 8)
        assert f"/{run.name} --verify" in SHELL


def _config() -> str:
    return str(ROOT / "configs" / "vit_b32_8gpu.yaml")


class TestFiles:
    def test_paths_exist(self) -> None:
        paths = re.findall(
            r"(?<![\w/.-])((?:cluster|configs|jobs|pipeline|tests)/[\w./*-]*\w|cluster/\w+/)", TEXT
        )
        assert len(set(paths)) > 10
        for path in set(paths):
            assert (ROOT / path).exists(), path
        for folder, names in FILLED.items():
            assert names
            assert all(list(folder.glob(f"{name}.*")) for name in names)

    def test_every_file_has_a_place_in_it(self) -> None:
        filled = set().union(*FILLED.values())
        for path in CLUSTER.rglob("*"):
            if path.is_file() and path.name != "README.md" and path.suffix != ".pyc":
                assert path.relative_to(ROOT).as_posix() in TEXT or path.stem in filled, path

    def test_sections_that_are_pointed_at_exist(self) -> None:
        titles = re.findall(r"(?m)^## (.+)$", TEXT)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors


class TestAws:
    def test_filled_in_file_is_one_that_ray_takes(self, tmp_path: Path) -> None:
        [step] = [line for line in SHELL.splitlines() if "cluster/aws.yaml >" in line]
        script = step.replace("> my-cluster.yaml", f"> {tmp_path / 'my.yaml'}")
        values = {"AMI": "ami-1", "REGISTRY": "1.dkr.ecr.eu-west-1.amazonaws.com",
                  "AWS_REGION": "eu-west-1", "PATH": "/usr/bin:/bin"}  # fmt: skip
        subprocess.run(["bash", "-euc", script], env=values, check=True)
        text = (tmp_path / "my.yaml").read_text()
        for left in ("REGISTRY/", "ami-0000", "us-west"):
            assert left not in text
        config = yaml.safe_load(text)
        validate_config(prepare_config(config))
        assert config["docker"]["image"].startswith(f"{values['REGISTRY']}/gammaray:")
        assert config["provider"]["availability_zone"] == "eu-west-1a"
        [*_, login] = config["initialization_commands"]
        assert "--region eu-west-1 " in login
        assert login.endswith(f"--password-stdin {values['REGISTRY']}")

    @pytest.mark.parametrize("policy", ["trust", "run", "head"])
    def test_filled_in_policies_have_no_gaps(self, policy: str) -> None:
        [fill] = [line for line in SHELL.splitlines() if "cluster/iam/" in line]
        values = {"ACCOUNT": "123", "AWS_REGION": "eu-west-1", "BUCKET": "mine",
                  "PATH": "/usr/bin:/bin"}  # fmt: skip
        done = subprocess.run(
            ["bash", "-euc", f"{fill}\nfill {policy}"],
            env=values, cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["Statement"]
        assert not re.search(r"ACCOUNT|REGION|BUCKET", done.stdout)

    def test_makes_what_the_file_names(self) -> None:
        [config] = read(CLUSTER / "aws.yaml")
        for kind in config["available_node_types"].values():
            assert kind["node_config"]["IamInstanceProfile"]["Name"] in SHELL
        group = config["provider"]["security_group"]["GroupName"]
        assert f"--group-name {group} " in SHELL
        image = config["docker"]["image"].removeprefix("REGISTRY")
        assert f"docker push $REGISTRY{image}" in SHELL


class TestKubernetes:
    def test_makes_the_secrets_that_are_needed(self) -> None:
        for thing in kubernetes_objects():
            if thing["kind"] == "Secret":
                name = thing["metadata"]["name"]
                [made] = [
                    line for line in SHELL.splitlines() if f"create secret generic {name} " in line
                ]
                keys = re.findall(r"--from-(?:file|literal)=(\w+)=", made)
                assert set(keys) == set(thing["stringData"])

    def test_services_and_workloads_exist(self) -> None:
        names = {thing["kind"].lower(): set[str]() for thing in kubernetes_objects()}
        for thing in kubernetes_objects():
            names[thing["kind"].lower()].add(thing["metadata"]["name"])
        # KubeRay's own: a cluster's service, and the Job that submits a RayJob.
        names["service"] |= {f"{name}-head-svc" for name in names["raycluster"]}
        names["job"] = names["rayjob"]
        kubectl = "\n".join(line for line in (*SHELL.splitlines(), *INLINE) if "kubectl" in line)
        told = re.findall(r"\b(service|deployment|job)/([\w-]+)", kubectl)
        told += re.findall(r"(?:get|delete) (raycluster|rayjob) ([\w-]+)", kubectl)
        assert len(told) >= 5
        for kind, name in told:
            assert name in names[kind], f"{kind}/{name}"

    def test_images_are_those_of_the_manifests(self) -> None:
        images = {
            found
            for path in KUBERAY.glob("*.yaml")
            for found in re.findall(r"image: registry\.example\.com/(\S+)", path.read_text())
        }
        assert images == {found for found in re.findall(r"docker push \$REGISTRY/(\S+)", SHELL)}
        stages = re.findall(r"(?m)^FROM \S+ AS (\w+)", (CLUSTER / "Dockerfile").read_text())
        assert set(re.findall(r"--target (\w+)", SHELL)) == set(stages)
        assert f"gammaray-mlflow:{pinned('mlflow')}" in SHELL


def test_drain_times_are_those_of_the_manifests_and_of_ray() -> None:
    workers = read(KUBERAY / "raycluster.yaml")[0]["spec"]["workerGroupSpecs"]
    [(name, ours)] = {
        (env["name"], env["value"])
        for group in workers
        for env in group["template"]["spec"]["containers"][0]["env"]
    }
    done = subprocess.run(
        [sys.executable, "-c", f"from ray._private import ray_constants as r; print(r.{name})"],
        env={key: value for key, value in os.environ.items() if key != name},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = f"`{name}` at most ({ours} here, {float(done.stdout):g} by default"
    assert said in " ".join(TEXT.split())


def test_token_file_is_closed_to_others() -> None:
    """Ray writes it as the umask says, and `ray up` hands its mode on to all nodes."""
    assert "(umask 077; ray get-auth-token --generate > /dev/null)" in SHELL
    assert "chmod 600 ~/.ray/auth_token" in SHELL
