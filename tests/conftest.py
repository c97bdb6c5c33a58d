"""Fixtures shared by all tests."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long a thing takes is for benchmarks
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray in this process for the tests of a module that need no isolation.

    It must not outlive the module: others start, starve and kill Rays of their own beside it, and a
    process whose Ray has died ends without a word. Nor may it join one that was left behind.
    """
    import ray

    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    # What Ray Data was reading for a generator that was dropped half way ends with that: after the
    # shutdown it would start another Ray, and wait for it as long as pytest lets a test last.
    gc.collect()
    ray.shutdown()
