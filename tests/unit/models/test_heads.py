"""Heads of a fine-tuned fusion model, against literal computations of the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.fusion import NO_LABEL, Fusion, Texts, build_fusion
from pipeline.models.heads import (
    ANSWERS_AT_ONCE,
    Answerer,
    Assigner,
    Classifier,
    TaskOutputs,
    draw_pictures,
)
from tests.tiny import FUSION, tiny_config, tiny_pairs

PAD, START, END = 0, 1, 3
WORDS = ([5], [5, 6], [7], [5, 6, 8], [9, 4], [10])  # answers; three share their first


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of calls on tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _differ(model: nn.Module) -> None:
    """As if trained: states, and what is said of them, differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _fusion(**model: Any) -> Fusion:
    torch.manual_seed(0)
    config = tiny_config(model={**FUSION, **model})
    mean, std = config.data.image_mean, config.data.image_std
    built = build_fusion(config.model, vocab_size=300, pad=PAD, mean=mean, std=std)
    _differ(built)
    return built


def _list(words: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, words))
    return torch.tensor([[START, *each, END] + [PAD] * (longest - len(each)) for each in words])


def _answerer(ranked: int = 99, layers: int = 2, words: Any = WORDS, **model: Any) -> Answerer:
    built = Answerer(_fusion(**model), _list(words), layers=layers, pad=PAD, ranked=ranked)
    for part in (built.decoder, built.answer_transform):
        _differ(part)
    nn.init.normal_(built.answer_bias)
    return built.eval()


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    """Texts of five tokens and three of padding."""
    images, tokens = tiny_pairs(count)
    tokens[:, 4], tokens[:, 5:] = END, PAD
    return images, tokens


def _two_pictures(count: int) -> tuple[Tensor, Tensor]:
    images, _ = tiny_pairs(2 * count)
    return images.unflatten(0, (count, 2)), _pairs(count)[1]


def _classifier(pictures: int, **model: Any) -> Classifier:
    built = Classifier(_fusion(**model), 4, pictures)
    _differ(built.head)
    built.begin()
    return built.eval()


def _heads() -> list[nn.Module]:
    answers = _list(WORDS)
    return [
        Classifier(_fusion(), 4, 1),
        Classifier(_fusion(), 4, 2),
        Assigner(_fusion()),
        Answerer(_fusion(), answers, layers=2, pad=PAD, ranked=3),
    ]


