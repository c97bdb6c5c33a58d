"""The two-tower model: transformers' CLIP towers of any size, and one forward.

Enters: uint8 images, token ids. Leaves: unit-norm fp32 embeddings and the logit scale; where asked
for, independent features by a second projection of the same pooled features.
Must not know: the loss, the data, DeepSpeed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int, UInt8
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.towers import (
    Embeddings,
    Pixels,
    clamped_scale,
    load_pretrained,
    project,
)


class TwoTower(nn.Module):
    """CLIP's towers and projections, under the parameter names of transformers' CLIPModel.

    Images are normalised here, on the device; they travel as uint8. With `independent` each tower
    has a second projection beside the first, for features that are not contrasted with the other
    modality ("Understanding and constructing latent modality structures in multi-modal
    representation learning", CVPR 2023, section 3.2).
    """

    def __init__(
        self,
        clip: CLIPModel,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        independent: bool = False,
    ):
        super().__init__()
        self.vision_model = clip.vision_model
        self.text_model = clip.text_model
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        # Shape [1], not a scalar: ZeRO partitions parameters along their elements.
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1).float())
        self.pixels = Pixels(mean, std)
        self.embed_dim: int = clip.visual_projection.out_features
        self.clip_config: CLIPConfig = clip.config
        self.independent_visual_projection: nn.Linear | None = None
        self.independent_text_projection: nn.Linear | None = None
        if independent:
            self.independent_visual_projection = _like(clip.visual_projection)
            self.independent_text_projection = _like(clip.text_projection)

    def forward(
        self,
        images: UInt8[Tensor, "batch height width 3"] | None,
        tokens: Int[Tensor, "batch length"] | None,
    ) -> Embeddings:
        """Embed images, texts or both; an absent input gives None.

        One entry point on purpose: under ZeRO-3 a submodule called directly finds its parameters
        still partitioned. The scale is clamped to [1, 100] and computed in fp32.
        """
        image = text = image_independent = text_independent = None
        if images is not None:
            pooled = self._pool_images(images)
            image = project(self.visual_projection, pooled)
            image_independent = project(self.independent_visual_projection, pooled)
        if tokens is not None:
            pooled = self._pool_texts(tokens)
            text = project(self.text_projection, pooled)
            text_independent = project(self.independent_text_projection, pooled)
        scale = clamped_scale(self.logit_scale)
        return Embeddings(image, text, scale, image_independent, text_independent)

    def _pool_images(self, images: Tensor) -> Tensor:
        pixels = self.pixels(images, self.visual_projection.weight.dtype)
        return self.vision_model(pixel_values=pixels).pooler_output

    def _pool_texts(self, tokens: Tensor) -> Tensor:
        # No attention mask: the text tower is causal and pools at the end token, before padding.
        return self.text_model(input_ids=tokens.long()).pooler_output


def _like(projection: nn.Linear) -> nn.Linear:
    """Another projection of the same sizes, drawn as transformers draws CLIP's."""
    another = nn.Linear(projection.in_features, projection.out_features, bias=False)
    nn.init.normal_(another.weight, std=projection.in_features**-0.5)
    return another


def build_two_tower(
    config: ModelConfig,
    *,
    vocab_size: int,
    start: int,
    end: int,
    pad: int,
    mean: Sequence[float],
    std: Sequence[float],
    independent: bool = False,
    like: Mapping[str, Any] | None = None,
) -> TwoTower:
    """Build the model with random weights, or load `config.pretrained`.

    `start`, `end`, `pad` are the tokenizer's ids; `independent` as of `TwoTower`; `like` is the
    configuration of another's towers, which then is this one's. Raises `UserError` when pretrained
    weights cannot be loaded or do not fit the tokenizer or the configured sizes.
    """
    if like is not None:
        clip = CLIPModel(CLIPConfig.from_dict(dict(like)))
    elif config.pretrained is None:
        if end == 2:
            raise UserError(
                "data.tokenizer: its end token has id 2, which transformers' CLIP reads as a "
                "legacy marker (it would pool at the largest id); use `train` or another tokenizer"
            )
        clip = CLIPModel(clip_config(config, vocab_size, start, end, pad))
    else:
        clip = load_pretrained(CLIPModel, config.pretrained, "model.pretrained", "a CLIP model")
        _check_pretrained(clip.config, config, vocab_size)
    model = TwoTower(clip, mean, std, independent=independent)
    if config.gradient_checkpointing:
        for tower in (model.vision_model, model.text_model):
            tower.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def clip_config(config: ModelConfig, vocab_size: int, start: int, end: int, pad: int) -> CLIPConfig:
    """Give transformers' configuration for the sizes in `config`."""
    image, text = config.image, config.text
    vision = CLIPVisionConfig(
        hidden_size=image.width,
        intermediate_size=4 * image.width,
        num_hidden_layers=image.layers,
        num_attention_heads=image.heads,
        image_size=image.size,
        patch_size=image.patch,
        projection_dim=config.embed_dim,
        hidden_act=config.activation,
    )
    language = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        projection_dim=config.embed_dim,
        hidden_act=config.activation,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return CLIPConfig(
        text_config=language.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=config.embed_dim,
        logit_scale_init_value=math.log(config.logit_scale_init),
    )


def clip_sizes(clip: CLIPConfig) -> dict[str, Any]:
    """What `model` must say for these sizes, by key; those of images and texts apart.

    Raises `UserError`, without a place, for towers that it cannot describe.
    """
    image: Any = clip.vision_config
    text: Any = clip.text_config
    for name, tower in (("image", image), ("text", text)):
        if tower.intermediate_size != 4 * tower.hidden_size:
            raise UserError(
                f"its {name} tower has MLPs {tower.intermediate_size} wide; only four times the "
                f"width, {4 * tower.hidden_size}, can be trained here"
            )
        if tower.layer_norm_eps != CLIPTextConfig().layer_norm_eps:
            raise UserError(
                f"its {name} tower has layer_norm_eps {tower.layer_norm_eps}; only CLIP's "
                f"{CLIPTextConfig().layer_norm_eps} can be trained here"
            )
    if image.hidden_act != text.hidden_act:
        raise UserError(
            f"its towers have the activations {image.hidden_act} and {text.hidden_act}; only one "
            "for both can be trained here"
        )
    return {
        "activation": image.hidden_act,
        "embed_dim": clip.projection_dim,
        "image.patch": image.patch_size,
        "image.width": image.hidden_size,
        "image.layers": image.num_hidden_layers,
        "image.heads": image.num_attention_heads,
        "text.width": text.hidden_size,
        "text.layers": text.num_hidden_layers,
        "text.heads": text.num_attention_heads,
    }


def _check_pretrained(found: CLIPConfig, config: ModelConfig, vocab_size: int) -> None:
    vision: Any = found.vision_config
    text: Any = found.text_config
    if vocab_size > text.vocab_size:
        raise UserError(
            f"data.tokenizer: it has {vocab_size} ids, model.pretrained {config.pretrained!r} "
            f"knows {text.vocab_size}; use the tokenizer the model came with"
        )
    for place, given, theirs in (
        ("model.image.size", config.image.size, vision.image_size),
        ("model.text.context_length", config.text.context_length, text.max_position_embeddings),
    ):
        if given != theirs:
            raise UserError(
                f"{place} is {given}; model.pretrained {config.pretrained!r} was made for "
                f"{theirs}: set {place}={theirs}"
            )
