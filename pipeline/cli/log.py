"""Where a command sends what Ray and DeepSpeed print."""

import tempfile
import time
from pathlib import Path

from rich.console import Console

from pipeline.cli.screen import plain


def cached_log(console: Console, name: str) -> Path:
    """A new log under ~/.cache; where that cannot be written, and it is said, where it can be."""
    try:
        folder = Path.home() / ".cache" / "gammaray" / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        folder = Path(tempfile.mkdtemp(prefix="gammaray-logs-"))
        console.print(
            f"warning: ~/.cache/gammaray/logs cannot be written ({plain(str(error))}): the log "
            f"goes to {folder}",
            soft_wrap=True,
        )
    return folder / stamped(name)


def stamped(name: str) -> str:
    """The name of a log that begins now."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
