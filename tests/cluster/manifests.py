"""The files of `cluster/` as data, and schemas of Kubernetes read more strictly than it does."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "schemas"

Json = dict[str, Any]


class _Strict(yaml.SafeLoader):
    """Refuses a key that comes twice; YAML's loaders take the last without a word."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Json:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.YAMLError(f"{node.start_mark}: twice: {sorted(twice)}")
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(path: Path) -> list[Json]:
    """Give all documents of a YAML file."""
    return list(yaml.load_all(path.read_text(), Loader=_Strict))


def kubernetes_objects() -> list[Json]:
    """Give every object of the manifests."""
    return [found for path in sorted(KUBERAY.glob("*.yaml")) for found in read(path)]


def pinned(package: str) -> str:
    """Give the version of `package` in constraints.txt."""
    for line in (CLUSTER / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name.lower().replace("_", "-") == package:
            return version
    raise LookupError(f"constraints.txt has no {package}")


@cache
def definition(kind: str) -> Json:
    """Give KubeRay's schema of `kind`; skips where no schemas lie beside the repository."""
    path = SCHEMAS / f"ray.io_{kind}.yaml"
    if not path.exists():
        pytest.skip(f"{path} is not there: KubeRay's definitions are read beside the repository")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [found for found in crd["spec"]["versions"] if found["name"] == "v1"]
    return _closed(version["schema"]["openAPIV3Schema"])


def _closed(schema: Any) -> Any:
    """Forbid what a schema of Kubernetes does not name: its server drops that without a word."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(item) for name, item in value.items()}
        if key == "properties"
        else _closed(value)
        for key, value in schema.items()
    }
    if closed.pop("x-kubernetes-preserve-unknown-fields", False):
        return closed
    if isinstance(closed.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def mistakes(instance: Any, schema: Json) -> Iterator[str]:
    """Say where `instance` departs from `schema`. Draft 4 is what OpenAPI 3.0 comes from."""
    for error in jsonschema.Draft4Validator(schema).iter_errors(instance):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def groups(cluster: Json) -> dict[str, Json]:
    """Give the head and worker groups of a RayCluster's spec by name."""
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def ray_container(group: Json) -> Json:
    """Give the container that runs Ray: the first."""
    return group["template"]["spec"]["containers"][0]


def gibibytes(quantity: str) -> float:
    """Give a Kubernetes quantity in GiB."""
    units = {"Mi": 1 / 1024, "Gi": 1.0, "Ti": 1024.0}
    return float(quantity[:-2]) * units[quantity[-2:]]
