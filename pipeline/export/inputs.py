"""How texts and pictures become a model's inputs, as files that transformers reads.

Enters: a run's tokenizer, its config. Leaves: tokenizer.json, tokenizer_config.json,
preprocessor_config.json.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from pipeline.config.schema import Config
from pipeline.data.text import Tokenizer

BICUBIC = 3  # Pillow's number


def save_tokenizer(tokenizer: Tokenizer, length: int, folder: Path) -> None:
    """Write the tokenizer: start, the text's tokens, end, padding up to `length` where asked for.

    The names of its special tokens in a text are text like any other, as in training.
    """
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(tokenizer.json)
    backend.no_padding()
    backend.no_truncation()
    start, end = (_name(backend, each) for each in (tokenizer.start, tokenizer.end))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[start, "$A", end],
        pair=[start, "$A", end, "$B", end],
        special_tokens=[(start, tokenizer.start), (end, tokenizer.end)],
    )
    more: dict[str, Any] = {}
    if tokenizer.mask is not None:
        more["mask_token"] = _name(backend, tokenizer.mask)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        pad_token=_name(backend, tokenizer.pad),
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        split_special_tokens=True,
        **more,
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # The name that every version knows.
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _name(backend: tokenizers.Tokenizer, number: int) -> str:
    name = backend.id_to_token(number)
    assert name is not None, "special ids are of the vocabulary"
    return name


def save_pictures(config: Config, folder: Path) -> None:
    """Write how evaluation prepares pictures: the centre square, or the whole with data.squeeze."""
    size, data = config.model.image.size, config.data
    square = {"height": size, "width": size}
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if data.squeeze else {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": not data.squeeze,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.image_mean),
        "image_std": list(data.image_std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")
