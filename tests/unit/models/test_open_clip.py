"""OpenCLIP's form of a configuration, and back."""

from typing import Any

import pytest
from transformers import CLIPConfig

from pipeline.errors import UserError
from pipeline.models.open_clip import read_config, write_config


def _config(end: int) -> CLIPConfig:
    config = CLIPConfig()
    text: Any = config.text_config
    text.eos_token_id = end
    return config


@pytest.mark.parametrize(
    ("end", "pooling"),
    [(49407, {"pool_type": "eos", "eos_id": 49407}), (2, {"pool_type": "argmax"})],
)
def test_texts_are_pooled_where_transformers_does(end: int, pooling: dict[str, Any]) -> None:
    """An end of 2 is a slip of old configurations, which transformers takes for the largest id."""
    written = write_config(_config(end))
    text = written["text_cfg"]
    assert {key: text[key] for key in ("pool_type", "eos_id") if key in text} == pooling
    again: Any = read_config(written).text_config
    assert again.eos_token_id == end


def test_what_clip_has_not_is_refused() -> None:
    written = write_config(_config(2))
    written["vision_cfg"]["mlp_ratio"] = 4.9
    with pytest.raises(UserError, match=r"its vision_cfg.mlp_ratio is 4.9"):
        read_config(written)
