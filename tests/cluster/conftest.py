"""What the files of `cluster/` must agree with."""

import tomllib

import pytest

from pipeline.config.load import load_config
from pipeline.config.schema import ClusterConfig
from tests.cluster.manifests import ROOT


@pytest.fixture(scope="session")
def version() -> str:
    """The project's version."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="session")
def example() -> ClusterConfig:
    """What the config for a GPU cluster asks of it."""
    return load_config(ROOT / "configs" / "vit_b32_8gpu.yaml", ()).cluster
