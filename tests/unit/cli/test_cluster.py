"""Where the Jobs API is, and what is refused before and by it."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cli.cluster import check_version, find_address, find_job, refusals, warn_of_open_line
from pipeline.errors import UserError

URL = "http://10.0.0.1:8265"
TUNNEL = "http://127.0.0.1:8265"


class _Client:
    """A client of a cluster with some jobs."""

    _server_ray_version = "2.60.0"

    def __init__(self, url: str = URL, jobs: tuple[str, ...] = ()):
        self._url, self._jobs = url, jobs

    def get_address(self) -> str:
        return self._url

    def list_jobs(self) -> list[Any]:
        jobs = [
            SimpleNamespace(submission_id=name, job_id="0100", start_time=time)
            for time, name in enumerate(self._jobs)
        ]
        return [*jobs, SimpleNamespace(submission_id=None, job_id="0200", start_time=9)]


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, TUNNEL),
        (None, {"RAY_ADDRESS": "http://b:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "auto"}, TUNNEL),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, TUNNEL),
        (None, {"RAY_ADDRESS": "ray://10.0.0.1:10001"}, TUNNEL),
        (None, {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": "https://c"}, "https://c"),
        ("http://a:1/", {"RAY_API_SERVER_ADDRESS": "https://c"}, "http://a:1"),
    ],
)
def test_the_address(given: str | None, environment: dict[str, str], address: str) -> None:
    assert find_address(given, environment) == address


@pytest.mark.parametrize("given", ["ray://a:10001", "a:8265", "auto", "http://", ""])
def test_an_address_that_is_none(given: str) -> None:
    if given:
        with pytest.raises(UserError, match=r"--address: .* is no URL of a dashboard; give http"):
            find_address(given, {})
    else:
        assert find_address(given, {}) == TUNNEL
    with pytest.raises(UserError, match="RAY_API_SERVER_ADDRESS: 'auto' is no URL"):
        find_address(None, {"RAY_API_SERVER_ADDRESS": "auto"})


@pytest.mark.parametrize(
    ("url", "mode", "is_warned"),
    [
        (URL, "token", True),
        (URL, "disabled", False),
        (TUNNEL, "token", False),
        ("https://ray.example.com", "token", False),
    ],
)
def test_a_token_in_the_open_is_warned_of(
    url: str, mode: str, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    warning = warn_of_open_line(_Client(url))  # pyright: ignore[reportArgumentType]
    assert ("goes to 10.0.0.1:8265 unencrypted" in (warning or "")) == is_warned


def test_another_version_of_ray_is_refused() -> None:
    import ray

    client: Any = _Client()
    client._server_ray_version = ray.__version__
    check_version(client)
    client._server_ray_version = "2.9.3"
    with pytest.raises(UserError, match=r"the cluster runs Ray 2.9.3, here is .*; install"):
        check_version(client)


def test_a_job_is_found_by_its_id() -> None:
    client: Any = _Client(jobs=("demo-1", "demo-2"))
    assert find_job(client, "demo-2").submission_id == "demo-2"


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ((), "none has been submitted there"),
        (("demo-1", "b", "c", "d", "e"), r"did you mean one of \['demo-1'\]\?"),
        (("b", "c", "d", "e"), r"did you mean one of \['e', 'd', 'c'\]\?"),
    ],
)
def test_an_unknown_job_is_answered_with_near_or_recent_ones(
    jobs: tuple[str, ...], said: str
) -> None:
    client: Any = _Client(jobs=jobs)
    with pytest.raises(UserError, match=f"no job 'demo-0'; {said}"):
        find_job(client, "demo-0")


def test_what_goes_wrong_is_one_sentence() -> None:
    import requests
    from ray.exceptions import AuthenticationError

    for error, said in (
        (AuthenticationError("Authentication required: a\n\nb"), "wants a token and none was sent"),
        (AuthenticationError("Authentication failed: a\n\nb"), "refuses the token that was sent"),
        (ConnectionError("Failed"), "no Ray cluster answers there"),
        (requests.ConnectTimeout(), "no Ray cluster answers there"),
        (
            RuntimeError("Request failed\nwith status code 500"),
            r"failed with status code 500\); is",
        ),
        (requests.exceptions.JSONDecodeError("no", "", 0), "is it Ray's"),
    ):
        with pytest.raises(UserError, match=said) as raised, refusals(URL):
            raise error
        assert str(raised.value).startswith(f"{URL}: ")
        assert "\n" not in str(raised.value)
