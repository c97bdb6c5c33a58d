"""The images: linted, of the project's versions, and not run by root."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.manifests import CLUSTER, ROOT, pinned, read

DOCKERFILE = CLUSTER / "Dockerfile"
TEXT = DOCKERFILE.read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines()


def _stages() -> dict[str, list[str]]:
    stages: dict[str, list[str]] = {}
    for line in filter(None, INSTRUCTIONS):
        if line.startswith("FROM "):
            stages[line.split(" AS ")[1]] = []
        stages[list(stages)[-1]].append(line)
    return stages


STAGES = _stages()


def _lint(path: Path) -> list[str]:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--format", "json", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [
        f"{found['line']}: {found['code']} {found['message']}" for found in json.loads(done.stdout)
    ]


def test_has_no_lint() -> None:
    assert _lint(DOCKERFILE) == []


def test_lint_is_found(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install ray\n")
    assert any("DL3006" in found for found in _lint(tmp_path / "Dockerfile"))


@pytest.mark.parametrize("stage", STAGES)
class TestStages:
    def test_is_not_root_by_number(self, stage: str) -> None:
        [user] = [line for line in STAGES[stage] if line.startswith("USER ")]
        assert user == "USER 1000:1000"
        after = STAGES[stage][STAGES[stage].index(user) :]
        assert not any(line.startswith(("RUN ", "COPY ", "ADD ")) for line in after)

    def test_is_of_the_projects_python(self, stage: str) -> None:
        makefile = (ROOT / "Makefile").read_text()
        [python] = re.findall(r"PYTHON \?= python(\S+)", makefile)
        assert STAGES[stage][0].startswith(f"FROM python:{python}-slim-")

    def test_installs_nothing_that_is_not_pinned(self, stage: str) -> None:
        for line in STAGES[stage]:
            for command in line.split("&&"):
                if "pip install" in command:
                    assert re.search(r"-c /opt/\S*constraints\.txt", command), command

    def test_has_no_secret(self, stage: str) -> None:
        assert not re.search(r"(?i)token|password|secret|AWS_", "\n".join(STAGES[stage]))


def test_has_the_projects_version(version: str) -> None:
    assert f'org.opencontainers.image.version="{version}"' in TEXT
    assert f"-t REGISTRY/gammaray:{version} " in TEXT
    assert f"-t REGISTRY/gammaray-mlflow:{pinned('mlflow')} " in TEXT


@pytest.mark.parametrize(
    "package", ["torch", "ray", "deepspeed", "mlflow", "boto3", "psycopg2-binary"]
)
def test_what_it_installs_is_pinned(package: str) -> None:
    assert re.fullmatch(r"[\d.]+", pinned(package))


def test_builds_no_operator() -> None:
    """The engine's optimiser is torch's own: see the Dockerfile's comment."""
    assert "DS_BUILD_OPS=0" in TEXT
    engine = (ROOT / "pipeline" / "engine" / "optimizer.py").read_text()
    assert "torch.optim.AdamW(" in engine
    assert "offload" not in (ROOT / "pipeline" / "engine" / "zero.py").read_text()


OPERATORS = """
import os, torch, torch.distributed as dist
from pipeline.config.schema import EngineConfig, OptimConfig
from pipeline.engine.zero import Engine, _import_deepspeed

_import_deepspeed(torch.device("cpu"))
from deepspeed.ops.op_builder.builder import OpBuilder

os.environ["LOCAL_RANK"] = "0"
loaded = []
OpBuilder.load = lambda self, verbose=True: loaded.append(self.name)
OpBuilder.jit_load = OpBuilder.load
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
for stage in (0, 1, 2, 3):
    for precision in ("fp32", "bf16"):
        engine = Engine(
            torch.nn.Linear(4, 4),
            engine=EngineConfig(zero_stage=stage, precision=precision),
            optim=OptimConfig(), micro_batch=2, accumulation=1, device=torch.device("cpu"),
        )
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        engine.backward(engine(torch.ones(2, 4, dtype=dtype)).float().sum())
        assert engine.step(1.0) > 0
print("LOADED", loaded)
"""


def test_no_stage_loads_an_operator() -> None:
    """Else the first step in the image would look for a compiler. Runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", OPERATORS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "LOADED []" in done.stdout, done.stdout + done.stderr


def test_reports_to_nobody() -> None:
    assert "MLFLOW_DISABLE_TELEMETRY=true" in "\n".join(STAGES["mlflow"])
    for variable in ("MLFLOW_DISABLE_TELEMETRY=true", "RAY_USAGE_STATS_ENABLED=0"):
        assert variable in "\n".join(STAGES["gammaray"])


def test_token_file_has_a_folder_of_its_user() -> None:
    """Docker makes the folder of a file that is mounted alone, and as root's."""
    [mounted] = read(CLUSTER / "aws.yaml")[0]["file_mounts"]
    assert f"install -d -m 0700 -o ray -g ray {Path(mounted).parent}" in TEXT


def test_copies_only_what_the_context_has() -> None:
    """What .dockerignore lets through is what COPY takes, and all of it is there."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in INSTRUCTIONS:
        if line.startswith("COPY "):
            words = [word for word in line.split()[1:] if not word.startswith("--")]
            copied.update(words[:-1])
    assert copied == kept
    assert all((ROOT / path).exists() for path in copied)
    assert lines[1] == "*"


def _compose_mistakes(path: Path) -> str:
    """What the schema of Compose, which the checker brings along, finds."""
    done = subprocess.run(
        [Path(sys.executable).with_name("check-jsonschema"),
         "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_compose_knows_every_field(tmp_path: Path) -> None:
    text = (CLUSTER / "mlflow.compose.yaml").read_text()
    assert _compose_mistakes(CLUSTER / "mlflow.compose.yaml") == ""
    (tmp_path / "broken.yaml").write_text(text.replace("restart:", "restrat:", 1))
    assert "restrat" in _compose_mistakes(tmp_path / "broken.yaml")


def test_compose_has_the_projects_versions() -> None:
    [compose] = read(CLUSTER / "mlflow.compose.yaml")
    services = compose["services"]
    assert services["mlflow"]["image"] == f"gammaray-mlflow:{pinned('mlflow')}"
    assert services["mlflow"]["build"] == {
        "context": "..", "dockerfile": "cluster/Dockerfile", "target": "mlflow"
    }  # fmt: skip
    [stateful] = [
        found
        for found in read(CLUSTER / "kuberay" / "mlflow.yaml")
        if found["kind"] == "StatefulSet"
    ]
    [postgres] = stateful["spec"]["template"]["spec"]["containers"]
    assert services["database"]["image"] == postgres["image"]


def test_compose_listens_on_loopback_and_holds_no_secret() -> None:
    [compose] = read(CLUSTER / "mlflow.compose.yaml")
    for service in compose["services"].values():
        ports = service.get("ports", ())
        assert all(port.startswith("${MLFLOW_ADDRESS:-127.0.0.1}:") for port in ports)
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", name):
                # Refused without a value: no default that everyone knows.
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
