"""The fusion model: what may look at what, its negatives, pretrained parts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from pipeline.errors import UserError
from pipeline.models.fusion import (
    NO_LABEL,
    ConvStem,
    Fusion,
    begin_places,
    build_fusion,
    draw_negatives,
    may_be_confused,
)
from tests.tiny import CONV, FUSION, tiny_config, tiny_pairs, tiny_tokenizer

PAD = 0


def _build(**model: Any) -> Fusion:
    torch.manual_seed(0)
    config = tiny_config(model={**FUSION, **model})
    built = build_fusion(
        config.model,
        vocab_size=tiny_tokenizer().vocab_size,
        pad=PAD,
        mean=config.data.image_mean,
        std=config.data.image_std,
    )
    with torch.no_grad():  # as if trained: states differ
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "logit" not in name:
                parameter.mul_(4)
    return built


def _pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of five tokens and three of padding; of several the last one has seven."""
    images, tokens = tiny_pairs(count)
    tokens[:, 4], tokens[:, 5:] = 3, PAD
    if count > 1:
        tokens[-1] = torch.tensor([1, 20, 21, 22, 23, 24, 3, PAD])
    return images, tokens


def _fused(model: Fusion, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return model.fuse(model.encode_texts(tokens), model.encode_images(images))


def _is_changed(first: torch.Tensor, second: torch.Tensor) -> list[bool]:
    """Of each place of the text whether its states differ."""
    return ((first - second).abs().amax(dim=(0, 2)) > 1e-5).tolist()


def test_embeddings_have_unit_norm_and_need_one_side_only() -> None:
    model, (images, tokens) = _build().eval(), _pairs(3)
    found, fused = model(images, tokens)
    assert fused is None
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model(None, tokens)[0].text, found.text)
    torch.testing.assert_close(model(images, None)[0].image, found.image)
    assert found.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_words_look_both_ways_and_at_their_own_image_alone() -> None:
    model, (images, tokens) = _build().eval(), _pairs(2)
    before = _fused(model, images, tokens)
    later = tokens.clone()
    later[:, 3] = 99
    assert _is_changed(before, _fused(model, images, later))[:5] == [True] * 5, "not causal"
    other = images.clone()
    other[1, -1, -1] = 255 - other[1, -1, -1]
    changed = _fused(model, other, tokens)
    assert not any(_is_changed(before[:1], changed[:1])), "another row's image"
    assert _is_changed(before[1:], changed[1:])[:5] == [True] * 5, "the last patch reaches all"


def test_padding_is_not_looked_at() -> None:
    model, (images, tokens) = _build().eval(), _pairs(2)
    states = model.encode_images(images)
    texts = model.encode_texts(tokens)
    noisy = texts._replace(states=texts.states.clone())
    noisy.states[0, 5:] += 3.0
    before, after = model.fuse(texts, states), model.fuse(noisy, states)
    assert _is_changed(before[:1], after[:1])[:5] == [False] * 5
    noisy.states[0, 4] += 3.0
    assert all(_is_changed(before[:1], model.fuse(noisy, states)[:1])[:5]), "the last word is"


def test_places_that_are_padding_in_all_texts_are_left_out() -> None:
    """And change nothing: the short text alone, or beside a longer one."""
    model, (_, tokens) = _build().eval(), _pairs(2)
    both = model.encode_texts(tokens)
    assert both.states.shape == (2, 7, 16)
    alone = model.encode_texts(tokens[:1])
    assert alone.states.shape == (1, 5, 16)
    torch.testing.assert_close(alone.states, both.states[:1, :5])


