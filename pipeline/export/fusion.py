"""A fusion model as three of transformers' own, and the layers between them.

image/               a ViTModel and how pictures are prepared
text/                a BertModel and its tokenizer
fusion/              a BertModel with cross-attention, of which only the encoder is used
heads.safetensors    projections for the contrast, matching head, masked words, logit scale

Enters: `Trained`. Leaves: a folder; what its reader must know.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from pipeline.export.inputs import save_pictures, save_tokenizer
from pipeline.export.trained import Trained
from pipeline.models.fusion import Fusion
from pipeline.train.module import TOWERS

WHOLE = ("vision_model.", "text_model.", "fusion_encoder.")  # parts that are models of their own
USE = """\
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize
from transformers import AutoImageProcessor, AutoTokenizer, BertModel, ViTModel

folder, images, texts = ".", [Image.open("picture.jpg")], ["a red circle"]
images = [ImageOps.exif_transpose(each) for each in images]
vit = ViTModel.from_pretrained(f"{folder}/image", add_pooling_layer=False)
bert = BertModel.from_pretrained(f"{folder}/text", add_pooling_layer=False)
fusion = BertModel.from_pretrained(f"{folder}/fusion", add_pooling_layer=False).encoder
heads = load_file(f"{folder}/heads.safetensors")
layer = lambda name, states: linear(states, heads[f"{name}.weight"], heads[f"{name}.bias"])
pixels = AutoImageProcessor.from_pretrained(f"{folder}/image")(images, return_tensors="pt")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/text")
words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    seen = vit(pixels.pixel_values.to(vit.dtype)).last_hidden_state
    read = bert(**words).last_hidden_state
    image = normalize(layer("visual_projection", seen[:, 0]), dim=1)
    text = normalize(layer("text_projection", read[:, 0]), dim=1)
    # Whether text i belongs to image i: as many of one as of the other.
    mask = words.attention_mask[:, None, None, :].bool()
    both = fusion(read, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
    match = layer("match_head", both[:, 0])  # logits of no and yes
"""


def save_transformers(trained: Trained, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write the model; give what its card must say beside."""
    model = trained.module.towers
    assert isinstance(model, Fusion), "the form is one of fusion"
    image, text, fusion = (folder / name for name in ("image", "text", "fusion"))
    vision: Any = model.vision_model  # transformers types `to` wrongly
    words: Any = model.text_model
    vision.to(dtype).save_pretrained(image)
    save_pictures(trained.config, image)
    words.to(dtype).save_pretrained(text)
    save_tokenizer(trained.record.tokenizer, trained.config.model.text.context_length, text)
    _as_bert(model, dtype).save_pretrained(fusion)
    heads = {
        name: value
        for name, value in trained.weights(dtype, TOWERS).items()
        if not name.startswith(WHOLE)
    }
    save_file(heads, folder / "heads.safetensors", metadata={"format": "pt"})
    notes = [
        "`logits of no and yes` are reckoned in fp32 in training, whatever the weights are in.",
        "Masked words: `masked_transform` (BERT's: dense, GELU, LayerNorm) of a fused state, times "
        "the word embeddings of text/, plus `masked_bias`. The contrast's logits are the cosines "
        "times the exponential of `logit_scale`, held between 1 and 100.",
    ]
    if model.independent_visual_projection is not None:
        notes.append("`independent_..._projection` give the features that are not contrasted.")
    return notes


def _as_bert(model: Fusion, dtype: torch.dtype) -> BertModel:
    """A BertModel around the fusion encoder; its embeddings are of one word, and unused."""
    config = model.fusion_encoder.config
    assert isinstance(config, BertConfig), "its layers are BERT's"
    bert: Any = BertModel(config, add_pooling_layer=False)
    bert.encoder.load_state_dict(model.fusion_encoder.state_dict())
    return bert.to(dtype)
