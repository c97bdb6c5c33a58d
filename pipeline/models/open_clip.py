"""The two-tower model in OpenCLIP's form: its names of weights, its configuration, both ways.

Enters: weights by transformers' names, a CLIPConfig, or OpenCLIP's of both. Leaves: the other.
Must not know: files, runs.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from pipeline.errors import UserError

LEGACY_END = 2  # transformers' CLIP then pools at the largest id of a text, as pool_type argmax
LAYERS = {
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
IN_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
OTHERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
TURNED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
PARTS = ("q", "k", "v")  # which OpenCLIP keeps in one matrix
OUR_PART = re.compile(r"(.*self_attn)\.[qkv]_proj\.(weight|bias)")
THEIR_WHOLE = re.compile(r"(.*)attn\.in_proj_(weight|bias)")

VISION = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
POOLING = ("pool_type", "eos_id")
# What else a configuration may say without being another model.
PLAIN: dict[str, Any] = {"mlp_ratio": 4.0, "pool_type": "tok", "pos_embed_type": "learnable",
                         "proj_type": "linear"}  # fmt: skip
NO_MATTER = ("patch_dropout", "output_tokens", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs",
             "tokenizer_mode", "attn_pooler_queries", "attn_pooler_heads")  # fmt: skip


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIPModel by OpenCLIP's names."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in TURNED:
            found[TURNED[name]] = value.T
        elif name in OTHERS:
            found[OTHERS[name]] = value
        elif (part := OUR_PART.fullmatch(name)) is None:
            found[_renamed(name, IN_LAYER, LAYERS)] = value
        elif ".q_proj." in name:
            attention, kind = part.groups()
            whole = torch.cat([weights[f"{attention}.{each}_proj.{kind}"] for each in PARTS])
            layer = _renamed(attention.removesuffix("self_attn"), {}, LAYERS)
            found[f"{layer}attn.in_proj_{kind}"] = whole
    return found


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of OpenCLIP's model by transformers' names; with towers apart (`text.`) too.

    Raises `UserError`, without a place, for a weight that CLIP's towers do not have.
    """
    turned = {theirs: ours for ours, theirs in TURNED.items()}
    others = {theirs: ours for ours, theirs in OTHERS.items()}
    in_layer = {theirs: ours for ours, theirs in IN_LAYER.items()}
    layers = {theirs: ours for ours, theirs in LAYERS.items()}
    found: dict[str, Tensor] = {}
    for given, value in weights.items():
        name = given.removeprefix("text.")
        if name in turned:
            found[turned[name]] = value.T
        elif name in others:
            found[others[name]] = value
        elif (whole := THEIR_WHOLE.fullmatch(name)) is None:
            found[_renamed(name, in_layer, layers)] = value
        else:
            layer, kind = _renamed(whole[1], {}, layers), whole[2]
            for part, each in zip(PARTS, value.chunk(3), strict=True):
                found[f"{layer}self_attn.{part}_proj.{kind}"] = each
    return found


def _renamed(name: str, inside: Mapping[str, str], layers: Mapping[str, str]) -> str:
    """The name of a layer's weight, or of a layer, with its tower's and its own part replaced."""
    start = next((start for start in layers if name.startswith(start)), None)
    if start is None:
        raise UserError(f"its weight {name} has no place in CLIP's towers")
    number, _, rest = name.removeprefix(start).partition(".")
    part = next((part for part in inside if rest.startswith(part)), "")
    if rest and not part:
        raise UserError(f"its weight {name} has no place in CLIP's towers")
    return f"{layers[start]}{number}.{inside.get(part, '')}{rest.removeprefix(part)}"


def write_config(clip: CLIPConfig) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` of such a model."""
    vision: Any = clip.vision_config
    text: Any = clip.text_config
    return {
        "embed_dim": clip.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            **_pooling(text.eos_token_id),
        },
    }


def _pooling(end: int) -> dict[str, Any]:
    return {"pool_type": "argmax"} if end == LEGACY_END else {"pool_type": "eos", "eos_id": end}


def read_config(given: Mapping[str, Any]) -> CLIPConfig:
    """transformers' configuration of what OpenCLIP's `model_cfg` describes.

    Raises `UserError`, without a place, for what CLIP's towers cannot be.
    """
    vision = _section(given, "vision_cfg", VISION, ())
    text = _section(given, "text_cfg", TEXT, POOLING)
    pooling = text.get("pool_type", "argmax")
    if pooling not in ("argmax", "eos"):
        raise UserError(f"its text_cfg.pool_type is {pooling}; CLIP's is argmax or eos")
    activation = "quick_gelu" if given.get("quick_gelu", False) else "gelu"
    dim = given.get("embed_dim")
    if not isinstance(dim, int):
        raise UserError(f"its embed_dim is {dim!r}; it must be a number")
    return CLIPConfig(
        projection_dim=dim,
        vision_config=CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act=activation,
            projection_dim=dim,
        ).to_dict(),
        text_config=CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act=activation,
            projection_dim=dim,
            eos_token_id=text.get("eos_id", 2) if pooling == "eos" else LEGACY_END,
        ).to_dict(),
    )


def _section(
    given: Mapping[str, Any], name: str, sizes: Mapping[str, int], more: tuple[str, ...]
) -> dict[str, Any]:
    section = given.get(name, {})
    if not isinstance(section, Mapping):
        raise UserError(f"its {name} is {section!r}; it must hold sizes")
    for key, value in section.items():
        is_known = key in sizes or key in more or key in NO_MATTER
        if not is_known and value and value != PLAIN.get(key):
            raise UserError(f"its {name}.{key} is {value!r}, which CLIP's towers do not have")
        if key in sizes and not isinstance(value, int):
            raise UserError(f"its {name}.{key} is {value!r}; CLIP's towers have one number there")
    return {**sizes, **section}