def _inputs(head: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    has_two = isinstance(head, Classifier) and head.second is not None
    return _two_pictures(count) if has_two else _pairs(count)


# What all heads have in common


@pytest.mark.parametrize("index", range(4))
def test_a_pretrained_model_loads_under_its_prefix_and_the_whole_comes_back(index: int) -> None:
    head, other = _heads()[index], _heads()[index]
    names = {name for name in head.state_dict() if name.startswith("towers.")}
    assert names == {f"towers.{name}" for name in _fusion().state_dict()}
    _differ(head)
    other.load_state_dict(head.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, head.state_dict()[name]), name
    assert "answers" not in head.state_dict(), "the list is not a weight"


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("count", [1, 3])
def test_what_leaves_is_finite_and_fp32_of_bf16_weights_in_training_too(
    index: int, count: int
) -> None:
    head = _heads()[index].to(torch.bfloat16)
    images, tokens = _inputs(head, count)
    for mode in (True, False):
        found: TaskOutputs = head.train(mode)(images, tokens)
        assert found.logits is not None
        assert found.logits.dtype == torch.float32
        assert found.logits.shape[0] == count
        assert not found.logits.isnan().any()
    if isinstance(head, Answerer):
        losses = head.train()(images, tokens, torch.zeros(2).int(), torch.tensor([0, 3]))
        assert losses.answer_losses.dtype == torch.float32
        assert losses.answer_losses.isfinite().all()
        losses.answer_losses.sum().backward()


@pytest.mark.parametrize("index", range(4))
def test_every_parameter_that_is_new_learns(index: int) -> None:
    head = _heads()[index].train()
    images, tokens = _inputs(head, 3)
    if isinstance(head, Answerer):
        loss = head(images, tokens, torch.arange(3), torch.tensor([1, 3, 4])).answer_losses
    else:
        loss = head(images, tokens).logits[:, 0]
    loss.sum().backward()
    unused = ("match_head", "masked_", "_projection", "logit_scale", "towers.text_model.embeddings")
    for name, parameter in head.named_parameters():
        # The key's bias moves all scores of a softmax alike.
        if not any(part in name for part in unused) and not name.endswith("key.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


# One picture and two


def test_one_picture_is_classified_by_the_first_fused_state() -> None:
    model, (images, tokens) = _classifier(1), _pairs(3)
    towers = model.towers
    fused = towers.fuse(towers.encode_texts(tokens), towers.encode_images(images))
    hidden = (fused[:, 0] @ model.head[0].weight.T + model.head[0].bias).clamp(min=0)
    expected = hidden @ model.head[2].weight.T + model.head[2].bias
    torch.testing.assert_close(model(images, tokens).logits, expected)
    assert model(images, tokens).labels is None


def test_two_pictures_are_read_by_turns() -> None:
    model, (images, tokens) = _classifier(2), _two_pictures(3)
    _differ(model.second)  # shared projections too
    towers = model.towers
    texts = towers.encode_texts(tokens)
    states, mask = texts.states, texts.is_there[:, None, None, :]
    pictures = [towers.encode_images(images[:, place]) for place in (0, 1)]
    for layer, twin in zip(towers.fusion_encoder.layer, model.second.layer, strict=True):
        states = layer(states, mask, encoder_hidden_states=pictures[0])
        states = twin(states, mask, encoder_hidden_states=pictures[1])
    logits = model(images, tokens).logits
    torch.testing.assert_close(logits, model.head(states[:, 0]))
    alone = model(images[1:2], tokens[1:2]).logits
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-4, atol=1e-5)


def test_both_pictures_and_their_order_reach_the_logits_of_their_own_row_alone() -> None:
    model, (images, tokens) = _classifier(2), _two_pictures(2)
    before = model(images, tokens).logits
    for place in (0, 1):
        other = images.clone()
        other[1, place, -1, -1] = 255 - other[1, place, -1, -1]
        after = model(other, tokens).logits
        assert (before[1] - after[1]).abs().max() > 1e-5, place
        torch.testing.assert_close(before[0], after[0])
    assert (before - model(images.flip(1), tokens).logits).abs().max() > 1e-5


def test_what_follows_the_end_of_a_text_matters_to_no_class() -> None:
    images, tokens = _two_pictures(2)
    for model, given in ((_classifier(1), images[:, 0]), (_classifier(2), images)):
        short = model(given, tokens[:, :5]).logits
        torch.testing.assert_close(model(given, tokens).logits, short, rtol=1e-4, atol=1e-5)


def test_the_second_stack_starts_as_the_first_and_shares_keys_and_values() -> None:
    model = Classifier(_fusion(), 2, 2)
    _differ(model.towers)  # pretrained weights come after the stacks were built
    firsts, twins = model.towers.fusion_encoder.layer, model.second.layer
    query = "crossattention.self.query.weight"
    assert not torch.equal(firsts[0].state_dict()[query], twins[0].state_dict()[query])
    model.begin()
    for layer, twin in zip(firsts, twins, strict=True):
        mine, theirs = twin.crossattention.self, layer.crossattention.self
        assert mine.key is theirs.key
        assert mine.value is theirs.value
        assert mine.query is not theirs.query
        for name, value in layer.state_dict().items():
            assert torch.equal(twin.state_dict()[name], value), name
    shared = {"key.weight", "key.bias", "value.weight", "value.bias"}
    names = {name for name in model.second.state_dict() if "crossattention.self" in name}
    trained = {name for name, _ in model.named_parameters()}
    hidden = {name for name in names if f"second.{name}" not in trained}
    assert {name.split("self.")[-1] for name in hidden} == shared
    Classifier(_fusion(), 2, 1).begin()  # nothing to start, and no error


def test_a_twin_is_not_its_layer() -> None:
    """A step of the one moves what the other shares with it, and no more."""
    model, (images, tokens) = _classifier(2), _two_pictures(2)
    model(images, tokens).logits.sum().backward()
    layer, twin = model.towers.fusion_encoder.layer[0], model.second.layer[0]
    for name in ("attention.self.query.weight", "crossattention.self.query.weight"):
        first, second = layer.get_parameter(name), twin.get_parameter(name)
        assert first.grad.abs().sum() > 0
        assert second.grad.abs().sum() > 0
        assert not torch.equal(first.grad, second.grad)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    images, tokens = _two_pictures(2)
    rows, targets = torch.arange(2), torch.tensor([1, 3])
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        two = _classifier(2, gradient_checkpointing=again).train()
        two(images, tokens).logits.sum().backward()
        torch.manual_seed(3)
        answerer = _answerer(gradient_checkpointing=again).train()
        for part in answerer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        answerer(images[:, 0], tokens, rows, targets).answer_losses.sum().backward()
        named = [*two.named_parameters("two"), *answerer.named_parameters("answerer")]
        found.append({name: each.grad for name, each in named if each.grad is not None})
        assert answerer.decoder.gradient_checkpointing == again
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4, msg=name)


