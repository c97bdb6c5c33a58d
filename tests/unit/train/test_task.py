"""Fine-tuning: what is built for each kind, its loss against a literal one, where it starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from pipeline.config.schema import Config
from pipeline.data.answers import AnswerList
from pipeline.data.batches import Batch
from pipeline.data.decode import ANSWERS, NO_ANSWER, Asked
from pipeline.errors import RunStop, UserError
from pipeline.models.heads import Answerer, Assigner, Classifier, TaskOutputs
from pipeline.train.module import architecture, build_pretraining
from pipeline.train.start import build_start, check_start, load_start
from pipeline.train.store import RunFolder, RunRecord
from pipeline.train.task import (
    AnswerObjective,
    TaskObjective,
    build_module,
    build_task_objective,
    distinct_answers,
    encode_answers,
)
from tests.tiny import (
    CONV,
    FUSION,
    tiny_batch,
    tiny_config,
    tiny_pairs,
    tiny_tokenizer,
    tiny_values,
)

LABELS = AnswerList(names=("false", "true"), is_open=False)
WORDS = AnswerList(names=("red", "a large square", "2"), is_open=True)


def _config(kind: str = "classification", **sections: dict[str, Any]) -> Config:
    return tiny_config(**{"model": FUSION, "task": {"kind": kind, "decoder_layers": 1}, **sections})


def _objective(config: Config, module: torch.nn.Module) -> TaskObjective:
    assert config.task is not None
    return build_task_objective(config.task, module)


def _batch(*answers: list[int]) -> Batch:
    batch = tiny_batch(len(answers), rows=len(answers))
    table = torch.full((len(answers), ANSWERS), NO_ANSWER, dtype=torch.int32)
    for row, numbers in enumerate(answers):
        table[row, : len(numbers)] = torch.tensor(numbers)
    batch.answers = table
    return batch


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("classification", Asked(answers=LABELS), Classifier),
        ("reasoning", Asked(answers=LABELS, pictures=2), Classifier),
        ("entailment", Asked(answers=WORDS), Classifier),
        ("vqa", Asked(answers=WORDS), Answerer),
        ("assignment", None, Assigner),
    ],
)
def test_each_kind_takes_a_step(kind: str, asked: Asked | None, expected: type) -> None:
    config = _config(kind)
    module = build_module(config, tiny_tokenizer(), asked)
    assert type(module) is expected
    objective = _objective(config, module)
    batch = _batch([0], [1], [1], [0])
    if asked is not None and asked.pictures == 2:
        batch.images = torch.stack([batch.images, batch.images.flip(0)], dim=1)
    value = objective.loss(module(*objective.inputs(batch)), None, batch, 0)
    value.loss.backward()
    assert value.loss.isfinite()
    heads = [p.grad for name, p in module.named_parameters() if not name.startswith("towers.")]
    assert all(gradient is not None for gradient in heads)


def test_answers_count_by_their_share_of_those_listed() -> None:
    rows, numbers, shares = distinct_answers(_batch([2, 0, 2, -2], [1], [0, 0, 1, 1, 1]))
    found = {(int(r), int(n)): float(s) for r, n, s in zip(rows, numbers, shares, strict=True)}
    assert found == pytest.approx(
        {(0, 2): 2 / 3, (0, 0): 1 / 3, (1, 1): 1.0, (2, 0): 0.4, (2, 1): 0.6}
    )


def test_the_loss_of_classes_is_the_literal_soft_cross_entropy() -> None:
    batch = _batch([1], [0, 0, 1])
    logits = torch.tensor([[0.3, 1.0, -1.0], [2.0, 0.0, 0.1]], requires_grad=True)
    value = TaskObjective().loss(TaskOutputs(logits), None, batch, 0)
    log = logits.detach().log_softmax(1)
    expected = -(log[0, 1] + 2 / 3 * log[1, 0] + 1 / 3 * log[1, 1]) / 2
    assert value.loss.item() == pytest.approx(expected.item())
    assert value.metrics["task_accuracy"].item() == 1.0


def test_the_loss_of_written_answers_is_weighed_by_share() -> None:
    batch = _batch([1], [0, 0, 1])
    _, _, rows, numbers = AnswerObjective().inputs(batch)
    assert rows is not None
    assert numbers is not None
    assert list(zip(rows.tolist(), numbers.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 1)]
    outputs = TaskOutputs(answer_losses=torch.tensor([3.0, 6.0, 9.0]))
    loss = AnswerObjective().loss(outputs, None, batch, 0).loss
    assert loss.item() == pytest.approx((3 + 2 / 3 * 6 + 1 / 3 * 9) / 2)


def test_a_share_of_the_classes_targets_is_the_momentum_models() -> None:
    batch = _batch([1], [0, 0, 1])
    logits = torch.tensor([[0.3, 1.0, -1.0], [2.0, 0.0, 0.1]])
    slow = torch.tensor([[1.0, 0.0, 0.5], [0.0, 3.0, 0.0]])
    value = TaskObjective(0.4, 99).loss(TaskOutputs(logits), TaskOutputs(slow), batch, 49)
    alpha = 0.2  # half of the way up
    shares = torch.tensor([[0.0, 1.0, 0.0], [2 / 3, 1 / 3, 0.0]])
    targets = (1 - alpha) * shares + alpha * slow.softmax(1)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert value.loss.item() == pytest.approx(expected.item())


def test_a_share_of_each_written_word_is_the_momentum_models() -> None:
    """Against a loop over answers and their words, at alpha 0.3."""
    config = _config("vqa", task={"kind": "vqa", "decoder_layers": 1, "distillation": 0.3})
    module = build_module(config, tiny_tokenizer(), Asked(answers=WORDS)).eval()
    objective = _objective(config, module)
    assert isinstance(module, Answerer)
    batch = _batch([1], [0, 0, 2])
    inputs = objective.inputs(batch)
    with torch.no_grad():
        fast, slow = module(*inputs), module(*inputs)
    assert fast.word_logits is not None
    torch.manual_seed(0)
    slow = slow._replace(word_logits=torch.randn(fast.word_logits.shape))
    weights = {(0, 1): 1.0, (1, 0): 2 / 3, (1, 2): 1 / 3}
    expected, place = 0.0, 0
    for (_, number), weight in weights.items():
        words = [int(word) for word in module.answers[number][1:] if word != tiny_tokenizer().pad]
        for word in words:
            log = fast.word_logits[place].log_softmax(0)
            soft = (slow.word_logits[place].softmax(0) * log).sum()
            expected -= weight / 2 * float(0.7 * log[word] + 0.3 * soft)
            place += 1
    assert place == len(fast.word_logits)
    loss = objective.loss(fast, slow, batch, 10**6).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_labelled_text_in_a_batch_moves_nothing() -> None:
    outputs = TaskOutputs(torch.randn(2, 3, requires_grad=True), labels=torch.tensor([-100, -100]))
    value = TaskObjective().loss(outputs, None, _batch([0], [0]), 0)
    value.loss.backward()
    assert value.loss.item() == 0.0


def test_answers_are_encoded_to_the_longest_and_no_further() -> None:
    ids = encode_answers(WORDS, tiny_tokenizer(), _config("vqa"))
    assert ids.shape[0] == 3
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] != 0).any()
    short = _config("vqa", model={**FUSION, "text": {"context_length": 3, "width": 16,
                                                     "layers": 2, "heads": 2}})  # fmt: skip
    with pytest.raises(UserError, match=r"task.answers: 'a large square' has more than the 1 tok"):
        encode_answers(WORDS, tiny_tokenizer(), short)


def _run(folder: Path, config: Config) -> None:
    """A run's folder with one checkpoint, as far as a start looks at it."""
    record = RunRecord(
        name="first", config=config.model_dump(mode="json"), tokenizer=tiny_tokenizer(),
        data_digest="", mlflow_uri="", mlflow_run_id="", is_finished=True,
    )  # fmt: skip
    run = RunFolder.of(str(folder), "first")
    run.write_record(record)
    step = folder / "first" / "step-00000004"
    (step / "state").mkdir(parents=True)
    module = build_pretraining(config, tiny_tokenizer())
    torch.save({"module": module.state_dict()}, step / "state" / "mp_rank_00_model_states.pt")
    (step / "meta.json").write_text(json.dumps({"zero_stage": 0}))
    (step / "manifest.json").write_text("{}")


