"""Re-ranking by the matching head: against every pair matched and ranked literally, and by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.plan import Facts, find_contradictions, make_plan
from pipeline.config.schema import EvaluateConfig
from pipeline.errors import RunStop
from pipeline.evaluate.embed import Embedded, Unfused, embed_rows
from pipeline.evaluate.headline import headline
from pipeline.evaluate.rerank import Match, rerank
from pipeline.evaluate.retrieval import Ranks, rank_by_contrast, recalls
from pipeline.evaluate.suite import _retrieval
from pipeline.train.module import build_pretraining
from tests.tiny import FUSION, tiny_batch, tiny_config, tiny_module, tiny_pairs, tiny_tokenizer

CPU = torch.device("cpu")


def _rows(image: Tensor, text: Tensor, owners: Tensor) -> Embedded:
    """Rows whose images' states and captions' tokens are but their numbers."""
    return Embedded(
        image=image,
        text=text,
        image_independent=None,
        text_independent=None,
        owners=owners,
        labels={},
        bad_rows=0,
        cut_captions=0,
        unfused=Unfused(
            states=[torch.full((1, 1), float(number)) for number in range(len(image))],
            first=0,
            blank=torch.zeros(1, 1),
            tokens=torch.arange(len(text), dtype=torch.int32)[:, None],
        ),
    )


def _match_of(scores: Tensor) -> Match:
    """The matching head that gives scores [images, texts]."""
    return lambda states, tokens: scores[states[:, 0, 0].long(), tokens[:, 0].long()]


def _anew(rows: Embedded, match: Match, k: int, batch: int = 7) -> Ranks:
    before = rank_by_contrast(rows.image, rows.text, rows.owners)
    return rerank(match, rows, before, k=k, batch=batch, device=CPU)


def _literal(sims: Tensor, scores: Tensor, is_right: Tensor, k: int) -> list[int]:
    """Of each query the place of its first right answer in a list that is sorted in two parts."""
    places = []
    for sim, score, right in zip(sims, scores, is_right, strict=True):
        order = sorted(range(len(sim)), key=lambda answer: -float(sim[answer]))
        best = sorted(order[:k], key=lambda answer: -float(score[answer]))
        places.append([bool(right[answer]) for answer in best + order[k:]].index(True))
    return places


def _random(images: int, captions: int, seed: int) -> tuple[Embedded, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(images).repeat_interleave(captions)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    image = F.normalize(torch.randn(images, 6, generator=generator), dim=1)
    text = F.normalize(torch.randn(len(owners), 6, generator=generator), dim=1)
    return _rows(image, text, owners), torch.randn(images, len(owners), generator=generator)


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 11, 500])
def test_equals_lists_sorted_in_two_parts(captions: int, k: int) -> None:
    for seed in range(5):
        rows, scores = _random(11, captions, seed)
        sims = rows.image @ rows.text.T
        is_right = torch.arange(11)[:, None] == rows.owners
        found = _anew(rows, _match_of(scores), k)
        assert found.text.tolist() == _literal(sims.T, scores.T, is_right.T, k)
        assert found.image.tolist() == _literal(sims, scores, is_right, k)


def test_a_wrong_first_becomes_a_right_one() -> None:
    """Three images; text 0 lies nearer to image 1 than to its own, and the head knows better."""
    image = torch.eye(3)
    text = F.normalize(torch.tensor([[0.6, 0.8, 0.0], [0.1, 1.0, 0.0], [0.0, 0.5, 0.8]]), dim=1)
    rows = _rows(image, text, torch.arange(3))
    before = rank_by_contrast(image, text, rows.owners)
    assert before.text.tolist() == [1, 0, 0]
    scores = torch.tensor([[2.0, -9.0, 9.0], [1.0, 3.0, 0.0], [9.0, 9.0, 4.0]])
    # Image 2, which the head likes best for text 0, is not among its two best by contrast.
    assert _anew(rows, _match_of(scores), 2).text.tolist() == [0, 0, 0]
    assert _anew(rows, _match_of(scores), 3).text.tolist() == [1, 1, 1]
    assert _anew(rows, _match_of(scores), 1).text.tolist() == [1, 0, 0]
    found = dict(recalls(_anew(rows, _match_of(scores), 2), rows.owners))
    assert found["text_to_image_recall_at_1"] == 1.0
    assert found.keys() == dict(recalls(before, rows.owners)).keys()


def test_ties_count_against_the_query_in_contrast_and_in_the_head() -> None:
    rows, scores = _random(12, 1, 0)
    same = _match_of(torch.zeros_like(scores))
    assert _anew(rows, same, 12).text.tolist() == _anew(rows, same, 12).image.tolist() == [11] * 12
    collapsed = _rows(torch.eye(2)[[0] * 12], torch.eye(2)[[0] * 12], torch.arange(12))
    knows = _match_of(torch.eye(12))
    # Which four of equals are best is chance: none is the query's own.
    found = _anew(collapsed, knows, 4)
    assert found.text.tolist() == found.image.tolist() == [11] * 12
    assert _anew(collapsed, knows, 12).text.tolist() == [0] * 12


def test_pairs_that_both_ways_want_are_matched_once_and_states_are_few_at_a_time() -> None:
    rows, scores = _random(20, 2, 3)
    seen: list[tuple[int, int]] = []

    def match(states: Tensor, tokens: Tensor) -> Tensor:
        assert len(states) == len(tokens) <= 16
        seen.extend(zip(states[:, 0, 0].int().tolist(), tokens[:, 0].tolist(), strict=True))
        return _match_of(scores)(states, tokens)

    _anew(rows, match, 3, batch=16)
    sims = rows.image @ rows.text.T
    wanted = {(int(i), t) for t in range(40) for i in sims[:, t].topk(3).indices}
    wanted |= {(i, int(t)) for i in range(20) for t in sims[i].topk(3).indices}
    assert sorted(seen) == sorted(wanted)


def test_scores_that_are_not_finite_are_no_perfect_score() -> None:
    rows, scores = _random(4, 1, 0)
    with pytest.raises(RunStop, match="scores of the matching head are not finite"):
        _anew(rows, _match_of(scores * torch.nan), 2)


def _module(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    module = tiny_module(tiny_config(model=FUSION)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():  # as if trained: scores differ
            if "fusion_encoder" in name or "match" in name:
                parameter.mul_(8)
    return module.to(dtype)


def _embedded(module: Any) -> Embedded:
    """Eleven images in batches of four, the first eight with three captions."""
    sizes = ((4, 3), (4, 3), (3, 1))
    batches = [
        tiny_batch(4, rows=rows, seed=seed, captions=captions)
        for seed, (rows, captions) in enumerate(sizes)
    ]
    return embed_rows(
        lambda images, tokens: module(images, tokens).parts,
        iter(batches),
        tiny_pairs(4),
        CPU,
        keeps_states=True,
    )


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_plan_tells_what_states_take(precision: str, dtype: torch.dtype) -> None:
    unfused = _embedded(_module(dtype)).unfused
    assert unfused is not None
    config = tiny_config(
        model=FUSION,
        engine={"zero_stage": 1, "precision": precision},
        evaluate={"rerank": 2},
        cluster={"workers": 1},
    )
    facts = Facts(
        train_rows=100,
        epoch_rows=100,
        row_groups=1,
        val_rows=len(unfused.states),
        vocab_size=300,
        num_parameters=1,
        embed_dim=16,
    )
    plan, _ = make_plan(config, facts)
    assert plan.rerank_bytes == sum(states.nbytes for states in unfused.states) > 0
    assert any(said.startswith("Re-ranking: ") for said in plan.sentences())
    image = len(unfused.states[0]) * unfused.states[0][0].nbytes
    two = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"workers": 2}),
            "evaluate": config.evaluate.model_copy(update={"max_rows": 7}),
        }
    )
    assert make_plan(two, facts)[0].rerank_bytes == 4 * image
    without, _ = make_plan(tiny_config(model=FUSION), facts)
    assert without.rerank_bytes == 0
    assert not any(said.startswith("Re-ranking: ") for said in without.sentences())


def _matcher(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda states, tokens: module(None, tokens, None, None, states).matching


@pytest.mark.parametrize("k", [3, 100])
def test_equals_every_pair_fused_and_matched_by_the_model(k: int) -> None:
    module = _module()
    rows = _embedded(module)
    model = module.towers
    images = torch.cat(
        [
            tiny_batch(4, rows=count, seed=seed).images[:count]
            for seed, count in enumerate((4, 4, 3))
        ]
    )
    first = [tiny_batch(4, rows=4, seed=seed, captions=3) for seed in (0, 1)]
    last = tiny_batch(4, rows=3, seed=2)
    tokens = [*first[0].tokens, *first[1].tokens, *last.tokens[:3]]
    tokens += [
        torch.from_numpy(row) for batch in first for more in batch.more_tokens for row in more
    ]
    assert rows.unfused is not None
    assert torch.equal(rows.unfused.tokens, torch.stack(tokens))
    with torch.no_grad():
        states = model.encode_images(images)
        texts = model.encode_texts(torch.stack(tokens))
        scores = torch.stack(
            [model.match(model.fuse(texts, state.expand(27, -1, -1)))[:, 1] for state in states]
        )
        torch.testing.assert_close(torch.stack(rows.unfused.states), states)
    assert scores.std() > 0.01
    assert len(scores.unique()) == scores.numel()
    found = _anew(rows, _matcher(module), k)
    is_right = torch.arange(11)[:, None] == rows.owners
    sims = rows.image @ rows.text.T
    assert found.text.tolist() == _literal(sims.T, scores.T, is_right.T, k)
    assert found.image.tolist() == _literal(sims, scores, is_right, k)
    if k == 100:
        dense = (scores > scores[rows.owners, torch.arange(27)]).sum(0)
        assert found.text.tolist() == dense.tolist()


def test_in_bf16_scores_are_finer_than_bf16_and_states_stay_in_it() -> None:
    module = _module(torch.bfloat16)
    rows = _embedded(module)
    assert rows.unfused is not None
    assert {state.dtype for state in rows.unfused.states} == {torch.bfloat16}
    states, tokens = torch.stack(rows.unfused.states), rows.unfused.tokens[:11]
    with torch.no_grad():
        scores = _matcher(module)(states, tokens)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()
    _anew(rows, _matcher(module), 4)


def test_states_are_kept_only_if_asked_for_and_only_a_fusion_model_has_them() -> None:
    embed = partial(embed_rows, blank=tiny_pairs(3), device=CPU)
    fusion, towers = _module(), build_pretraining(tiny_config(), tiny_tokenizer()).eval()
    batch = tiny_batch(3, rows=2)
    plain = embed(lambda *inputs: fusion(*inputs).parts, iter([batch]))
    assert plain.unfused is None
    with pytest.raises(RunStop, match=r"evaluate\.rerank is set, and the model has no matching"):
        embed(lambda *inputs: towers(*inputs).parts, iter([batch]), keeps_states=True)


def test_only_a_fusion_model_with_retrieval_re_ranks() -> None:
    evaluate = {"rerank": 16}
    fusion = {"model": FUSION, "structure": {"views": "momentum"}}
    assert find_contradictions(tiny_config(evaluate=evaluate, **fusion)) == []
    for config in (
        tiny_config(evaluate=evaluate),
        tiny_config(evaluate=evaluate | {"retrieval": False}, **fusion),
    ):
        (problem,) = find_contradictions(config)
        assert problem.place == "evaluate.rerank"
        assert "leave it out" in problem.message


def test_both_are_measured_and_the_headline_shows_both() -> None:
    rows, scores = _random(12, 1, 0)
    match, ranks = _match_of(scores), rank_by_contrast(rows.image, rows.text, rows.owners)
    plain = dict(_retrieval(EvaluateConfig(), match, rows, ranks, CPU))
    metrics = {"rows": 12.0, **dict(_retrieval(EvaluateConfig(rerank=5), match, rows, ranks, CPU))}
    anew = dict(recalls(_anew(rows, match, 5), rows.owners))
    assert metrics == {
        "rows": 12.0, **plain, **{f"retrieval_reranked/{name}": anew[name] for name in anew}
    }  # fmt: skip
    assert len(headline(plain | {"rows": 12.0})) == 2
    assert [label for label, *_ in headline(metrics)] == [
        "text to image R@1 of 12",
        "image to text R@1 of 12",
        "text to image R@1 of 12, re-ranked",
        "image to text R@1 of 12, re-ranked",
    ]
