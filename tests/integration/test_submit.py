"""Runs submitted to a real head with a token: to the end, stopped, refused, and without a leak."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.run_cli import mlflow_runs, newest_step, start, wait_for, write_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
SLOW = 400  # seconds; others may use the machine too


@dataclass
class Head:
    """A head of Ray, and a folder to submit from.

    `planted` are secrets in the environment of the head and of the command.
    """

    folder: Path
    session: Path
    environment: dict[str, str]
    planted: list[str]

    def command(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit status and output of `gammaray`."""
        env = {**self.environment, **environment}
        process = start(*arguments, cwd=self.folder, env=env)
        output, _ = process.communicate(timeout=SLOW)
        return process.returncode, output

    def facts(self) -> dict[str, dict]:
        """What `gammaray jobs` knows of each run's job."""
        path = self.folder.parent / "jobs.json"
        status, output = self.command("jobs", "--json", str(path))
        assert status == 0, output
        return {job["metadata"]["run"]: job for job in json.loads(path.read_text())}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("submit")
    project = folder / "project"
    project.mkdir()
    write_run(folder, cluster={"workers": 1}, train={"checkpoint_every": 20, "epochs": 1})
    (folder / "run.yaml").rename(project / "run.yaml")
    session = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # sockets' paths must be short
    token = folder / "token"
    planted = [secrets.token_hex(16) for _ in range(3)]
    token.write_text(planted[0])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    dashboard, client = _free_ports(2)
    environment = {
        **kept,
        # The job's `python` is the first one on the path of the head, as on a real cluster.
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "AWS_ACCESS_KEY_ID": "planted",
        "AWS_SECRET_ACCESS_KEY": planted[1],
        "HF_TOKEN": planted[2],
    }
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2",
         "--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}",
         "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000",
         f"--temp-dir={session}", "--disable-usage-stats"],
        stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
    )  # fmt: skip
    made = Head(project, session, environment, planted)
    try:
        wait_for(lambda: process.poll() is not None or made.command("jobs")[0] == 0, SLOW)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield made
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(session, ignore_errors=True)


@pytest.fixture(scope="module")
def followed(head: Head) -> str:
    """What is printed by a submission that is followed to the end."""
    status, output = head.command("submit", "run.yaml", "--follow", "--env", "MARK=1")
    assert status == 0, output
    return output


@dataclass
class Stopped:
    """What is printed by a submission that is left while it is followed, by a second one of the
    same run, and when the job is stopped.
    """

    left: str
    again: str
    stop: str


@pytest.fixture(scope="module")
def stopped(head: Head, followed: str) -> Stopped:
    longer = ["submit", "run.yaml", "name=long", "train.epochs=1000", "data.val=null",
              "evaluate.zero_shot=[]", "train.checkpoint_every=10"]  # fmt: skip
    follower = start(*longer, "--follow", cwd=head.folder, env=head.environment)
    runs = head.folder.parent / "runs"
    wait_for(lambda: list((runs / "long").glob("step-*/manifest.json")), SLOW)
    too_late = threading.Timer(SLOW, follower.kill)
    too_late.start()
    assert follower.stdout is not None
    left = ""
    while "Training from step 0" not in left:  # what a job prints reaches a follower late
        line = follower.stdout.readline()
        assert line, f"the command has ended:\n{left}"
        left += line
    follower.send_signal(signal.SIGINT)
    left += follower.stdout.read()
    too_late.cancel()
    assert follower.wait(SLOW) == 130, left
    status, again = head.command(*longer)
    assert status == 2, again
    status, output = head.command("stop", head.facts()["long"]["job"])
    assert status == 0, output
    return Stopped(left, again, output)


def test_it_is_the_same_as_training_here(head: Head, followed: str) -> None:
    for part in ("Submitted run 'tiny'", "Training from step 0", "text to image R@1", "SUCCEEDED"):
        assert part in followed
    assert "Traceback" not in followed
    assert "ploading package" not in followed, "that is what Ray's client says"
    assert newest_step(head.folder.parent, 0) == 18  # 300 rows, 16 a step


