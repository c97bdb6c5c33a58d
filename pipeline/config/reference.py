"""`configs/REFERENCE.md`: every key of a config, from the schema.

Enters: the schema. Leaves: Markdown. Must not know: what the values are used for.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Config

HEAD = """# Config reference

Every key of a run's YAML, made from `pipeline/config/schema.py`:
`python -m pipeline.config.reference > configs/REFERENCE.md`. A test fails when it is out of date.

Every key can be overridden on the command line as `section.key=value`, the value in YAML:
`gammaray plan configs/demo.yaml optim.lr=1e-3 'cluster.workers={min: 2, max: 8}'`. `[]` stands for
one item of a list. A key without default must be given where its section is.
"""

UNITS = {
    "data.vocab_size": "tokens",
    "data.shuffle_window": "rows",
    "model.image.size": "pixels",
    "model.image.patch": "pixels",
    "model.text.context_length": "tokens",
    "loss.queue_size": "pairs",
    "loss.virtual_batch": "pairs",
    "loss.exchange": "workers",
    "loss.rho": "nats",
    "structure.separation.start_samples": "samples",
    "structure.separation.ramp_samples": "samples",
    "structure.bridge.start_samples": "samples",
    "structure.bridge.ramp_samples": "samples",
    "structure.consistency.start_samples": "samples",
    "structure.consistency.ramp_samples": "samples",
    "fusion.distillation_ramp_samples": "samples",
    "task.max_answers": "answers",
    "task.distillation_ramp_samples": "samples",
    "task.ranked": "answers",
    "optim.warmup_samples": "samples",
    "engine.micro_batch": "pairs",
    "train.global_batch": "pairs",
    "train.samples": "pairs",
    "train.epochs": "epochs",
    "train.checkpoint_every": "steps",
    "train.keep": "checkpoints",
    "train.log_every": "steps",
    "train.max_nonfinite": "steps",
    "evaluate.every": "steps",
    "evaluate.max_rows": "rows",
    "evaluate.batch": "rows",
    "evaluate.rerank": "results",
    "evaluate.linear_probe[].shots": "rows a class",
    "tracking.system_metrics_seconds": "seconds",
    "cluster.workers": "workers",
    "cluster.workers.min": "workers",
    "cluster.workers.max": "workers",
    "cluster.workers.check_every_s": "seconds",
    "cluster.cpus_per_worker": "CPUs",
    "cluster.gpus_per_worker": "GPUs",
    "cluster.ingest_cpus": "CPUs",
    "cluster.max_failures": "failures",
    "cluster.stall_minutes": "minutes",
}
ALSO = {"data.train": "text"}  # what a validator takes beside the field's own type
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a config; `default` is None when it must be given, `meaning` may be empty."""

    path: str
    type: str
    default: str | None
    meaning: str

    @property
    def row(self) -> str:
        """A row of Markdown."""
        default = "" if self.default is None else f"`{self.default}`"
        unit = UNITS.get(self.path, "")
        return f"| `{self.path}` | {self.type} | {unit} | {default} | {self.meaning} |"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A section of a config: its path, empty of the whole; what it is; its keys."""

    path: str
    meaning: str
    keys: list[Key]


def tables() -> list[Table]:
    """Give the tables of all sections, in the schema's order."""
    schema = Config.model_json_schema()
    return list(_tables(schema, schema["$defs"], ""))


def reference() -> str:
    """Give the whole file."""
    parts = [HEAD]
    for table in tables():
        title = f"`{table.path}`" if table.path else "A run"
        head = "| key | type | unit | default | meaning |\n|---|---|---|---|---|"
        rows = "\n".join(key.row for key in table.keys)
        parts.append(f"## {title}\n\n{table.meaning}\n\n{head}\n{rows}\n")
    return "\n".join(parts)


def _tables(section: dict[str, Any], defs: dict[str, Any], path: str) -> Iterator[Table]:
    keys: list[Key] = []
    inner: list[tuple[dict[str, Any], str]] = []
    for name, field in section["properties"].items():
        place = f"{path}.{name}" if path else name
        below = list(_sections(field, defs, place))
        inner += below
        if "$ref" in field:
            continue  # a section and nothing else: its keys say all
        said = [*([ALSO[place]] if place in ALSO else []), *_types(field, defs, place)]
        keys.append(
            Key(
                path=place,
                type=" or ".join(said),
                default=_default(field),
                meaning=field.get("description", ""),
            )
        )
    meaning = " ".join(section["description"].split())
    if keys:
        yield Table(path=path, meaning=meaning, keys=keys)
    for each, place in inner:
        yield from _tables(each, defs, place)


def _sections(
    field: dict[str, Any], defs: dict[str, Any], place: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """The sections that a field may hold, with their paths."""
    if "$ref" in field:
        yield defs[field["$ref"].rpartition("/")[2]], place
    for choice in field.get("anyOf", ()):
        yield from _sections(choice, defs, place)
    if isinstance(field.get("items"), dict):
        yield from _sections(field["items"], defs, f"{place}[]")


def _default(field: dict[str, Any]) -> str | None:
    if "default" not in field:
        return None
    value = field["default"]
    if isinstance(value, float):
        return f"{value:.6g}"
    return "absent" if value is None else json.dumps(value).strip('"')


def _types(field: dict[str, Any], defs: dict[str, Any], place: str) -> list[str]:
    """What a value may be: one text for each of several kinds."""
    if "anyOf" in field:
        return [each for choice in field["anyOf"] for each in _types(choice, defs, place)]
    if "$ref" in field:
        return [f"keys `{place}.…`"]
    if "enum" in field or "const" in field:
        return [", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))]
    if field["type"] == "null":
        return []
    if field["type"] == "array":
        return [_list(field, defs, place)]
    return [NAMES[field["type"]] + _bounds(field)]


def _list(field: dict[str, Any], defs: dict[str, Any], place: str) -> str:
    if "prefixItems" in field:
        (each,) = {" or ".join(_types(item, defs, place)) for item in field["prefixItems"]}
        return f"list of {len(field['prefixItems'])}: {each}"
    at_least = f" (at least {field['minItems']})" if field.get("minItems") else ""
    each = " or ".join(_types(field["items"], defs, f"{place}[]"))
    return f"list{at_least}: {each}"


def _bounds(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{signs[name]} {field[name]:g}" for name in signs if name in field]
    pattern = f" like `{field['pattern']}`" if "pattern" in field else ""
    return (f" {', '.join(bounds)}" if bounds else "") + pattern


if __name__ == "__main__":
    sys.stdout.write(reference())
