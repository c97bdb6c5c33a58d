"""A real S3 server in a process, and a proxy before it that spoils chosen answers."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_REGION": "us-east-1",
}
EXPIRED = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>
<Message>The provided token has expired.</Message></Error>"""

Fault = Callable[["_Handler", HTTPResponse, bytes], None]


@contextmanager
def s3_server() -> Iterator[int]:
    """Run a server; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


@dataclass(kw_only=True)
class Proxy:
    """Passes requests on to `port`. `spoil` chooses the fault of a GET: path, its how-manieth.

    While it `is_down` it answers nothing; a PUT takes `put_seconds` longer; `puts` are their paths.
    """

    port: int
    is_down: bool = False
    put_seconds: float = 0.0
    puts: list[str] = field(default_factory=list)
    spoil: Callable[[str, int], Fault | None] = lambda path, count: None
    counts: dict[str, int] = field(default_factory=dict)
    spoiled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def choose(self, path: str) -> Fault | None:
        """Count a GET of `path`, and give its fault."""
        with self.lock:
            self.counts[path] = self.counts.get(path, 0) + 1
            fault = self.spoil(path, self.counts[path])
            self.spoiled += fault is not None
            return fault


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """Run a proxy before the server at `port`."""
    state = Proxy(port=port)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Proxy

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length) if length else None
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _pass_on(self) -> None:
        body = self._body()
        if self.state.is_down:
            _hang_up(self)
            return
        if self.command == "PUT":
            self.state.puts.append(self.path.partition("?")[0])
            time.sleep(self.state.put_seconds)
        onward = HTTPConnection("127.0.0.1", self.state.port, timeout=60)
        headers = {name: value for name, value in self.headers.items()
                   if name.lower() not in ("transfer-encoding", "expect")}  # fmt: skip
        onward.request(self.command, self.path, body, headers)
        answer = onward.getresponse()
        content = answer.read()
        onward.close()
        fault = self.state.choose(self.path.partition("?")[0]) if self.command == "GET" else None
        if fault is not None:
            fault(self, answer, content)
            return
        self.send_whole(answer, content)

    def send_whole(self, answer: HTTPResponse, content: bytes) -> None:
        self.send_response(answer.status)
        dropped = {"transfer-encoding", "connection", "content-length", "server", "date"}
        for name, value in answer.getheaders():
            if name.lower() not in dropped:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on


def reset(handler: _Handler, answer: HTTPResponse, content: bytes) -> None:
    """Close the connection without an answer."""
    del answer, content
    _hang_up(handler)


def _hang_up(handler: _Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.close_connection = True
    handler.connection.close()


def unavailable(handler: _Handler, answer: HTTPResponse, content: bytes) -> None:
    """503 Slow Down."""
    del answer, content
    body = (
        b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    _refuse(handler, 503, body)


def expired(handler: _Handler, answer: HTTPResponse, content: bytes) -> None:
    """403 ExpiredToken."""
    del answer, content
    _refuse(handler, 403, EXPIRED)


def _refuse(handler: _Handler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def truncated(handler: _Handler, answer: HTTPResponse, content: bytes) -> None:
    """Announce the whole body, send half of it, and close."""
    handler.send_response(answer.status)
    for name in ("Content-Type", "Content-Range", "ETag", "Last-Modified"):
        if (value := answer.getheader(name)) is not None:
            handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def slow(handler: _Handler, answer: HTTPResponse, content: bytes) -> None:
    """A second passes before the answer."""
    time.sleep(1)
    handler.send_whole(answer, content)