def test_a_job_can_be_asked_about(head: Head, followed: str) -> None:
    job = head.facts()["tiny"]
    assert job["status"] == "SUCCEEDED"
    assert job["command"] == "python -m jobs.pretrain run.yaml"
    status, output = head.command("status", job["job"])
    assert status == 0
    assert f"Job {job['job']} is SUCCEEDED." in output
    status, output = head.command("logs", job["job"])
    assert status == 0
    assert "Training from step 0" in output
    assert output.strip().splitlines()[-1] in followed
    assert head.command("logs", job["job"], "--follow")[0] == 0
    status, output = head.command("stop", job["job"])
    assert (status, "had ended: SUCCEEDED" in output) == (0, True)


def test_an_unknown_job_is_refused_with_others(head: Head, followed: str) -> None:
    known = head.facts()["tiny"]["job"]
    status, output = head.command("status", known[:-1])
    assert status == 2
    assert f"did you mean one of ['{known}']?" in output


def test_a_job_that_fails_is_told(head: Head) -> None:
    status, output = head.command(
        "submit", "run.yaml", "name=wrong", "data.train=/nowhere", "--follow"
    )
    assert status == 1, output
    assert "data.train: /nowhere does not exist" in output
    status, output = head.command("status", head.facts()["wrong"]["job"])
    assert status == 0
    assert "is FAILED" in output


def test_a_job_goes_on_when_nobody_looks(stopped: Stopped) -> None:
    assert "Training from step 0" in stopped.left
    assert "The job goes on. Its log: gammaray logs long-" in stopped.left
    assert "Traceback" not in stopped.left


def test_a_run_is_not_submitted_twice(stopped: Stopped) -> None:
    assert "error name: run 'long' is RUNNING at http://127.0.0.1" in stopped.again
    assert "gammaray stop long-" in stopped.again


def test_a_job_that_is_stopped_saves_first(head: Head, stopped: Stopped) -> None:
    runs = head.folder.parent / "runs"
    newest = max((runs / "long").glob("step-*/manifest.json")).parent.name
    assert f"Saved at step {int(newest.removeprefix('step-')):,}." in stopped.stop
    assert head.facts()["long"]["status"] == "STOPPED"
    assert "KILLED" in mlflow_runs(runs)
    assert not (runs / "long" / "driver.json").exists()
    status, output = head.command("checkpoints", str(runs / "long"), "--verify")
    assert status == 0, output


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token and none was sent; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token that was sent; put the cluster's own in"),
    ],
)
def test_a_cluster_that_does_not_let_us_in(
    head: Head, environment: dict[str, str], said: str
) -> None:
    for arguments in (["submit", "run.yaml", "name=out"], ["jobs"], ["stop", "x"]):
        status, output = head.command(*arguments, **environment)
        assert status == 2, output
        (line,) = output.strip().splitlines()
        assert line.startswith("error http://127.0.0.1:")
        assert said in line


def test_no_secret_is_written_anywhere(head: Head, followed: str, stopped: Stopped) -> None:
    """In run folders, tracker, Ray's session with all logs, and what the Jobs API tells."""
    asked = subprocess.run(
        [sys.executable, "-c",
         "from ray.job_submission import JobSubmissionClient\n"
         "for job in JobSubmissionClient().list_jobs(): print(job.model_dump_json())"],
        env=head.environment, capture_output=True, text=True, check=True, timeout=SLOW,
    )  # fmt: skip
    assert '"MARK":"1"' in asked.stdout.replace(" ", "")
    texts = {"jobs": asked.stdout, "screen": followed + stopped.left + stopped.stop}
    places = [head.folder.parent / "runs", head.session, head.folder]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-") for path in files)
    assert any(path.name == "mlflow.db" for path in files)
    for secret in head.planted:
        leaks = [path for path in files if secret.encode() in path.read_bytes()]
        leaks += [name for name, text in texts.items() if secret in text]
        assert not leaks