def test_matching_and_masked_words_are_of_the_fused_states() -> None:
    """One pass over everything gives what separate passes give."""
    model, (images, tokens) = _build(), _pairs(4)
    masked = tokens.clone()
    masked[:, 2] = 2
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[1:, 2] = True
    torch.manual_seed(5)
    found, fused = model(images, tokens, masked, chosen)
    assert fused.match_labels.tolist() == [1] * 4 + [0] * 8
    plain = model.match(_fused(model, images, tokens))
    torch.testing.assert_close(fused.match_logits[:4], plain)
    torch.manual_seed(5)
    sims, allowed = found.logit_scale * found.image @ found.text.T, may_be_confused(tokens)
    texts, images_of = draw_negatives(sims, allowed), draw_negatives(sims.T, allowed)
    torch.testing.assert_close(
        fused.match_logits[4:8], model.match(_fused(model, images[images_of], tokens))
    )
    torch.testing.assert_close(
        fused.match_logits[8:], model.match(_fused(model, images, tokens[texts]))
    )
    states = model.masked_transform(_fused(model, images, masked)[1:, 2])
    words = model.text_model.embeddings.word_embeddings.weight
    torch.testing.assert_close(fused.masked_logits, states @ words.T + model.masked_bias)
    assert model.eval()(images, tokens, masked, chosen)[1].match_logits is None


def test_negatives_are_never_of_the_same_caption_and_by_softmax_of_similarity() -> None:
    tokens = torch.tensor([[1, 5, 3], [1, 6, 3], [1, 5, 3], [1, 7, 3]])
    allowed = may_be_confused(tokens)
    assert allowed.tolist() == [
        [False, True, False, True],
        [True, False, True, True],
        [False, True, False, True],
        [True, True, True, False],
    ]
    sims = torch.tensor([0.0, 1.0, 50.0, 2.0]).expand(4, 4)
    torch.manual_seed(0)
    drawn = torch.stack([draw_negatives(sims, allowed) for _ in range(4000)])
    share = (drawn[:, 0] == 1).float().mean()
    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert float(share) == pytest.approx(1 / (1 + torch.e), abs=0.03)
    assert set(drawn[:, 1].tolist()) == {2}


@pytest.mark.parametrize(
    ("captions", "labels"),
    [([5], [1, NO_LABEL, NO_LABEL]), ([5, 5], [1, 1] + [NO_LABEL] * 4), ([5, 6], [1, 1] + [0] * 4)],
)
def test_a_batch_of_one_or_two_or_of_one_caption_has_no_false_negatives(
    captions: list[int], labels: list[int]
) -> None:
    images, _ = tiny_pairs(len(captions))
    tokens = torch.tensor([[1, word, 3, 0, 0, 0, 0, 0] for word in captions])
    chosen = tokens == -1
    _, fused = _build()(images, tokens, tokens, chosen)
    assert fused.match_labels.tolist() == labels
    assert fused.masked_logits.shape == (0, 300)
    assert fused.match_logits.isfinite().all()


def test_recomputing_activations_gives_the_same_gradients() -> None:
    images, tokens = _pairs(3)
    found = []
    for again in (False, True):
        model = _build(gradient_checkpointing=again).train()
        torch.manual_seed(1)
        _, fused = model(images, tokens, tokens, tokens == 3)
        (fused.match_logits.sum() + fused.masked_logits.sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4, msg=name)


