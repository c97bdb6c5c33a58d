"""One YAML file and dotted overrides -> one frozen `Config`, or all that is wrong with them.

Enters: a path, overrides such as `train.global_batch=512`. Leaves: `Config`, `dump`.
Must not know: what the values are used for.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.schema import Config, resolve_path
from pipeline.errors import Problem, UserError, raise_problems


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML at `path`, apply `overrides` (`a.b=value`, value in YAML), validate.

    Raises `UserError` that lists every unknown key (with the nearest right name) and every wrong
    value by its dotted path.
    """
    return parse_config(read_values(path, overrides), str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Give the plain values of the YAML at `path` with `overrides` applied. Raises `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; give the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}; a config is a mapping of sections")
    return override_values(values, overrides)


def override_values(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Give a copy of plain `values` with `a.b=value` applied."""
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply(changed, override)
    return changed


def parse_config(values: Mapping[str, Any], source: str) -> Config:
    """Validate plain `values` (as YAML or JSON gives them); `source` is named in the error."""
    try:
        return _absolute(Config.model_validate(_tuples(values)))
    except ValidationError as error:
        raise_problems([_explain(item) for item in error.errors()], source)
        raise AssertionError("unreachable: a ValidationError has at least one item") from error


def dump(config: Config) -> str:
    """Give `config` as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _absolute(config: Config) -> Config:
    """Make local paths absolute: workers run in other folders."""
    data, base = config.data, Path.cwd()
    sources = [
        source.model_copy(update={"path": resolve_path(source.path, base)}) for source in data.train
    ]
    changes: dict[str, Any] = {"train": tuple(sources)}
    if data.val is not None:
        changes["val"] = resolve_path(data.val, base)
    if data.synonyms is not None:
        changes["synonyms"] = resolve_path(data.synonyms, base)
    if data.tokenizer != "train" and Path(data.tokenizer).exists():
        changes["tokenizer"] = resolve_path(data.tokenizer, base)
    model = config.model
    paths: dict[str, Any] = {"init": None if model.init is None else resolve_path(model.init, base)}
    if model.pretrained is not None and Path(model.pretrained).exists():
        paths["pretrained"] = resolve_path(model.pretrained, base)
    for tower, part in (("image", model.image), ("text", model.text)):
        if part.pretrained is not None and Path(part.pretrained).exists():
            found = resolve_path(part.pretrained, base)
            paths[tower] = part.model_copy(update={"pretrained": found})
    model = model.model_copy(update=paths)
    task = config.task
    if task is not None and task.answers is not None:
        task = task.model_copy(update={"answers": resolve_path(task.answers, base)})
    probes = tuple(
        probe.model_copy(
            update={
                name: resolve_path(path, base)
                for name, path in (("train", probe.train), ("test", probe.test))
                if path is not None
            }
        )
        for probe in config.evaluate.linear_probe
    )
    tasks = tuple(
        each.model_copy(update={"classes": resolve_path(each.classes, base)})
        if each.classes is not None
        else each
        for each in config.evaluate.zero_shot
    )
    uri, scheme = config.tracking.uri, "sqlite:///"
    if uri.startswith(scheme):
        uri = scheme + resolve_path(uri.removeprefix(scheme), base)
    storage = resolve_path(config.cluster.storage, base)
    return config.model_copy(
        update={
            "data": data.model_copy(update=changes),
            "model": model,
            "task": task,
            "evaluate": config.evaluate.model_copy(
                update={"linear_probe": probes, "zero_shot": tasks}
            ),
            "tracking": config.tracking.model_copy(update={"uri": uri}),
            "cluster": config.cluster.model_copy(update={"storage": storage}),
        }
    )


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write it as section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
        values = inner
    try:
        values[last] = _float_like(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _float_like(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; read it as the number everyone means."""
    if isinstance(value, str):
        try:
            return float(value) if value[:1].isdigit() and "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _tuples(value: Any) -> Any:
    """Lists become tuples and 1e-3 a number, so that strict validation takes what YAML gives."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return _float_like(value)


def _explain(item: Any) -> Problem:
    path = [part for part in item["loc"] if not _is_union_tag(part)]
    place = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        names = _fields_at(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, path[:-1]), near[0]])}?" if near else None
        return Problem(place=place, message=f"unknown key; {hint or f'keys here: {names}'}")
    if item["type"] == "missing":
        return Problem(place=place, message="missing; it has no default, so it must be given")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] != "value_error":
        message = f"is {item['input']!r}; {message}"
    return Problem(place=place or "config", message=message)


def _is_union_tag(part: Any) -> bool:
    """Pydantic names the branch of a union in the path, e.g. `constrained-int`; not a key."""
    return isinstance(part, str) and (
        "[" in part or part in {"int", "constrained-int", "constrained-float", "str"}
    )


def _fields_at(path: Sequence[Any]) -> list[str]:
    """The field names of the section at `path`."""
    model: Any = Config
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(model.model_fields)
