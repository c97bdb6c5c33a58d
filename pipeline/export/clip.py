"""A two-tower model as transformers' CLIPModel, or as OpenCLIP's.

Enters: `Trained`. Leaves: a folder; what its reader must know.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from pipeline.errors import UserError
from pipeline.export.inputs import save_pictures, save_tokenizer
from pipeline.export.trained import Trained
from pipeline.models.open_clip import to_open_clip, write_config
from pipeline.models.towers import MAX_LOGIT_SCALE
from pipeline.models.two_tower import TwoTower, clip_sizes
from pipeline.train.module import TOWERS

USE_TRANSFORMERS = """\
import torch
from PIL import Image, ImageOps
from transformers import CLIPModel, CLIPProcessor

folder, images, texts = ".", [Image.open("picture.jpg")], ["a red circle", "a blue square"]
images = [ImageOps.exif_transpose(each) for each in images]
model = CLIPModel.from_pretrained(folder)
processor = CLIPProcessor.from_pretrained(folder)
inputs = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    found = model(**inputs)
image, text = found.image_embeds, found.text_embeds  # unit norm
probabilities = found.logits_per_image.softmax(dim=1)
"""
USE_OPEN_CLIP = """\
import open_clip  # pip install open_clip_torch
import torch
from PIL import Image, ImageOps

folder, images, texts = ".", [Image.open("picture.jpg")], ["a red circle", "a blue square"]
images = [ImageOps.exif_transpose(each) for each in images]
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
with torch.no_grad():
    image = model.encode_image(torch.stack([preprocess(each) for each in images]), normalize=True)
    text = model.encode_text(tokenizer(texts), normalize=True)
probabilities = (model.logit_scale.exp() * image @ text.T).softmax(dim=1)
"""


def save_transformers(trained: Trained, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write the model; give what its card must say beside."""
    towers = _towers(trained)
    weights = trained.weights(torch.float32, TOWERS)
    clip: Any = CLIPModel(towers.clip_config)  # transformers types `to` wrongly
    known = clip.state_dict()
    clip.load_state_dict({name: weights[name].reshape(known[name].shape) for name in known})
    clip.to(dtype).save_pretrained(folder)
    _save_inputs(trained, towers, folder)
    notes = _notes(trained)
    bias = trained.weights(torch.float32, "logit_bias")
    if bias:
        notes.append(
            f"Trained with a sigmoid loss, whose bias is {bias[''].item():.4f}: a pair's "
            "probability is the sigmoid of its logit plus that. CLIPModel has no place for it."
        )
    return notes


def save_open_clip(trained: Trained, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write the model; give what its card must say beside."""
    towers = _towers(trained)
    try:
        clip_sizes(towers.clip_config)
    except UserError as error:
        raise UserError(
            f"--format: is openclip, which cannot say what this is: {error}; take transformers"
        ) from error
    weights = trained.weights(dtype, TOWERS)
    weights = {name: value for name, value in weights.items() if "independent" not in name}
    weights["logit_scale"] = weights["logit_scale"].squeeze(0)
    model = write_config(towers.clip_config)
    model["text_cfg"]["hf_tokenizer_name"] = trained.record.name  # of a folder: its own files
    bias = trained.weights(dtype, "logit_bias")
    if bias:
        weights["logit_bias"] = bias[""].squeeze(0)
        model["init_logit_bias"] = 0.0
    found = {name: value.contiguous() for name, value in to_open_clip(weights).items()}
    save_file(found, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {
        "model_cfg": model,
        "preprocess_cfg": {
            "mean": list(trained.config.data.image_mean),
            "std": list(trained.config.data.image_std),
            "interpolation": "bicubic",
            "resize_mode": "squash" if trained.config.data.squeeze else "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _save_inputs(trained, towers, folder)
    return [
        *_notes(trained),
        "Before you put this folder on the hub, set `text_cfg.hf_tokenizer_name` in "
        "open_clip_config.json to the repository's id.",
    ]


def _towers(trained: Trained) -> TwoTower:
    towers = trained.module.towers
    assert isinstance(towers, TwoTower), "the form is one of two_tower"
    return towers


def _save_inputs(trained: Trained, towers: TwoTower, folder: Path) -> None:
    length = trained.config.model.text.context_length
    save_tokenizer(trained.record.tokenizer, length, folder)
    save_pictures(trained.config, folder)


def _notes(trained: Trained) -> list[str]:
    towers = _towers(trained)
    notes = []
    if towers.independent_visual_projection is not None:
        notes.append(
            "The second projections, of independent features, are left out: this form has no place "
            "for them. `gammaray export --format safetensors` has all weights."
        )
    if towers.logit_scale.exp().item() > MAX_LOGIT_SCALE * (1 + 1e-4):
        notes.append(
            f"The logit scale was held at {MAX_LOGIT_SCALE:g} in training; the weight says "
            f"{towers.logit_scale.exp().item():.2f}."
        )
    return notes