def _save_vit(folder: Path) -> ViTModel:
    torch.manual_seed(7)
    model = ViTModel(
        ViTConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  image_size=32, patch_size=8, hidden_act="gelu_new", layer_norm_eps=1e-6)
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def _save_bert(folder: Path) -> BertModel:
    torch.manual_seed(7)
    model = BertModel(
        BertConfig(vocab_size=310, hidden_size=16, intermediate_size=64, num_hidden_layers=4,
                   num_attention_heads=2, max_position_embeddings=20)
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def test_places_begin_as_sines_of_row_and_column() -> None:
    places = begin_places(3, 16)[0]
    assert places.shape == (10, 16)
    assert not places[0].any(), "the whole image is nowhere"
    for row in range(3):
        for column in range(3):
            waves = [10_000 ** (-wave / 4) for wave in range(4)]
            expected = [
                function(step * wave)
                for step in (row, column)
                for function in (math.sin, math.cos)
                for wave in waves
            ]
            assert places[1 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)
    assert begin_places(2, 6).shape == (1, 5, 6), (
        "of widths that are no multiple of 4 the rest is 0"
    )


def test_convolutions_see_across_the_borders_of_patches() -> None:
    """A pixel beside a border says something to both patches; a linear map keeps them apart.

    Without norms, through which every pixel says a little to all.
    """
    images = torch.full((1, 16, 16, 3), 200, dtype=torch.uint8)
    changed = images.clone()
    changed[:, 0, 7] = 0  # the last column of the first patch, in its first row
    found = {}
    for stem in ("patch", "conv"):
        model = _build(image={**CONV, "stem": stem})
        projection = model.vision_model.embeddings.patch_embeddings.projection
        if isinstance(projection, ConvStem):
            layers = [each for each in projection.layers if not isinstance(each, nn.GroupNorm)]
            projection.layers = nn.Sequential(*layers)
        pixels = [model.pixels(each, projection.weight.dtype) for each in (images, changed)]
        before, after = (projection(each) for each in pixels)
        assert before.shape == (1, 16, 2, 2)
        found[stem] = ((before - after).abs().amax(dim=(0, 1)) > 1e-2).tolist()
    assert found["patch"] == [[True, False], [False, False]]
    assert found["conv"] == [[True, True], [False, False]]


@pytest.mark.parametrize(("patch", "width"), [(2, 16), (8, 128), (16, 384), (32, 768)])
def test_convolutions_begin_as_strong_as_places(patch: int, width: int) -> None:
    torch.manual_seed(0)
    stem = ConvStem(patch, width)
    found = stem(torch.randn(4, 3, 4 * patch, 4 * patch))
    assert found.shape == (4, width, 4, 4)
    assert 1 < found.std().item() < 2.2
    assert stem.to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_pretrained_parts_are_loaded(tmp_path: Path) -> None:
    vit, bert = _save_vit(tmp_path / "vit"), _save_bert(tmp_path / "bert")
    config = tiny_config(
        model={
            **FUSION,
            "image": {"size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2,
                      "pretrained": str(tmp_path / "vit")},
            "text": {"context_length": 8, "width": 16, "layers": 2, "heads": 2,
                     "pretrained": str(tmp_path / "bert")},
        }
    )  # fmt: skip
    model = build_fusion(config.model, vocab_size=300, pad=0, mean=(0, 0, 0), std=(1, 1, 1))
    assert model.vision_model.config.hidden_act == "gelu_new"
    assert model.vision_model.config.layer_norm_eps == 1e-6
    theirs = vit.state_dict()
    for name, value in model.vision_model.state_dict().items():
        if name == "embeddings.position_embeddings":
            assert value.shape == (1, 5, 16), "of 16 patches 4 are left"
            assert torch.equal(value[:, 0], theirs[name][:, 0])
            means = value[:, 1:].mean().item(), theirs[name][:, 1:].mean().item()
            assert means[0] == pytest.approx(means[1], abs=1e-3)
        else:
            assert torch.equal(value, theirs[name]), name
    for index, layer in enumerate([*model.text_model.encoder.layer, *model.fusion_encoder.layer]):
        for name, value in bert.encoder.layer[index].state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), (index, name)
    words = model.text_model.embeddings.word_embeddings.weight
    assert torch.equal(words, bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("image", {"width": 32}, r"model.image.width: is 32; .* set model.image.width=16"),
        ("image", {"patch": 4}, r"model.image.patch: is 4; .*=8"),
        ("text", {"heads": 4}, r"model.text.heads: is 4; .*=2"),
        ("text", {"layers": 3}, r"has 4 layers; model.text.layers 3 and model.fusion.layers 2"),
        ("text", {"context_length": 21}, r"310 ids and 20 places; .*context_length is 21"),
        (
            "text",
            {"pretrained": "/no/such/folder"},
            r"model.text.pretrained: '/no/such/folder' cannot be",
        ),
    ],
)
def test_pretrained_parts_that_do_not_fit_are_refused(
    tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    _save_vit(tmp_path / "image")
    _save_bert(tmp_path / "text")
    sizes = tiny_config().model.model_dump()[section]
    sizes |= {"pretrained": str(tmp_path / section), **values}
    config = tiny_config(model={**FUSION, section: sizes})
    with pytest.raises(UserError, match=message):
        build_fusion(config.model, vocab_size=300, pad=0, mean=(0, 0, 0), std=(1, 1, 1))