def test_a_task_starts_from_a_pretrained_run(tmp_path: Path) -> None:
    """All weights of the model; its image places resized, its text places cut; the heads follow."""
    first = tiny_config(model=FUSION, train={"seed": 5})
    _run(tmp_path, first)
    model = {
        **FUSION,
        "init": str(tmp_path / "first"),
        "image": {"size": 24, "patch": 8, "width": 16, "layers": 2, "heads": 2},
        "text": {"context_length": 6, "width": 16, "layers": 2, "heads": 2},
    }
    config = _config("vqa", model=model)
    assert check_start(config) == tiny_tokenizer()
    module = build_module(config, tiny_tokenizer(), Asked(answers=WORDS))
    load_start(module, tmp_path / "first" / "step-00000004")
    theirs = build_pretraining(first, tiny_tokenizer()).towers.state_dict()
    for name, value in module.towers.state_dict().items():
        other = theirs[name]
        if name == "vision_model.embeddings.position_embeddings":
            assert value.shape == (1, 10, 16)
            assert torch.equal(value[:, 0], other[:, 0])
        else:
            assert torch.equal(value, other[: len(value)]), name
    layer = module.decoder.encoder.layer[0].state_dict()
    for name, value in module.towers.fusion_encoder.layer[0].state_dict().items():
        assert torch.equal(layer[name], value), name


