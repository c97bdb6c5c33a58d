"""The fusion model: an image transformer, a text transformer, and an encoder that reads both.

The architecture of "Align before fuse: vision and language representation learning with momentum
distillation" (Li et al., NeurIPS 2021), of transformers' parts: ViT, BERT, and BERT layers with
cross-attention. Image and text features are aligned before they are fused.

Enters: uint8 images, token ids. Leaves: unit-norm embeddings; of pairs whether they match, of
masked words what they are; fused states. Must not know: the losses, the data, DeepSpeed.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.models.bert.modeling_bert import BertEncoder, BertPredictionHeadTransform

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.towers import (
    Embeddings,
    Pixels,
    clamped_scale,
    load_pretrained,
    project,
)

IMAGE_PLACES = "embeddings.position_embeddings"  # a ViT's
NO_LABEL = -100  # torch's cross-entropy leaves such rows out
# What a pretrained ViT decides, and a BERT.
OF_VIT = ("hidden_act", "layer_norm_eps", "qkv_bias")
OF_BERT = ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act",
           "layer_norm_eps")  # fmt: skip
STEM_GAIN = 6.0  # of the variance of normalised GELUs, 0.4, makes features of std 1.5
BERT_WIDTH, BERT_STD = 768, 0.02  # the width for which BERT and ViT draw weights with this std


class Fused(NamedTuple):
    """What the fusion encoder says of a batch, and what it may be asked of later.

    Of `match_logits` the first rows are the pairs, then each text with another's image, then each
    image with another's text; `match_labels` are 1, 0, or NO_LABEL where a pair has no other to be
    confused with. Rows of `masked_logits` are the chosen places, row by row. `image_states` are
    those of images that were only embedded, if asked for; of texts that were given `states` there
    are only `match_logits`.
    """

    match_logits: Float[Tensor, "three_local 2"] | None = None
    match_labels: Int[Tensor, " three_local"] | None = None
    masked_logits: Float[Tensor, "chosen vocab"] | None = None
    image_states: Float[Tensor, "batch patches width"] | None = None


class Texts(NamedTuple):
    """States of texts, and which of them are no padding."""

    states: Float[Tensor, "batch length width"]
    is_there: Bool[Tensor, "batch length"]

    def take(self, rows: Tensor | slice) -> "Texts":
        """Some of the texts."""
        return Texts(self.states[rows], self.is_there[rows])


def joined(texts: Sequence[Texts]) -> Texts:
    """One batch of several of equal length."""
    return Texts(
        torch.cat([text.states for text in texts]), torch.cat([text.is_there for text in texts])
    )


class Fusion(nn.Module):
    """The three transformers, projections for the contrast, heads for matching and masked words.

    With `independent` each side has a second projection, as in `TwoTower`.
    """

    def __init__(
        self,
        vision: ViTModel,
        text: BertModel,
        fusion: BertEncoder,
        config: ModelConfig,
        *,
        pad: int,
        mean: Sequence[float],
        std: Sequence[float],
        independent: bool = False,
    ):
        """`fusion` is the encoder of a BERT with cross-attention; `pad` is no token of a text."""
        super().__init__()
        width, dim = config.text.width, config.embed_dim
        self.vision_model = vision
        self.text_model = text
        self.fusion_encoder = fusion
        self.visual_projection = _linear(width, dim)
        self.text_projection = _linear(width, dim)
        self.independent_visual_projection = _linear(width, dim) if independent else None
        self.independent_text_projection = _linear(width, dim) if independent else None
        self.match_head = MatchHead(width, 2)
        _init_linear(self.match_head)
        self.masked_transform = BertPredictionHeadTransform(text.config)
        _init_linear(self.masked_transform.dense)
        self.masked_bias = nn.Parameter(torch.zeros(text.config.vocab_size))
        # Shape [1], not a scalar: ZeRO partitions parameters along their elements.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale_init)]))
        self.pixels = Pixels(mean, std)
        self.embed_dim = dim
        self._pad = pad

    def forward(
        self,
        images: UInt8[Tensor, "batch height width 3"] | None,
        tokens: Int[Tensor, "batch length"] | None,
        masked: Int[Tensor, "batch length"] | None = None,
        chosen: Bool[Tensor, "batch length"] | None = None,
        states: Float[Tensor, "batch patches width"] | None = None,
        *,
        gives_states: bool = False,
    ) -> tuple[Embeddings, Fused | None]:
        """Embed images, texts or both; with `masked` texts fuse them too, and guess what is masked.

        `chosen` are the places to be guessed. In training texts and images are also fused with
        others like their own, for the matching head. With `states` of images, one each, texts are
        matched with them; embedding gives such states if asked for.
        """
        found_image = None if images is None else self.encode_images(images)
        plain = None if tokens is None else self.encode_texts(tokens, masked)
        image = text = image_independent = text_independent = None
        if found_image is not None:
            pooled = found_image[:, 0]
            image = project(self.visual_projection, pooled)
            image_independent = project(self.independent_visual_projection, pooled)
        if plain is not None and tokens is not None:
            pooled = plain.states[: len(tokens), 0]
            text = project(self.text_projection, pooled)
            text_independent = project(self.independent_text_projection, pooled)
        scale = clamped_scale(self.logit_scale)
        found = Embeddings(image, text, scale, image_independent, text_independent)
        if states is not None and plain is not None:
            return found, Fused(self.match(self.fuse(plain, states)))
        if masked is None or chosen is None:
            return found, Fused(image_states=found_image) if gives_states else None
        assert found_image is not None, "masked texts are fused with images"
        assert plain is not None, "masked texts come with their plain ones"
        assert tokens is not None, "masked texts come with their plain ones"
        return found, self._fuse_all(found, found_image, plain, tokens, chosen)

    def encode_images(self, images: UInt8[Tensor, "batch height width 3"]) -> Tensor:
        """States of images, [batch, 1 + patches, width]; the first is the whole image's."""
        weight = self.vision_model.embeddings.patch_embeddings.projection.weight
        return self.vision_model(pixel_values=self.pixels(images, weight.dtype)).last_hidden_state

    def encode_texts(
        self, tokens: Int[Tensor, "batch length"], more: Int[Tensor, "others length"] | None = None
    ) -> Texts:
        """States of texts, and of `more` behind them, in one pass; the first is of the whole.

        Places that are padding in all of them are left out: mostly half of the work.
        """
        both = tokens if more is None else torch.cat([tokens, more])
        is_there = both != self._pad
        longest = int(is_there.any(0).sum())  # padding comes last
        both, is_there = both[:, :longest], is_there[:, :longest]
        states = self.text_model(
            input_ids=both.long(), attention_mask=is_there.long()
        ).last_hidden_state
        return Texts(states, is_there)

    def fuse(self, texts: Texts, images: Float[Tensor, "batch patches width"]) -> Tensor:
        """States of texts that have seen their images, [batch, length, width]."""
        return self.fusion_encoder(
            texts.states,
            attention_mask=texts.is_there[:, None, None, :],
            encoder_hidden_states=images,
        ).last_hidden_state

    def match(self, fused: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch 2"]:
        """Logits of no and yes: whether text and image belong together."""
        return self.match_head(fused[:, 0])

    def _fuse_all(
        self, found: Embeddings, images: Tensor, texts: Texts, tokens: Tensor, chosen: Tensor
    ) -> Fused:
        """Fuse masked texts, in training pairs and hard negatives too, in one pass."""
        count = len(tokens)
        plain, masked = texts.take(slice(count)), texts.take(slice(count, None))
        if not self.training:
            return Fused(masked_logits=self._guess(self.fuse(masked, images), chosen))
        assert found.image is not None, "both are embedded"
        assert found.text is not None, "both are embedded"
        allowed = may_be_confused(tokens)
        sims = (found.logit_scale * found.image @ found.text.T).detach()
        others_text = draw_negatives(sims, allowed)
        others_image = draw_negatives(sims.T, allowed)
        fused = self.fuse(
            joined([plain, plain, plain.take(others_text), masked]),
            torch.cat([images, images[others_image], images, images]),
        )
        is_confused = torch.where(allowed.any(1), 0, NO_LABEL)
        labels = torch.cat([torch.ones_like(is_confused), is_confused, is_confused])
        return Fused(
            self.match(fused[: 3 * count]), labels, self._guess(fused[3 * count :], chosen)
        )

    def _guess(self, fused: Tensor, chosen: Tensor) -> Tensor:
        """Logits of all words at the chosen places; the words' own embeddings judge, as BERT's."""
        states = self.masked_transform(fused[chosen[:, : fused.shape[1]]])
        words = self.text_model.embeddings.word_embeddings.weight
        return (states @ words.T + self.masked_bias).float()


class ConvStem(nn.Module):
    """Pixels -> patches by overlapping convolutions of stride 2, in place of a ViT's projection.

    "Early convolutions help transformers see better" (Xiao et al., NeurIPS 2021), with group norm,
    since a worker's batch is small. A shape looks alike wherever it lies, which a linear map of
    patches learns place by place.
    """

    def __init__(self, patch: int, width: int):
        """`patch` is a power of 2; the last of the convolutions has `width` channels."""
        super().__init__()
        halvings = patch.bit_length() - 1
        channels = [3, *(max(16, width >> (halvings - i)) for i in range(1, halvings + 1))]
        layers: list[nn.Module] = []
        for below, above in pairwise(channels):
            conv = nn.Conv2d(below, above, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            layers += [conv, nn.GroupNorm(1, above), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.projection = nn.Conv2d(channels[-1], width, 1, bias=False)
        # As strong as the position embeddings: with a weak start colors are learned late.
        nn.init.normal_(self.projection.weight, std=(STEM_GAIN / channels[-1]) ** 0.5)

    @property
    def weight(self) -> Tensor:
        """A weight of the type that pixels are to have."""
        return self.projection.weight

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch width rows columns"]:
        """Features of each patch."""
        return self.projection(self.layers(pixels))


class MatchHead(nn.Linear):
    """Reckons in fp32 whatever its weights are in: bf16 has so few values that pairs would tie."""

    def forward(self, input: Tensor) -> Tensor:
        """Give logits in fp32: [..., width] to [..., 2]."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


def may_be_confused(tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch batch"]:
    """Which pairs may stand against each other: not those that say the same, itself among them."""
    return (tokens[:, None] != tokens[None]).any(2)


def draw_negatives(
    sims: Float[Tensor, "batch batch"], allowed: Bool[Tensor, "batch batch"]
) -> Int[Tensor, " batch"]:
    """For each row draw one of the columns allowed, with probability by softmax of its logits.

    A row that may have none gets itself. A batch's hard negatives (ALBEF, section 3.2).
    """
    logits = sims.float().masked_fill(~allowed, -torch.inf)
    # Gumbel's way to draw: finite whatever the logits, where probabilities may all round to 0.
    noise = -torch.empty_like(logits).exponential_().log()
    drawn = (logits + noise).argmax(1)
    own = torch.arange(len(sims), device=sims.device)
    return torch.where(allowed.any(1), drawn, own)


def build_fusion(
    config: ModelConfig,
    *,
    vocab_size: int,
    pad: int,
    mean: Sequence[float],
    std: Sequence[float],
    independent: bool = False,
    like: Mapping[str, Any] | None = None,
) -> Fusion:
    """Build the model with random weights, or with `config.image` and `config.text` pretrained.

    `pad` is the tokenizer's id; `like` are the configurations of another's transformers, whose
    vocabulary, activations and more then are this one's. Raises `UserError` when pretrained weights
    cannot be loaded or do not fit the tokenizer or the configured sizes.
    """
    vision = _vision(config, like)
    text, fusion = _text_and_fusion(config, vocab_size, pad, like)
    if config.gradient_checkpointing:
        for part in (vision, text, fusion):
            part.gradient_checkpointing_enable({"use_reentrant": False})
    return Fusion(
        vision, text, fusion.encoder, config, pad=pad, mean=mean, std=std, independent=independent
    )


def _vision(config: ModelConfig, like: Mapping[str, Any] | None) -> ViTModel:
    image = config.image
    sizes: dict[str, Any] = {
        "hidden_size": image.width,
        "intermediate_size": 4 * image.width,
        "num_hidden_layers": image.layers,
        "num_attention_heads": image.heads,
        "image_size": image.size,
        "patch_size": image.patch,
        "initializer_range": initial_std(image.width),
    }
    if like is not None:
        sizes |= {name: like["vision_config"][name] for name in OF_VIT}
    if image.pretrained is None:
        model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
        if image.stem == "conv":
            stem: Any = ConvStem(image.patch, image.width)  # transformers types it as one Conv2d
            model.embeddings.patch_embeddings.projection = stem
        with torch.no_grad():
            places = model.embeddings.position_embeddings
            places.copy_(begin_places(image.size // image.patch, image.width))
        return model
    found = load_pretrained(
        ViTModel, image.pretrained, "model.image.pretrained", "a ViTModel", add_pooling_layer=False
    )
    _check_sizes(
        "model.image",
        image.pretrained,
        (
            ("width", image.width, found.config.hidden_size),
            ("layers", image.layers, found.config.num_hidden_layers),
            ("heads", image.heads, found.config.num_attention_heads),
            ("patch", image.patch, found.config.patch_size),
            ("width (of its MLPs)", 4 * image.width, found.config.intermediate_size),
        ),
    )
    sizes |= {name: getattr(found.config, name) for name in OF_VIT}
    model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    weights = found.state_dict()
    own = model.embeddings.position_embeddings
    weights[IMAGE_PLACES] = fit_places(weights[IMAGE_PLACES], own.shape[1])
    model.load_state_dict(weights)
    return model


def begin_places(side: int, width: int) -> Float[Tensor, "1 places width"]:
    """Position embeddings to start from: sines and cosines of each patch's row and column.

    As strong as what patches say, where weights of BERT's std leave a model at chance for hundreds
    of steps on where a thing is. The whole image's is zero. ("An empirical study of training
    self-supervised vision transformers", Chen et al. 2021, section 4.)
    """
    waves = 10_000.0 ** -np.linspace(0, 1, max(width // 4, 1), endpoint=False)
    rows, columns = np.divmod(np.arange(side * side)[:, None], side)
    grid = np.concatenate(
        [wave(steps * waves) for steps in (rows, columns) for wave in (np.sin, np.cos)], axis=1
    )
    padded = np.pad(grid, ((1, 0), (0, width - grid.shape[1])))
    return torch.from_numpy(padded.astype(np.float32))[None]


def fit_places(
    places: Float[Tensor, "1 places width"], count: int
) -> Float[Tensor, "1 count width"]:
    """A ViT's position embeddings for so many places, the first of which is of no patch.

    Those of a square of patches are resized as a picture, as transformers does.
    """
    if places.shape[1] == count:
        return places
    old, new = (round((number - 1) ** 0.5) for number in (places.shape[1], count))
    grid = places[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([places[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _text_and_fusion(
    config: ModelConfig, vocab_size: int, pad: int, like: Mapping[str, Any] | None
) -> tuple[BertModel, BertModel]:
    """Two BERTs, of the second of which only the encoder is wanted."""
    text, layers = config.text, config.fusion.layers
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "hidden_dropout_prob": config.fusion.dropout,
        "attention_probs_dropout_prob": config.fusion.dropout,
        "pad_token_id": pad,
        "initializer_range": initial_std(text.width),
    }
    if like is not None:
        sizes |= {name: like["text_config"][name] for name in OF_BERT}
    if text.pretrained is None:
        model = BertModel(
            BertConfig(**sizes, num_hidden_layers=text.layers), add_pooling_layer=False
        )
        return model, _cross_attending(sizes, layers)
    whole = load_pretrained(
        BertModel, text.pretrained, "model.text.pretrained", "a BertModel", add_pooling_layer=False
    )
    _check_sizes(
        "model.text",
        text.pretrained,
        (
            ("width", text.width, whole.config.hidden_size),
            ("heads", text.heads, whole.config.num_attention_heads),
            ("width (of its MLPs)", 4 * text.width, whole.config.intermediate_size),
        ),
    )
    theirs = whole.config
    if vocab_size > theirs.vocab_size or text.context_length > theirs.max_position_embeddings:
        raise UserError(
            f"model.text.pretrained: {text.pretrained!r} knows {theirs.vocab_size} ids and "
            f"{theirs.max_position_embeddings} places; data.tokenizer has {vocab_size} ids, "
            f"model.text.context_length is {text.context_length}: use the tokenizer the model came "
            "with, and no longer texts"
        )
    if text.layers + layers > theirs.num_hidden_layers:
        raise UserError(
            f"model.text.pretrained: {text.pretrained!r} has {theirs.num_hidden_layers} layers; "
            f"model.text.layers {text.layers} and model.fusion.layers {layers} are more: lower one"
        )
    sizes |= {name: getattr(theirs, name) for name in OF_BERT}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=text.layers), add_pooling_layer=False)
    model.embeddings.load_state_dict(whole.embeddings.state_dict())
    model.encoder.layer.load_state_dict(whole.encoder.layer[: text.layers].state_dict())
    fusion = _cross_attending(sizes, layers)
    above = whole.encoder.layer[text.layers : text.layers + layers]
    fusion.encoder.layer.load_state_dict(above.state_dict(), strict=False)  # no cross-attention
    return model, fusion


def _cross_attending(sizes: dict[str, Any], layers: int) -> BertModel:
    """transformers calls what attends to other states a decoder; masks keep ours from being one."""
    sizes = {**sizes, "vocab_size": 1, "pad_token_id": 0}  # its embeddings are not wanted
    config = BertConfig(
        **sizes, num_hidden_layers=layers, is_decoder=True, add_cross_attention=True
    )
    return BertModel(config, add_pooling_layer=False)


def _check_sizes(section: str, path: str, sizes: Sequence[tuple[str, int, int]]) -> None:
    for name, given, theirs in sizes:
        if given != theirs:
            raise UserError(
                f"{section}.{name}: is {given}; {section}.pretrained {path!r} was made for "
                f"{theirs}: set {section}.{name}={theirs}"
            )


def initial_std(width: int) -> float:
    """Of weights that read so many features: as BERT's at its width, so of the same signal."""
    return BERT_STD * (BERT_WIDTH / width) ** 0.5


def _linear(width: int, dim: int) -> nn.Linear:
    layer = nn.Linear(width, dim)
    _init_linear(layer)
    return layer


def _init_linear(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=initial_std(layer.in_features))
    nn.init.zeros_(layer.bias)
