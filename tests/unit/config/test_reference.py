"""The reference: what the schema says now, of every key, with units of keys that exist."""

from pathlib import Path

from pipeline.config.load import parse_config
from pipeline.config.reference import ALSO, UNITS, reference, tables
from pipeline.config.schema import Config, flatten

FILE = Path("configs/REFERENCE.md")
KEYS = {key.path: key for table in tables() for key in table.keys}


def test_the_file_is_what_the_schema_says_now() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), (
        f"out of date: python -m pipeline.config.reference > {FILE}"
    )


def test_every_key_and_every_section_says_what_it_means() -> None:
    assert [path for path, key in KEYS.items() if not key.meaning] == []
    assert [table.path for table in tables() if not table.meaning] == []


def test_every_key_of_a_config_is_there() -> None:
    values = {
        "name": "a",
        "data": {"train": [{"path": "a", "weight": 2.0}, {"path": "b"}]},
        "train": {"samples": 1},
        "cluster": {"workers": {"min": 1, "max": 2}},
    }
    config = parse_config(values, "here")
    lists = {"data.train", "evaluate.zero_shot", "evaluate.linear_probe"}
    assert set(flatten(config)) <= set(KEYS) | lists
    assert {name for name in Config.model_fields if not any(path.split(".")[0] == name
            for path in KEYS)} == set()  # fmt: skip


def test_units_are_those_of_keys() -> None:
    assert set(UNITS) <= set(KEYS)
    assert set(ALSO) <= set(KEYS)


def test_a_row_says_type_bounds_unit_and_default() -> None:
    rows = {path: key.row for path, key in KEYS.items()}
    assert rows["model.text.context_length"].startswith(
        "| `model.text.context_length` | integer ≥ 3 | tokens | `77` | Tokens a caption"
    )
    assert "integer ≥ 2 or `global` | pairs | `global` |" in rows["loss.virtual_batch"]
    assert "| number > 0, < 1 |  | `0.15` |" in rows["fusion.mask_share"]
    assert "| text or list (at least 1): keys `data.train[].…` |  |  |" in rows["data.train"]
    assert "| `0`, `1`, `2`, `3` |  | `1` |" in rows["engine.zero_stage"]
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows.values())
