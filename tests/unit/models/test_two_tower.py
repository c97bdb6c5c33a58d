import math
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.two_tower import TwoTower, build_two_tower
from tests.tiny import tiny_config, tiny_pairs, tiny_tokenizer


def _build(**model) -> TwoTower:
    config = tiny_config(model=model)
    tokenizer = tiny_tokenizer()
    return build_two_tower(
        config.model,
        vocab_size=tokenizer.vocab_size,
        start=tokenizer.start,
        end=tokenizer.end,
        pad=tokenizer.pad,
        mean=config.data.image_mean,
        std=config.data.image_std,
    )


def test_embeddings_have_unit_norm_and_the_scale_its_first_value() -> None:
    images, tokens = tiny_pairs(3)
    image, text, scale, *independent = _build()(images, tokens)
    assert independent == [None, None], "only where they are asked for"
    assert image.shape == text.shape == (3, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert scale.shape == ()


def test_one_side_alone() -> None:
    images, tokens = tiny_pairs(2)
    model = _build()
    assert model(images, None)[1] is None
    torch.testing.assert_close(model(None, tokens)[1], model(images, tokens)[1])


def test_what_follows_the_end_token_does_not_matter() -> None:
    """No attention mask is needed: the tower is causal and pools at the end token."""
    model = _build().eval()
    _, tokens = tiny_pairs(2)
    tokens[:, 4] = 3
    changed = tokens.clone()
    changed[:, 5:] = 7
    torch.testing.assert_close(model(None, tokens)[1], model(None, changed)[1])
    changed[:, 2] = 9
    assert not torch.allclose(model(None, tokens)[1], model(None, changed)[1])


def test_scale_is_clamped_to_1_and_100() -> None:
    model = _build()
    for value, expected in ((10.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        assert model(None, tiny_pairs(1)[1])[2].item() == pytest.approx(expected, rel=1e-5)


def test_images_are_normalised_on_the_device() -> None:
    """Mean-coloured pixels become zeros for the tower."""
    model = _build()
    seen = {}
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(torch.full((1, 16, 16, 3), 117, dtype=torch.uint8), None)
    expected = (117 / 255 - 0.4578275) / 0.26130258
    assert seen["pixel_values"].shape == (1, 3, 16, 16)
    assert seen["pixel_values"][0, 1].mean().item() == pytest.approx(expected, abs=1e-4)


def _saved(folder: Path) -> Path:
    from transformers import CLIPModel

    model = _build()
    clip = CLIPModel(model.clip_config)
    state = {name: value for name, value in model.state_dict().items()}
    state["logit_scale"] = torch.tensor(math.log(20.0))
    clip.load_state_dict(state, strict=False)
    clip.save_pretrained(folder)
    return folder


def test_pretrained_weights_are_loaded(tmp_path: Path) -> None:
    path = _saved(tmp_path / "clip")
    images, tokens = tiny_pairs(2)
    first, second = _build(pretrained=str(path)), _build(pretrained=str(path))
    torch.testing.assert_close(first(images, tokens), second(images, tokens))
    assert first(images, None)[2].item() == pytest.approx(20.0, rel=1e-4)


def test_pretrained_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = str(_saved(tmp_path / "clip"))
    with pytest.raises(UserError, match="cannot be loaded as a CLIP model"):
        _build(pretrained=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"model.image.size is 32; .* set model.image.size=16"):
        _build(pretrained=path, image={"size": 32, "patch": 8})
    with pytest.raises(UserError, match=r"model.text.context_length is 9; .*=8"):
        _build(pretrained=path, text={"context_length": 9})
    config = tiny_config(model={"pretrained": path})
    with pytest.raises(UserError, match=r"data.tokenizer: it has 5000 ids, .* knows 300"):
        build_two_tower(
            config.model, vocab_size=5000, start=1, end=3, pad=0, mean=(0, 0, 0), std=(1, 1, 1)
        )
