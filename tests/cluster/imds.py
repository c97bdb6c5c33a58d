"""EC2's instance metadata service, version 2, for one instance and as far as a watcher needs it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIFE_CYCLE = "/latest/meta-data/instance-life-cycle"
NOTICE = "/latest/meta-data/spot/instance-action"
TOKEN_HEADER = "X-aws-ec2-metadata-token"


@dataclass
class Imds:
    """What the service says; tests change it while it runs."""

    url: str = ""
    life_cycle: str = "spot"
    notice: str | None = None
    throttled: int = 0  # answers to come that are 503
    tokens: list[str] = field(default_factory=list)  # the last is valid, if any
    asked: list[tuple[str, int]] = field(default_factory=list)  # path and status of each answer
    answered: threading.Condition = field(default_factory=threading.Condition)

    def give_notice(self, seconds: float, action: str = "terminate") -> None:
        """Say that the instance goes in `seconds`, in the words of EC2."""
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        self.notice = json.dumps({"action": action, "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})

    def expire(self) -> None:
        """Refuse all tokens given so far."""
        self.tokens.append("")

    def wait_until_asked(self, path: str, times: int = 1, timeout: float = 30.0) -> None:
        """Return when `path` has been answered so many more times."""
        before = self._count(path)
        with self.answered:
            assert self.answered.wait_for(lambda: self._count(path) >= before + times, timeout), (
                self.asked
            )

    def _count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


@contextmanager
def serving() -> Iterator[Imds]:
    """Serve on a free port of this machine."""
    imds = Imds()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seconds = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0"))
            if self.path != "/latest/api/token" or not 1 <= seconds <= 21600:
                self._answer(400)
                return
            imds.tokens.append(f"token-{len(imds.tokens)}")
            self._answer(200, imds.tokens[-1])

        def do_GET(self) -> None:
            given = self.headers.get(TOKEN_HEADER)
            if imds.throttled > 0:
                imds.throttled -= 1
                self._answer(503)
            elif not given or not imds.tokens or given != imds.tokens[-1]:
                self._answer(401)
            else:
                text = {LIFE_CYCLE: imds.life_cycle, NOTICE: imds.notice}.get(self.path)
                self._answer(404 if text is None else 200, text or "")

        def _answer(self, status: int, text: str = "") -> None:
            with imds.answered:
                imds.asked.append((self.path, status))
                imds.answered.notify_all()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the tests look at `asked`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    imds.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield imds
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
