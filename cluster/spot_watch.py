#!/usr/bin/env python3
"""Drain this Ray node when EC2 gives notice that it takes the spot instance away.

Enters: the instance's own metadata. Leaves: one `ray drain-node`, so that training writes a
checkpoint in the two minutes that are left. Must not know: training; this is the standard library
alone, and the `ray` on PATH.

    spot_watch.py [--every SECONDS] [options of `ray drain-node`, such as --address]

Ends with 0 on an instance that is not spot and after a drain, with 1 when no drain was accepted
before the instance went.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

# The variable by which AWS's own tools are sent to another metadata service.
ENDPOINT = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
TOKEN_SECONDS = 21600  # the longest that IMDSv2 grants
RESERVE_SECONDS = 10  # kept of the notice: a checkpoint must be whole before the machine goes


class Metadata:
    """IMDSv2: a session token, renewed when it is refused."""

    def __init__(self, endpoint: str):
        self._endpoint = endpoint.rstrip("/")
        self._token = ""
        # A proxy of the environment must not be asked for link-local addresses.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(self, path: str) -> str | None:
        """Give the text at `path`, or None where there is none.

        Raises `OSError` or `HTTPException`.
        """
        if not self._token:
            self._renew()
        try:
            try:
                return self._get(path)
            except urllib.error.HTTPError as error:
                if error.code != 401:
                    raise
            self._renew()
            return self._get(path)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def _renew(self) -> None:
        self._token = self._request(
            "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        )

    def _get(self, path: str) -> str:
        return self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})

    def _request(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._endpoint + path, headers=headers, method=method)
        with self._opener.open(request, timeout=2) as response:
            return response.read().decode()


def seconds_left(notice: str, now: datetime) -> float:
    """Seconds from `now` to the time in EC2's `notice` (`{"action": ..., "time": ...}`)."""
    at = datetime.fromisoformat(json.loads(notice)["time"])
    return (at - now).total_seconds()


def drain(seconds: float, options: list[str]) -> bool:
    """Ask Ray to drain this node within `seconds`; say whether it agreed."""
    command = [
        "ray", "drain-node", *options,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
        "--deadline-remaining-seconds", str(max(1, int(seconds - RESERVE_SECONDS))),
    ]  # fmt: skip
    say("draining: " + " ".join(command))
    try:
        # A cluster that does not answer must leave time for another try.
        done = subprocess.run(command, check=False, timeout=max(5.0, seconds / 2))
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"ray drain-node failed: {error}")
        return False
    if done.returncode:
        say(f"ray drain-node ended with {done.returncode}")
    return done.returncode == 0


def watch(metadata: Metadata, every: float, options: list[str]) -> int:
    """Poll until there is a notice and the node is drained; give the exit status."""
    kind = trouble = None
    while True:
        try:
            kind = kind or metadata.read("/latest/meta-data/instance-life-cycle")
            if kind not in (None, "spot"):
                say(f"this instance is {kind}: nothing to watch")
                return 0
            notice = metadata.read("/latest/meta-data/spot/instance-action")
            trouble = None
            if notice is not None:
                left = seconds_left(notice, datetime.now(UTC))
                if left <= 0:
                    say("the instance's time is over")
                    return 1
                if drain(left, options):
                    return 0
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            # The service throttles and restarts; a watcher that dies of it misses the notice.
            if repr(error) != trouble:  # once, or the log of a day without it fills the disk
                trouble = repr(error)
                say(f"metadata: {trouble}")
        time.sleep(every)


def say(text: str) -> None:
    """Print a line with the time, at once: the log is read while this runs."""
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between looks (AWS advises 5)"
    )
    known, options = parser.parse_known_args()
    return watch(Metadata(ENDPOINT), known.every, options)


if __name__ == "__main__":
    sys.exit(main())