# Text assignment


def test_pictures_are_drawn_as_often_for_each_class_and_mean_what_the_label_says() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[1, word, 3] for word in (5, 6, 7, 8)])
    seen = torch.zeros(3)
    others = torch.zeros(4, 4)
    for _ in range(600):
        pictures, labels = draw_pictures(tokens)
        for own, ((first, second), label) in enumerate(
            zip(pictures.tolist(), labels.tolist(), strict=True)
        ):
            assert first != second
            assert (first == own, second == own) == (label == 0, label == 1)
            seen[label] += 1
            others[own, second if label == 0 else first] += label != 1
    torch.testing.assert_close(seen / seen.sum(), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert others.diagonal().sum() == 0
    share = others[~torch.eye(4, dtype=torch.bool)] / others.sum()
    torch.testing.assert_close(share, torch.full((12,), 1 / 12), atol=0.02, rtol=0)


def test_pictures_of_which_one_would_be_called_wrong_have_no_label() -> None:
    torch.manual_seed(0)
    words = [5, 6, 5, 7]
    tokens = torch.tensor([[1, word, 3] for word in words])
    labels_seen = set()
    for _ in range(200):
        pictures, labels = draw_pictures(tokens)
        for own, (drawn, label) in enumerate(zip(pictures.tolist(), labels.tolist(), strict=True)):
            is_unclear = any(row != own and words[row] == words[own] for row in drawn)
            assert (label == NO_LABEL) == is_unclear
            labels_seen.add((own, label))
    assert {(0, NO_LABEL), (0, 0), (0, 1), (0, 2)} <= labels_seen
    assert (1, NO_LABEL) not in labels_seen


def test_of_two_rows_there_is_no_neither_and_of_one_no_label() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 5, 3], [1, 6, 3]])
    drawn = [draw_pictures(tokens) for _ in range(50)]
    assert {label for _, labels in drawn for label in labels.tolist()} == {0, 1}
    assert all(sorted(row) == [0, 1] for pictures, _ in drawn for row in pictures.tolist())
    pictures, labels = draw_pictures(tokens[:1])
    assert pictures.tolist() == [[0, 0]]
    assert labels.tolist() == [NO_LABEL]


def test_texts_are_assigned_with_the_pictures_drawn() -> None:
    model, (images, tokens) = Assigner(_fusion()).eval(), _pairs(4)
    model.begin()
    _differ(model.second)
    torch.manual_seed(3)
    found = model(images, tokens)
    torch.manual_seed(3)
    pictures, labels = draw_pictures(tokens)
    assert torch.equal(found.labels, labels)
    assert found.answer_losses is None
    two = Classifier(model.towers, 3, 2).eval()
    two.second, two.head = model.second, model.assign_head
    expected = two(images[pictures], tokens).logits
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_takes_over_all_but_the_head_of_an_assigner() -> None:
    assigner, model = Assigner(_fusion()), Classifier(_fusion(), 2, 2)
    _differ(assigner)
    state = assigner.state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {name.split(".")[0] for name in missing} == {"head"}
    assert {name.split(".")[0] for name in unexpected} == {"assign_head"}
    shared = state.keys() & model.state_dict().keys()
    assert shared == {name for name in state if not name.startswith("assign_head")}
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in shared)


