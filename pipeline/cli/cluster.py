"""A cluster's Jobs API: where it is, whether it lets us in, and which jobs it has.

Every refusal is a `UserError` of one sentence.
"""

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from pipeline.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT = "http://127.0.0.1:8265"
PATIENCE = 10.0  # seconds for a first answer
HERE = ("localhost", "127.0.0.1", "::1")
# Loggers of Ray's client that tell of each step, two of them at a level of their own.
CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")

Address = Annotated[
    str | None,
    typer.Option(
        help=f"URL of the cluster's dashboard; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, {DEFAULT}."
    ),
]


def find_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The URL to ask: the given one, the environment's, or that of this machine (or a tunnel)."""
    address, place = given, "--address"
    if address is None:
        address, place = environment.get("RAY_API_SERVER_ADDRESS"), "RAY_API_SERVER_ADDRESS"
    if not address:
        address = environment.get("RAY_ADDRESS", "")
        # It may be that of another door of Ray: a port for drivers, not for jobs.
        address = address if address.startswith(("http://", "https://")) else DEFAULT
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            f"{place}: {address!r} is no URL of a dashboard; give http://HOST:8265 or https://HOST"
        )
    return address.rstrip("/")


def connect(address: str | None) -> "JobSubmissionClient":
    """A client of the Jobs API that has answered. Raises `UserError`."""
    url = find_address(address, os.environ)
    # Ray's client prefers the environment to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    import requests
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with refusals(url):
        # Ray's client waits forever for a machine that does not answer.
        requests.get(f"{url}/api/version", timeout=PATIENCE)
        return JobSubmissionClient(url)


@contextlib.contextmanager
def refusals(url: str) -> Iterator[None]:
    """Turn what can go wrong between Ray's client and the server into a `UserError`."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(f"{url}: {_about_the_token(str(error))}") from error
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise UserError(
            f"{url}: no Ray cluster answers there; start one, open the tunnel to it, or give "
            "another --address"
        ) from error
    except (RuntimeError, ValueError, requests.RequestException) as error:
        # Another server than Ray's, or one that is in trouble.
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{url}: the server there refuses ({said}); is it Ray's?") from error


def _about_the_token(said: str) -> str:
    source = (
        "RAY_AUTH_TOKEN, or in a file that RAY_AUTH_TOKEN_PATH names (else ~/.ray/auth_token); "
        "`ray get-auth-token` prints it where the cluster was started"
    )
    if "required" in said.partition(":")[0]:
        return (
            "the cluster wants a token and none was sent; set RAY_AUTH_MODE=token, and put the "
            f"cluster's token in {source}"
        )
    return f"the cluster refuses the token that was sent; put the cluster's own in {source}"


def server_of(client: "JobSubmissionClient") -> str:
    """The URL that the client asks."""
    return client.get_address()


def check_version(client: "JobSubmissionClient") -> None:
    """Raise `UserError` unless the cluster runs the Ray that is installed here."""
    import ray

    here, there = ray.__version__, client._server_ray_version or "unknown"
    if here.split(".")[:2] != there.split(".")[:2]:
        raise UserError(
            f"{server_of(client)}: the cluster runs Ray {there}, here is {here}; install "
            f'"ray[train,data,default]=={there}" here, or update the cluster'
        )


def warn_of_open_line(client: "JobSubmissionClient") -> str | None:
    """What to say when the token can be read on its way; None when it cannot."""
    parts = urlsplit(server_of(client))
    is_sent = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if parts.scheme == "http" and parts.hostname not in HERE and is_sent:
        return f"the token goes to {parts.netloc} unencrypted: better use a tunnel, or https"
    return None


def list_jobs(client: "JobSubmissionClient") -> "list[JobDetails]":
    """All submitted jobs, oldest first."""
    with refusals(server_of(client)):
        jobs = client.list_jobs()
    submitted = [job for job in jobs if job.submission_id]
    return sorted(submitted, key=lambda job: job.start_time or 0)


def find_job(client: "JobSubmissionClient", name: str) -> "JobDetails":
    """The job of that id. Raises `UserError` that names others, when there is none."""
    jobs = list_jobs(client)
    for job in jobs:
        if name in (job.submission_id, job.job_id):
            return job
    raise UserError(f"{server_of(client)}: no job {name!r}; {_others(name, jobs)}")


def _others(name: str, jobs: "list[JobDetails]") -> str:
    names = [str(job.submission_id) for job in jobs]
    near = difflib.get_close_matches(name, names, n=3) or names[:-4:-1]
    return f"did you mean one of {near}?" if near else "none has been submitted there"


def metadata_of(job: "JobDetails") -> dict[str, Any]:
    """What was said of the job when it was submitted."""
    return dict(job.metadata or {})
