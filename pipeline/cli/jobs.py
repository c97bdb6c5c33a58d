"""`gammaray submit`, `jobs`, `status`, `logs`, `stop`: runs on a cluster, through Ray's Jobs API.

A submitted job is `python -m jobs.pretrain CONFIG ...` (of a task `jobs.finetune`) in a copy of the
current folder, on the cluster's head: the same as `gammaray train` (`finetune`) there.
"""

import asyncio
import contextlib
import getpass
import importlib.metadata
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli import cluster, parcel
from pipeline.cli.arguments import ConfigPath, JsonPath, Overrides, write_json
from pipeline.cli.checkpoints import age
from pipeline.cli.cluster import Address
from pipeline.cli.screen import SAVED, plain
from pipeline.config.load import parse_config, read_values
from pipeline.config.plan import find_contradictions
from pipeline.config.schema import Config, flatten
from pipeline.errors import UserError, raise_problems

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Seconds between SIGTERM and SIGKILL: the driver saves a checkpoint in between. Ray's own are 3.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
POLL_SECONDS = 1.0
EXIT_STATUS = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}

JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job; `gammaray jobs` lists.")]


def submit(
    context: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log to the end, and end as it does.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A variable of the job; no secrets. Repeatable."),
    ] = None,
) -> None:
    """Train on a cluster; the same command goes on with a run that was stopped."""
    console: Console = context.obj
    folder = Path.cwd().resolve()
    values = read_values(config, overrides or ())
    run = parse_config(values, str(config))
    variables = {**STOP_WAIT, **parcel.read_variables(env or ())}
    with console.status("Looking at what is sent ..."):
        sizes = parcel.files_to_send(folder)
    inside = parcel.check_config_goes_along(config, folder, sizes)
    problems = [
        *find_contradictions(run),
        *parcel.find_lost_paths(values, sizes),
        *parcel.find_passwords(flatten(run)),
    ]
    raise_problems(problems, "This run cannot be submitted")
    parcel.check_size(folder, sizes)
    client = cluster.connect(address)
    cluster.check_version(client)
    _check_not_running(client, run.name)
    _warn(console, client, values)
    with console.status("Sending ..."), cluster.refusals(client.get_address()):
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", _module(run), inside, *(overrides or ())]),
            submission_id=f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            runtime_env={
                "working_dir": str(folder),
                "excludes": parcel.EXCLUDES,
                "env_vars": variables,
            },
            metadata=_metadata(run, inside),
        )
    there = _option(client, address)
    console.print(
        f"Submitted run '{run.name}' to {client.get_address()} as job {job}, with {len(sizes):,} "
        f"file(s) ({sum(sizes.values()) / 1e6:,.1f} MB).\n"
        "Next:\n"
        f"  how it goes     gammaray status {job}{there}\n"
        f"  what it prints  gammaray logs {job} --follow{there}\n"
        f"  save and stop   gammaray stop {job}{there}",
        markup=False,
        soft_wrap=True,
    )
    if follow:
        _follow(console, client, job, there)


def _module(run: Config) -> str:
    return "jobs.pretrain" if run.task is None else "jobs.finetune"


def jobs(context: typer.Context, address: Address = None, json: JsonPath = None) -> None:
    """List the jobs that were submitted to a cluster, the newest last."""
    console: Console = context.obj
    client = cluster.connect(address)
    found = cluster.list_jobs(client)
    if found:
        table = Table(show_edge=False)
        for title in ("job", "run", "status", "submitted", "took", "by"):
            table.add_column(title)
        for job in found:
            said = cluster.metadata_of(job)
            table.add_row(
                plain(str(job.submission_id)),
                plain(said.get("run", "")),
                job.status.value,
                f"{age(time.time() - (job.start_time or 0) / 1000)} ago",
                _took(job),
                plain(said.get("user", "")),
            )
        console.print(table)
    else:
        console.print(f"No job has been submitted to {client.get_address()}.", soft_wrap=True)
    write_json(json, [_facts(job) for job in found])


def status(
    context: typer.Context, job: JobName, address: Address = None, json: JsonPath = None
) -> None:
    """Say how a job goes."""
    console: Console = context.obj
    found = cluster.find_job(cluster.connect(address), job)
    said = cluster.metadata_of(found)
    lines = [f"Job {found.submission_id} is {found.status.value}. {_last_lines(found.message)}"]
    lines += [f"  {name:8} {said[name]}" for name in ("run", "user", "config", "commit", "version")
              if name in said]  # fmt: skip
    lines += [f"  {'command':8} {found.entrypoint}", f"  {'took':8} {_took(found)}"]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    write_json(json, _facts(found))


def logs(
    context: typer.Context,
    job: JobName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="On to the end, and end as the job does.")
    ] = False,
) -> None:
    """Show what a job has printed."""
    console: Console = context.obj
    client = cluster.connect(address)
    found = str(cluster.find_job(client, job).submission_id)
    if follow:
        _follow(console, client, found, _option(client, address))
    with cluster.refusals(client.get_address()):
        _write(console, client.get_job_logs(found))