# Answers


def _questions(model: Answerer, images: Tensor, tokens: Tensor) -> Texts:
    towers = model.towers
    texts = towers.encode_texts(tokens)
    return Texts(towers.fuse(texts, towers.encode_images(images)), texts.is_there)


def _next_log_p(model: Answerer, states: Tensor, prefix: list[int]) -> Tensor:
    """log p of the word after a prefix, given one question's states without padding.

    Layer by layer, and with no mask at all: of a prefix the last state is computed from the states
    of all shorter ones.
    """
    past: list[list[Tensor]] = []
    for end in range(1, len(prefix) + 1):
        # Each layer's input at this place, and at those before it.
        state = model.decoder.embeddings(torch.tensor([prefix[:end]]))[:, -1:]
        trail = [state]
        for depth, layer in enumerate(model.decoder.encoder.layer):
            context = torch.cat([each[depth] for each in past] + [state], dim=1)
            state = _last_of(layer, context, states)
            trail.append(state)
        past.append(trail)
    hidden = model.answer_transform(past[-1][-1])[0, 0]
    words = model.decoder.embeddings.word_embeddings.weight
    return F.log_softmax(words @ hidden + model.answer_bias, dim=0)


def _last_of(layer: Any, context: Tensor, states: Tensor) -> Tensor:
    """A BERT layer's output at the last place, written out."""
    state = context[:, -1:]
    for attention, seen in ((layer.attention, context), (layer.crossattention, states)):
        part = attention.self
        heads, size = part.num_attention_heads, part.attention_head_size
        query = part.query(state).view(heads, size)
        key, value = (f(seen)[0].view(-1, heads, size) for f in (part.key, part.value))
        weights = torch.einsum("hd,nhd->hn", query, key).div(size**0.5).softmax(1)
        read = torch.einsum("hn,nhd->hd", weights, value).reshape(1, 1, -1)
        state = attention.output.LayerNorm(attention.output.dense(read) + state)
    return layer.output.LayerNorm(
        layer.output.dense(F.gelu(layer.intermediate.dense(state))) + state
    )


def _literal_log_p(model: Answerer, images: Tensor, tokens: Tensor, words: Sequence[int]) -> Tensor:
    """log p of one answer to one question, [1, ...] each, word by word."""
    states = _questions(model, images, tokens[:, : int((tokens[0] != PAD).sum())]).states
    whole = [START, *words, END]
    steps = [_next_log_p(model, states, whole[:at])[whole[at]] for at in range(1, len(whole))]
    return torch.stack(steps).sum()


@torch.no_grad()
def test_losses_and_logits_are_those_of_writing_word_by_word() -> None:
    model, (images, tokens) = _answerer(), _pairs(3)
    tokens[1, 3:] = torch.tensor([END, 0, 0, 0, 0])
    expected = torch.stack(
        [
            torch.stack([_literal_log_p(model, images[i : i + 1], tokens[i : i + 1], words)
                         for words in WORDS])
            for i in range(3)
        ]
    )  # fmt: skip
    rows, targets = torch.tensor([2, 0, 1, 0]), torch.tensor([3, 0, 4, 1])
    losses = model(images, tokens, rows, targets).answer_losses
    torch.testing.assert_close(losses, -expected[rows, targets], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images, tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).min() > 1e-3, "images and questions matter"


@pytest.mark.parametrize("ranked", [1, 2, 4, 6, 50])
def test_the_answers_ranked_are_those_of_the_likeliest_first_words(ranked: int) -> None:
    model, (images, tokens) = _answerer(ranked), _pairs(3)
    logits, everything = model(images, tokens).logits, _answerer()(images, tokens).logits
    assert not logits.requires_grad
    for row in range(3):
        with torch.no_grad():
            states = _questions(model, images[row : row + 1], tokens[row : row + 1, :5]).states
            first = _next_log_p(model, states, [START])[[words[0] for words in WORDS]].tolist()
        # Those that share a word are alike: of them the earlier come first.
        best = sorted(range(len(WORDS)), key=lambda at: (-round(first[at], 4), at))[:ranked]
        assert sorted(logits[row].isfinite().nonzero().flatten().tolist()) == sorted(best)
        torch.testing.assert_close(logits[row, best], everything[row, best], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits, model(images, tokens).logits)


