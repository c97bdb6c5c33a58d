"""How CPUs and GPUs are shared by the processes that keep a large function."""

from typing import Any

import pytest

from pipeline.data.prepare import on_ray
from pipeline.data.prepare.on_ray import Keepers


@pytest.mark.parametrize(
    ("nodes", "keepers", "expected"),
    [
        ([(2, 0)], Keepers(), (2, 0, 1)),
        ([(2, 0)], Keepers(count=2), (1, 0, 2)),
        ([(16, 0)], Keepers(), (4, 0, 4)),
        ([(16, 0)], Keepers(count=8), (2, 0, 8)),
        ([(0, 0), (8, 0)], Keepers(), (4, 0, 2)),
        ([(2, 0)], Keepers(count=5), (1, 0, 5)),
        ([(16, 2), (8, 0)], Keepers(), (8, 1, 2)),
        ([(2, 4)], Keepers(), (1, 1, 4)),
        ([(2, 0)], Keepers(on_gpu=True), (4, 1, 1)),
    ],
)
def test_cpus_and_gpus_of_each_and_their_number(
    nodes: list[tuple[int, int]],
    keepers: Keepers,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
        for cpus, gpus in nodes
    ]
    lost = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(on_ray.ray, "nodes", lambda: [*listed, lost])
    assert on_ray._shares(keepers) == expected
