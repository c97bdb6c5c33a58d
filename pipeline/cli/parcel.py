"""What a submitted job takes along: the files of the current folder, and environment variables.

Neither may hold data or secrets: the head keeps both, and shows the variables.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import is_elsewhere
from pipeline.errors import Problem, UserError

LOG = logging.getLogger(__name__)
# As in .gitignore; a leading slash: only in the folder itself (pipeline/data is no data).
EXCLUDES = [
    "/data", "/datasets", "/runs", "/mlruns", "/mlartifacts", "/logs", "/build", "/dist", "/.demo",
    ".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis",
    "*.parquet", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.log", "*.db",
    ".env", ".env.*", "*.pem", "*.key", ".aws", ".ssh", ".ray", "auth_token",
]  # fmt: skip
SECRET_WORD = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL)S?$")
PASSWORD_IN_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")
LIMIT = 100 * 2**20  # bytes that Ray's dashboard takes in one request
ZIP_OVERHEAD = 256  # bytes a file costs beside its content
NAMED = 5  # things named when the folder is too large


def files_to_send(folder: Path) -> dict[str, int]:
    """Size by path of what Ray will pack: all but `EXCLUDES` and what .gitignore names."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    try:
        excludes = [_get_excludes(folder, EXCLUDES)]
        heeds_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"  # as Ray
        _dir_travel(folder, excludes, take, include_gitignore=heeds_git, logger=LOG)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({error}); submit from another folder"
        ) from error
    return sizes


def check_size(folder: Path, sizes: Mapping[str, int], limit: int = LIMIT) -> None:
    """Raise `UserError` that names the largest things unless the files fit into `limit` bytes."""
    total = sum(sizes.values()) + ZIP_OVERHEAD * len(sizes)
    if total < limit:
        return
    things: dict[str, int] = {}
    for path, size in sizes.items():
        top, slash, _ = path.partition("/")
        things[top + slash] = things.get(top + slash, 0) + size
    largest = sorted(things, key=lambda name: -things[name])[:NAMED]
    listing = ", ".join(f"{name} {_megabytes(things[name])}" for name in largest)
    raise UserError(
        f"{folder}: {len(sizes):,} files of {_megabytes(total)} would be sent to the cluster, "
        f"which takes less than {_megabytes(limit)} (the largest: {listing}); name what the job "
        "does not need in .gitignore or .rayignore, or submit from a smaller folder"
    )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def check_config_goes_along(config: Path, folder: Path, sizes: Mapping[str, int]) -> str:
    """The config's path in `folder`. Raises `UserError` when it is not among what is sent."""
    path = config.resolve()
    if not path.is_relative_to(folder):
        raise UserError(
            f"{config}: lies outside {folder}, the folder that is sent to the cluster; copy it "
            "into that folder, or submit from a folder that holds it"
        )
    inside = path.relative_to(folder).as_posix()
    if inside not in sizes:
        raise UserError(
            f"{config}: is left out of what is sent to the cluster (by .gitignore, .rayignore or "
            f"{EXCLUDES}); move it"
        )
    return inside


def read_variables(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as a dict. Raises `UserError` for what is no variable, or may be a secret."""
    variables: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name or text!r}: write it as NAME=VALUE")
        if is_secret(name) or PASSWORD_IN_URL.search(value):
            raise UserError(
                f"--env {name}: looks like a secret, and the dashboard keeps a job's variables; "
                "give secrets to the cluster itself: instance roles, a Kubernetes secret"
            )
        variables[name] = value
    return variables


def is_secret(name: str) -> bool:
    """Whether a variable of that name is likely to hold a secret."""
    return any(SECRET_WORD.search(word) for word in name.upper().split("_"))


def find_lost_paths(values: Mapping[str, Any], sizes: Mapping[str, int]) -> list[Problem]:
    """Paths in a config (as it is written) that a job elsewhere would not find, or would lose.

    Whatever is relative is relative to a copy of the folder, which is removed after the job.
    """
    problems = []
    storage = _get(values, "cluster.storage") or "runs"
    for place, path in {"cluster.storage": storage, **_data_paths(values)}.items():
        if _is_relative(path):
            problems.append(
                Problem(
                    place=place,
                    message=f"is {path!r}, relative; the job runs in a copy of this folder on the "
                    "cluster, without data and removed after it: give a URL, or an absolute path "
                    "that all nodes share",
                )
            )
    uri = _get(values, "tracking.uri") or "embedded"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        problems.append(
            Problem(
                place="tracking.uri",
                message=f"is {uri!r}, relative to a copy of this folder that is removed after the "
                "job: give an MLflow server's URI",
            )
        )
    places = (
        "data.tokenizer", "data.synonyms", "task.answers",
        "model.pretrained", "model.image.pretrained", "model.text.pretrained",
    )  # fmt: skip
    files = {place: _get(values, place) for place in places}
    for index, task in enumerate(_get(values, "evaluate.zero_shot") or ()):
        files[f"evaluate.zero_shot.{index}.classes"] = task.get("classes")
    for place, path in files.items():
        if path and _is_relative(path) and Path(path).exists() and not _is_sent(path, sizes):
            problems.append(
                Problem(
                    place=place,
                    message=f"is {path!r}, which is left out of what is sent to the cluster; give "
                    "an absolute path that all nodes share",
                )
            )
    return problems


def local_paths(values: Mapping[str, Any]) -> list[str]:
    """The places of a config that name absolute paths, which every node must have."""
    named = {"cluster.storage": _get(values, "cluster.storage"), **_data_paths(values)}
    return [f"{place} {path}" for place, path in named.items() if path and Path(path).is_absolute()]


def find_passwords(flat: Mapping[str, Any]) -> list[Problem]:
    """Values of a flat config that carry a password: the tracker and the dashboard show them."""
    return [
        Problem(
            place=place,
            message="holds a password, and MLflow and the dashboard show it; give it to the "
            "cluster itself, such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
        for place, value in flat.items()
        if PASSWORD_IN_URL.search(str(value))
    ]


def _data_paths(values: Mapping[str, Any]) -> dict[str, str]:
    train = _get(values, "data.train")
    sources = [{"path": train}] if isinstance(train, str) else train or []
    paths = {
        "data.train" if isinstance(train, str) else f"data.train.{index}.path": source["path"]
        for index, source in enumerate(sources)
    }
    more = {place: _get(values, place) for place in ("data.val", "model.init")}
    return paths | {place: path for place, path in more.items() if path}


def _get(values: Mapping[str, Any], place: str) -> Any:
    found: Any = values
    for key in place.split("."):
        found = (found or {}).get(key)
    return found


def _is_relative(path: str) -> bool:
    return not is_elsewhere(path) and not Path(path).is_absolute()


def _is_sent(path: str, sizes: Mapping[str, int]) -> bool:
    inside = Path(path).as_posix()
    return any(name == inside or name.startswith(f"{inside}/") for name in sizes)