def test_more_answers_than_are_weighed_at_once_are_weighed_alike() -> None:
    words = [[5 + number % 7, 20 + number] for number in range(2 * ANSWERS_AT_ONCE + 3)]
    model, (images, tokens) = _answerer(words=words), _pairs(2)
    logits = model(images, tokens).logits
    count = len(words)
    rows = torch.arange(2).repeat_interleave(count)
    losses = model(images, tokens, rows, torch.arange(count).repeat(2)).answer_losses
    torch.testing.assert_close(logits, -losses.view(2, count).detach(), rtol=1e-4, atol=1e-4)
    assert (logits.exp().sum(1) <= 1).all(), "answers exclude each other"


def test_a_later_word_does_not_change_what_earlier_ones_are_worth() -> None:
    model, (images, tokens) = _answerer(), _pairs(2)
    questions = _questions(model, images, tokens)
    words = torch.tensor([[START, 5, 6, 8], [START, 5, 9, 8]])
    wanted = torch.ones_like(words, dtype=torch.bool)
    before = model._next_words(questions, words[:1].expand(2, -1), wanted).view(2, 4, -1)
    after = model._next_words(questions, words[1:].expand(2, -1), wanted).view(2, 4, -1)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2:] - after[:, 2:]).abs().amax(2).min() > 1e-4


def test_padding_of_questions_and_of_answers_does_not_matter() -> None:
    model, (images, tokens) = _answerer(), _pairs(2)
    rows, targets = torch.tensor([0, 1, 1]), torch.tensor([0, 3, 4])
    whole = model(images, tokens, rows, targets).answer_losses
    short = model(images, tokens[:, :5], rows, targets).answer_losses
    torch.testing.assert_close(whole, short, rtol=1e-4, atol=1e-5)
    questions = _questions(model, images, tokens)
    noisy = questions._replace(states=questions.states.clone())
    noisy.states[:, 5:] += 3.0
    torch.testing.assert_close(model._rank(noisy), model._rank(questions))
    model.answers = torch.cat([model.answers, torch.full((len(WORDS), 2), PAD)], dim=1)
    longer = model(images, tokens, rows, targets).answer_losses
    torch.testing.assert_close(whole, longer, rtol=1e-4, atol=1e-5)


def test_a_row_may_have_many_answers_and_another_none() -> None:
    model, (images, tokens) = _answerer(), _pairs(2)
    both = model(images, tokens, torch.tensor([1, 1]), torch.tensor([0, 3])).answer_losses
    torch.testing.assert_close(-both, model(images, tokens).logits[1, [0, 3]])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_decoder_starts_from_the_pretrained_as_far_as_it_reaches(layers: int) -> None:
    model = Answerer(_fusion(), _list(WORDS), layers=layers, pad=PAD, ranked=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _differ(model.towers)
    model.begin()
    state, towers = model.decoder.encoder.layer, model.towers
    for own, other in zip(state, towers.fusion_encoder.layer, strict=False):
        for name, value in other.state_dict().items():
            assert torch.equal(own.state_dict()[name], value), name
    pairs = [
        (model.decoder.embeddings, towers.text_model.embeddings),
        (model.answer_transform, towers.masked_transform),
    ]
    for own, other in pairs:
        for name, value in other.state_dict().items():
            assert torch.equal(own.state_dict()[name], value), name
            assert own.get_parameter(name) is not other.get_parameter(name)
    assert torch.equal(model.answer_bias, towers.masked_bias)
    extra = "decoder.encoder.layer.2."
    kept = [torch.equal(v, before[n]) for n, v in model.state_dict().items() if extra in n]
    assert all(kept)
    assert bool(kept) == (layers == 3)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[1, 5, 3], [2, 5, 3]], "all answers have the same start"),
        ([[1, 5, 3], [1, 0, 0]], "no answer is empty"),
    ],
)
def test_a_list_of_answers_that_cannot_be_ranked_is_refused(answers: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Answerer(_fusion(), torch.tensor(answers), layers=1, pad=PAD, ranked=2)
