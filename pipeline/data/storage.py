"""Where files lie: a path or URL to a filesystem, and reads that survive a bad moment.

Enters: local paths, s3:// and gs:// URLs, any URL fsspec knows. Leaves: a pyarrow filesystem and
the path on it. Must not know: what the files hold.
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

ATTEMPTS = 6  # reads of a remote file: about a minute with the pauses between
LONGEST_PAUSE = 20.0  # seconds
ARROW_SCHEMES = ("file", "gs", "gcs", "hdfs", "abfs", "abfss")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
S3_OPTIONS = ("endpoint_override", "scheme", "region")
FULL = ("no space left", "quota exceeded", "quotaexceeded", "errno 28", "errno 122")
LOG = logging.getLogger(__name__)
T = TypeVar("T")


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """Give the filesystem of `path` (local or URL) and the path on it.

    S3 takes its credentials from where AWS tools look for them, its region and endpoint from the
    URL (s3://bucket/folder?region=...&endpoint_override=http://host:port) or else from AWS_REGION
    or AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL. Raises OSError or
    `pa.ArrowInvalid` for a URL that names no filesystem.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path).absolute())
    scheme = path.partition("://")[0]
    if scheme in ("s3", "s3a"):
        return _open_s3(path)
    if scheme in ARROW_SCHEMES:
        return pafs.FileSystem.from_uri(path)
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise pa.ArrowInvalid(f"{path} names no filesystem: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def _open_s3(url: str) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    unknown = sorted(set(options) - set(S3_OPTIONS))
    if unknown:
        raise pa.ArrowInvalid(f"{url}: {unknown} is not among {list(S3_OPTIONS)}")
    endpoint = options.get("endpoint_override") or _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = options.get("region") or _first("AWS_REGION", "AWS_DEFAULT_REGION")
    if endpoint is not None and "://" in endpoint:
        options["scheme"], _, endpoint = endpoint.partition("://")
    # A wrong region costs a redirect; asking for the bucket's would need the network here.
    filesystem = _s3_client(
        endpoint,
        options.get("scheme", "https"),
        region or "us-east-1",
        tuple(os.environ.get(name) for name in CREDENTIALS),
    )
    return filesystem, f"{parts.netloc}{parts.path}".rstrip("/")


@functools.lru_cache(maxsize=16)
def _s3_client(
    endpoint: str | None, scheme: str, region: str, credentials: tuple[str | None, ...]
) -> pafs.S3FileSystem:
    """One client, and so one pool of connections, for each place and owner in this process."""
    del credentials  # the client finds them where AWS tools look; other ones need another client
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        scheme=scheme,
        region=region,
        connect_timeout=10,
        request_timeout=30,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=5),
        allow_delayed_open=True,  # a small file is one request, not three
    )


def _first(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def retried(read: Callable[[], T], what: str, filesystem: pafs.FileSystem) -> T:
    """Call `read`; a remote file that cannot be read is tried again, with growing, random pauses.

    `what` is named in the log of each try. The last error is raised as it is. What will not get
    better is not tried again: local files, files that are not there, refused credentials.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return read()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=1, max=LONGEST_PAUSE),
        before_sleep=lambda state: LOG.warning(
            "%s: try %d of %d failed: %s",
            what,
            state.attempt_number,
            ATTEMPTS,
            state.outcome.exception() if state.outcome else None,
        ),
        reraise=True,
    )
    return retrying(read)


def _may_pass(error: BaseException) -> bool:
    is_final = isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in str(error)
    is_final = is_final or _is_refused(error)
    return isinstance(error, OSError | pa.ArrowException) and not is_final


def _is_refused(error: BaseException) -> bool:
    refused = ("access_denied", "invalid_access_key", "invalid_client_token", "expired",
               "signature_does_not_match", "unrecognized_client", "status 403")  # fmt: skip
    return isinstance(error, PermissionError) or any(word in str(error).lower() for word in refused)


def explain(error: BaseException) -> str:
    """Say what went wrong in a read or write, and what to do where that can be known."""
    text = str(error).strip().rstrip(":")
    if _is_refused(error):
        return f"{text}; the storage refuses these credentials: renew them, or ask for the right"
    if any(word in text.lower() for word in FULL):
        return f"{text}; the disk or its quota is full: make room, or use another cluster.storage"
    if "RequestTimeTooSkewed" in text:
        return f"{text}; this machine's clock is wrong: set it (NTP), the storage compares it"
    return text
