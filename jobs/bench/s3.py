"""An S3 server on this machine, and a proxy before it that is as slow as a network and counts.

Both are processes of their own, so that neither takes the Python lock of what is measured. A
request waits `latency` seconds before it is passed on; what is counted is bodies, not headers.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}
KINDS = ("HEAD", "GET", "LIST", "PUT", "POST", "DELETE")  # a LIST is a GET of a bucket
FIELDS = (*KINDS, "connections", "received", "sent", "latency")
CHUNK = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What went over the wire: requests by kind, connections made, bytes down and up."""

    requests: dict[str, int]
    connections: int
    received: int
    sent: int

    def __str__(self) -> str:
        """Say the requests, as in `1 HEAD, 2 GET`."""
        return ", ".join(f"{count} {kind}" for kind, count in self.requests.items() if count)


class CountingProxy:
    """Steers a proxy that runs elsewhere; `url` is what clients are given."""

    def __init__(self, url: str, shared: Any):
        self.url = url
        self._shared = shared

    def delay(self, latency: float) -> None:
        """Let each request wait so many seconds from now on."""
        self._shared[FIELDS.index("latency")] = latency

    def take(self) -> Traffic:
        """What was counted since the last call."""
        with self._shared.get_lock():
            values = dict(zip(FIELDS, self._shared[:], strict=True))
            for index in range(FIELDS.index("latency")):
                self._shared[index] = 0
        return Traffic(
            requests={kind: int(values[kind]) for kind in KINDS},
            connections=int(values["connections"]),
            received=int(values["received"]),
            sent=int(values["sent"]),
        )


@contextmanager
def moto_server() -> Iterator[int]:
    """Run moto's server; gives its port. Raises RuntimeError where moto is not installed."""
    program = Path(sys.executable).with_name("moto_server")
    if not program.exists():
        raise RuntimeError(f"{program} is missing; install the group of packages `dev`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [str(program), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Objects stay in memory, whatever their size.
        env=os.environ | ENVIRONMENT | {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(2**30)},
    )
    try:
        _await(f"http://127.0.0.1:{port}/moto-api/")
        yield port
    finally:
        process.terminate()
        process.wait()


def _await(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url} does not answer within a minute") from error
            time.sleep(0.1)


@contextmanager
def counting_proxy(port: int) -> Iterator[CountingProxy]:
    """Run a proxy before the server at `port`."""
    context = get_context("spawn")
    shared = context.Array("d", len(FIELDS))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(port, shared, sender), daemon=True)
    process.start()
    try:
        yield CountingProxy(f"http://127.0.0.1:{receiver.recv()}", shared)
    finally:
        process.terminate()
        process.join()


def _serve(port: int, shared: Any, sender: Any) -> None:
    handler = type("Handler", (_Handler,), {"port": port, "shared": shared})
    server = _Server(("127.0.0.1", 0), handler)
    sender.send(server.server_address[1])
    server.serve_forever()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections beyond it are made a second later


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    port: int
    shared: Any

    def setup(self) -> None:
        super().setup()
        self._count("connections")
        self._onward = HTTPConnection("127.0.0.1", self.port, timeout=60)

    def finish(self) -> None:
        self._onward.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def _count(self, field: str, by: int = 1) -> None:
        with self.shared.get_lock():
            self.shared[FIELDS.index(field)] += by

    def _pass_on(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0].strip("/")
        self._count("LIST" if self.command == "GET" and "/" not in path else self.command)
        self._count("sent", len(body or b""))
        time.sleep(self.shared[FIELDS.index("latency")])
        dropped = {"expect", "transfer-encoding", "connection", "content-length"}
        headers = {name: value for name, value in self.headers.items()
                   if name.lower() not in dropped}  # fmt: skip
        if body is not None:
            headers["Content-Length"] = str(len(body))
        self._onward.request(self.command, self.path, body, headers)
        answer = self._onward.getresponse()
        self.send_response_only(answer.status)
        length = answer.getheader("Content-Length")
        content = answer.read() if length is None else None
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content or b"")))
        self.end_headers()
        # Counted before it is sent: who has all of it finds it counted.
        if content:
            self._count("received", len(content))
            self.wfile.write(content)
        while chunk := answer.read(CHUNK):
            self._count("received", len(chunk))
            self.wfile.write(chunk)

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts: list[bytes] = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(parts)
        length = self.headers.get("Content-Length")
        return None if length is None else self.rfile.read(int(length))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on