def stop(context: typer.Context, job: JobName, address: Address = None) -> None:
    """Have a job save a checkpoint and end; waits until it has."""
    console: Console = context.obj
    client = cluster.connect(address)
    found = cluster.find_job(client, job)
    name = str(found.submission_id)
    if found.status.is_terminal():
        console.print(f"Job {name} had ended: {found.status.value}.", soft_wrap=True)
        return
    with cluster.refusals(client.get_address()):
        client.stop_job(name)
    try:
        with console.status("Waiting for the last checkpoint ..."):
            while not (found := cluster.find_job(client, name)).status.is_terminal():
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        console.print(f"\nJob {name} has been told to stop, and does.", soft_wrap=True)
        sys.exit(130)
    with cluster.refusals(client.get_address()):
        saved = saved_line(client.get_job_logs(name))
    if found.status.value != "STOPPED":
        console.print(f"Job {name} ended by itself: {found.status.value}.", soft_wrap=True)
        return
    console.print(
        f"Job {name} is STOPPED. "
        + (saved or "It saved no checkpoint at its end: what came after the last one is lost.")
        + " The same `gammaray submit` goes on with the run.",
        soft_wrap=True,
    )


def saved_line(log: str) -> str | None:
    """The line of a job's log that says at which step it saved and ended, if it did."""
    lines = re.findall(rf"^{SAVED}[\d,]+\.$", log, re.MULTILINE)
    return lines[-1] if lines else None


def _check_not_running(client: "JobSubmissionClient", run: str) -> None:
    for job in cluster.list_jobs(client):
        if not job.status.is_terminal() and cluster.metadata_of(job).get("run") == run:
            raise UserError(
                f"name: run '{run}' is {job.status.value} at {client.get_address()} as job "
                f"{job.submission_id}; stop it first (gammaray stop {job.submission_id}), or "
                "submit another with name=..."
            )


def _warn(console: Console, client: "JobSubmissionClient", values: dict[str, Any]) -> None:
    warnings = [cluster.warn_of_open_line(client)]
    if paths := parcel.local_paths(values):
        warnings.append(f"every node must have the same files at {', '.join(paths)}")
    for warning in filter(None, warnings):
        console.print(f"[yellow]warning[/] {plain(warning)}", soft_wrap=True)


def _metadata(run: Config, config: str) -> dict[str, str]:
    metadata = {
        "run": run.name,
        "user": getpass.getuser(),
        "config": config,
        "version": importlib.metadata.version("gammaray"),
    }
    commit = _commit()
    return {**metadata, "commit": commit} if commit else metadata


def _commit() -> str | None:
    """Of the current folder, whose files are sent."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        return asked.stdout.strip() or None
    return None


def _option(client: "JobSubmissionClient", address: str | None) -> str:
    """What further commands need to reach the same cluster."""
    return "" if address is None else f" --address {client.get_address()}"


def _follow(console: Console, client: "JobSubmissionClient", job: str, there: str) -> NoReturn:
    """Show a job's log to its end, then end as the job did."""
    try:
        ended = _show_to_the_end(console, client, job)
    except KeyboardInterrupt:
        console.print(
            f"\nThe job goes on. Its log: gammaray logs {job} --follow{there}\n"
            f"To save and stop it: gammaray stop {job}{there}",
            soft_wrap=True,
        )
        sys.exit(130)
    except UserError as error:
        raise UserError(f"{error} (the job may go on: gammaray status {job}{there})") from error
    console.print(f"Job {job}: {ended.status.value}, after {_took(ended)}.", soft_wrap=True)
    sys.exit(EXIT_STATUS[ended.status.value])


def _show_to_the_end(console: Console, client: "JobSubmissionClient", job: str) -> "JobDetails":
    import aiohttp

    shown = 0

    async def tail() -> None:
        nonlocal shown
        position = 0  # each connection begins with the first line
        async for text in client.tail_job_logs(job):
            _write(console, text[max(0, shown - position) :])
            position += len(text)
            shown = max(shown, position)

    while True:
        with contextlib.suppress(aiohttp.ClientError, RuntimeError, OSError):
            asyncio.run(tail())
        found = cluster.find_job(client, job)
        if found.status.is_terminal():
            return found
        time.sleep(POLL_SECONDS)


def _write(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()


def _took(job: "JobDetails") -> str:
    if job.start_time is None:
        return ""
    ended = job.end_time or 1000 * time.time()
    return age((ended - job.start_time) / 1000)


def _last_lines(message: str | None) -> str:
    """A failed job's message ends with much of its log; the end says why."""
    lines = [line for line in (message or "").splitlines() if line.strip()]
    return "\n".join(lines[:1] + (["  ...", *lines[-5:]] if len(lines) > 6 else lines[1:]))


def _facts(job: "JobDetails") -> dict[str, Any]:
    return {
        "job": job.submission_id,
        "status": job.status.value,
        "message": job.message,
        "command": job.entrypoint,
        "metadata": cluster.metadata_of(job),
        "submitted_ms": job.start_time,
        "ended_ms": job.end_time,
    }