def test_a_task_keeps_what_pretrained_parts_decided(tmp_path: Path) -> None:
    """Activations and the vocabulary of the ViT and BERT that the starting run began with."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
    vision = ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8, hidden_act="relu")
    ViTModel(vision, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    words = BertConfig(**sizes, num_hidden_layers=4, vocab_size=333, hidden_act="gelu_new")
    BertModel(words, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    model = {
        **FUSION,
        "image": {**tiny_values()["model"]["image"], "pretrained": str(tmp_path / "vit")},
        "text": {**tiny_values()["model"]["text"], "pretrained": str(tmp_path / "bert")},
    }
    first = tiny_config(model=model)
    _run(tmp_path, first)
    step = tmp_path / "first" / "step-00000004"
    theirs = build_pretraining(first, tiny_tokenizer()).eval()
    meta = {"zero_stage": 0, "architecture": architecture(theirs)}
    (step / "meta.json").write_text(json.dumps(meta))
    for part in ("vit", "bert"):
        shutil.rmtree(tmp_path / part)  # they are not loaded again
    config = _config("vqa", model={**FUSION, "init": str(tmp_path / "first")})
    module = build_start(config, tiny_tokenizer(), Asked(answers=WORDS), step).eval()
    images, tokens = tiny_pairs(3)
    with torch.no_grad():
        for found, expected in (
            (module.towers.encode_images(images), theirs.towers.encode_images(images)),
            (module.towers.encode_texts(tokens)[0], theirs.towers.encode_texts(tokens)[0]),
        ):
            torch.testing.assert_close(found, expected)


def test_heads_are_new_and_a_second_stack_follows_the_model(tmp_path: Path) -> None:
    """From a run with one picture and as many labels: nothing of its head, and no random stack."""
    pretraining = tiny_config(model=FUSION, train={"seed": 5})
    _run(tmp_path, pretraining)
    one = build_module(_config(train={"seed": 6}), tiny_tokenizer(), Asked(answers=LABELS))
    step = tmp_path / "first" / "step-00000004"
    torch.save({"module": one.state_dict()}, step / "state" / "mp_rank_00_model_states.pt")
    two = build_module(_config("reasoning"), tiny_tokenizer(), Asked(answers=LABELS, pictures=2))
    head = {name: value.clone() for name, value in two.head.state_dict().items()}
    load_start(two, step)
    assert all(torch.equal(value, head[name]) for name, value in two.head.state_dict().items())
    theirs = one.towers.fusion_encoder.layer.state_dict()
    for name, value in two.second.layer.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_weights_of_another_shape_stop_the_run_by_name(tmp_path: Path) -> None:
    _run(tmp_path, tiny_config(model=FUSION))
    wide = tiny_config(model={**FUSION, "embed_dim": 8})
    module = build_pretraining(wide, tiny_tokenizer())
    with pytest.raises(RunStop, match=r"its towers.visual_projection.weight has shape \[16, 16\]"):
        load_start(module, tmp_path / "first" / "step-00000004")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "nowhere"}, "model.init: .*nowhere is no run with a checkpoint"),
        ({"embed_dim": 8}, r"model.embed_dim: is 8; .* set model.embed_dim=16"),
        ({"fusion": {"layers": 1}}, r"model.fusion.layers: is 1; .*=2"),
        ({"image": CONV}, r"model.image.stem: is conv; .* has patch: set model.image.stem=patch"),
        (
            {"text": {"context_length": 9, "width": 16, "layers": 2, "heads": 2}},
            r"model.text.context_length: is 9; .* knows 8 places",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _run(tmp_path, tiny_config(model=FUSION))
    model = {**FUSION, "init": str(tmp_path / "first"), **changes}
    with pytest.raises(UserError, match=message):
        check_start(_config(model=model))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    _run(tmp_path, tiny_config(model=FUSION))
    config = _config(
        model={**FUSION, "init": str(tmp_path / "first")},
        data={"train": "nowhere", "tokenizer": _saved_tokenizer(tmp_path / "other")},
    )
    with pytest.raises(UserError, match=r"data.tokenizer: is .*other; .* leave it out"):
        check_start(config)


def _saved_tokenizer(folder: Path) -> str:
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tiny_tokenizer().json),
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|unknown|>",
    )  # fmt: skip
    words.save_pretrained(folder)
    return str(folder)
