"""What follows from `loss.kind`: the loss, and what is trained beside the towers."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from pipeline.config.plan import make_plan
from pipeline.config.schema import LossKind
from pipeline.engine.optimizer import parameter_groups
from pipeline.losses import contrastive
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.structure import bridge, consistency
from pipeline.train.module import Outputs
from pipeline.train.objective import BRIDGE_CURVE, Objective, build_loss, build_objective
from tests.tiny import tiny_config, tiny_facts, tiny_module, tiny_pairs, tiny_tokenizer

FACTS = tiny_facts(20)
CLASSES = {
    "gamma": GammaLoss,
    "infonce_local": contrastive.InfoNCELocal,
    "infonce_gathered": contrastive.InfoNCEGathered,
    "sigmoid_local": contrastive.SigmoidLocal,
    "sigmoid_ring": contrastive.SigmoidRing,
    "fastclip_v1": contrastive.FastCLIP,
    "fastclip_v3": contrastive.FastCLIP,
}


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_each_kind_is_built_and_takes_the_models_outputs(kind: str) -> None:
    config = tiny_config(loss={"kind": kind})
    module = tiny_module(config)
    plan, _ = make_plan(config, FACTS)
    loss = build_loss(config, plan, embed_dim=16, rank=0, world_size=1)
    assert type(loss) is CLASSES[kind]
    value = loss(*module(*tiny_pairs(4)).contrast, keys=torch.arange(4) + 16)
    value.loss.backward()
    scale, bias = module.towers.logit_scale, module.logit_bias
    assert scale.grad is not None, "ZeRO reduces a gradient of every parameter"
    assert (scale.grad == 0) == (kind == "fastclip_v1")
    assert (bias is not None) == kind.startswith("sigmoid")
    if bias is not None:
        assert bias.tolist() == [-10.0]
        assert bias.grad is not None
        assert bias.grad != 0


def test_the_configs_numbers_reach_fastclip() -> None:
    """gamma 1 forgets; a smaller rho gives a smaller loss."""

    def losses(**fields: float) -> list[float]:
        config = tiny_config(loss={"kind": "fastclip_v3", **fields})
        module = tiny_module(config)
        plan, _ = make_plan(config, FACTS)
        loss = build_loss(config, plan, embed_dim=16, rank=0, world_size=1)
        keys = torch.arange(4)
        return [
            loss(*module(*tiny_pairs(4, seed=step)).contrast, keys=keys).loss.item()
            for step in range(2)
        ]

    scale = 1 / 0.07
    default, rho, forgetful = losses(), losses(rho=5.5), losses(fastclip_gamma=1.0)
    assert [a - b for a, b in zip(default, rho, strict=True)] == pytest.approx([1 / scale] * 2)
    assert default[0] == forgetful[0]
    assert default[1] != forgetful[1]


def test_the_configs_evidence_reaches_gamma() -> None:
    """counted: the 3 negatives of 4 pairs stand beside 8 - 1 - 3 that the prior stands for."""
    weights = {}
    for evidence in ("measured", "counted"):
        config = tiny_config(loss={"prior": "amortized", "evidence": evidence})
        plan, _ = make_plan(config, FACTS)
        loss = build_loss(config, plan, embed_dim=16, rank=0, world_size=1)
        metrics = loss(*tiny_module(config)(*tiny_pairs(4)).contrast).metrics
        weights[evidence] = metrics["prior_batch_weight_image"].item()
    assert weights["counted"] == pytest.approx(3 / 7)
    assert weights["measured"] > 3 / 7


def test_a_logit_bias_is_not_decayed_and_changes_no_embedding() -> None:
    config = tiny_config(loss={"kind": "sigmoid_ring"})
    module, plain = tiny_module(config), tiny_module(tiny_config(loss={"kind": "infonce_local"}))
    (group,) = [
        group
        for group in parameter_groups(module, config.optim)
        if any(parameter is module.logit_bias for parameter in group["params"])
    ]
    assert (group["weight_decay"], group["peak_lr"]) == (0.0, config.optim.lr)
    module.eval(), plain.eval()
    inputs = tiny_pairs(4)
    for mine, theirs in zip(module(*inputs)[:3], plain(*inputs)[:3], strict=True):
        assert torch.equal(mine, theirs)
    only_image = module(inputs[0], None)
    assert isinstance(only_image, Outputs)
    assert only_image.text is None


def _objective(**structure: Any) -> tuple[Objective, Outputs]:
    """The objective of a structure, and a batch's outputs with views."""
    config = tiny_config(structure=structure)
    plan, _ = make_plan(config, FACTS)
    outputs = tiny_module(config)(*tiny_pairs(6), *tiny_pairs(6, seed=9))
    return build_objective(
        config, plan, tiny_tokenizer(), embed_dim=16, rank=0, world_size=1
    ), outputs


KEYS = torch.arange(6)


def test_views_are_embedded_in_the_same_forward_as_alone() -> None:
    config = tiny_config(structure={"separation": {"weight": 1.0}})
    module = tiny_module(config).eval()
    first, second = tiny_pairs(6), tiny_pairs(6, seed=9)
    both, alone, view = module(*first, *second), module(*first), module(*second)
    for name in ("image", "text", "image_independent", "text_independent"):
        torch.testing.assert_close(getattr(both, name), getattr(alone, name))
        side, _, kind = name.partition("_")
        seen = "_".join(part for part in (side, "view", kind) if part)
        torch.testing.assert_close(getattr(both, seen), getattr(view, name))
    assert not torch.allclose(alone.image, alone.image_independent)
    assert alone.image_view is None


def test_without_structure_the_objective_is_the_contrastive_loss() -> None:
    objective, outputs = _objective()
    value = objective(outputs, KEYS, 0)
    assert torch.equal(value.loss, objective.contrast(*outputs.contrast, keys=KEYS).loss)
    assert "contrastive_loss" not in value.metrics


def test_the_loss_is_the_weighted_sum_of_its_parts_and_weights_follow_their_schedule() -> None:
    objective, outputs = _objective(
        in_modal=0.5,
        bridge={"weight": 2.0, "t": [0.1, 0.6], "text": True, "start_samples": 100},
        consistency={"weight": 0.3, "views": False, "ramp_samples": 199},
    )
    image, text = outputs.modalities
    early, late = objective(outputs, KEYS, 99), objective(outputs, KEYS, 5000)
    base = objective.contrast(*outputs.contrast, keys=KEYS).loss.detach()
    in_modal = sum(late.metrics[f"structure/in_modal_loss_{side}"] for side in ("image", "text"))
    shared = 0.5 * base + 0.25 * in_modal
    bridges = sum(
        bridge(own.view, own.shared, other.shared, t) / 2
        for own, other in ((image, text), (text, image))
        for t in (0.1, 0.6)
    )
    plain = consistency(replace(image, view=None), replace(text, view=None), 8)[0]
    torch.testing.assert_close(late.loss, shared + 2 * bridges + 0.3 * plain)
    torch.testing.assert_close(early.loss, shared + 0.15 * plain)
    torch.testing.assert_close(late.metrics["loss"], late.loss.detach())
    torch.testing.assert_close(late.metrics["contrastive_loss"], base)


def test_a_term_that_has_not_begun_gives_every_parameter_a_gradient_already() -> None:
    """Under ZeRO a parameter that sometimes has none is trouble."""
    separation = {"weight": 1.0, "start_samples": 10**6}
    config = tiny_config(structure={"separation": separation})
    plan, _ = make_plan(config, FACTS)
    objective = build_objective(config, plan, tiny_tokenizer(), embed_dim=16, rank=0, world_size=1)
    module = tiny_module(config)
    objective(module(*tiny_pairs(6), *tiny_pairs(6, seed=9)), KEYS, 0).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    projection = module.towers.independent_visual_projection
    assert projection is not None
    assert not projection.weight.grad.any()  # pyright: ignore


def test_a_sampled_bridge_follows_the_steps_seed_and_lies_among_its_points() -> None:
    objective, outputs = _objective(bridge={"weight": 1.0, "t": "sampled"})
    image, text = outputs.modalities

    def residual(seed: int) -> float:
        torch.manual_seed(seed)
        return objective(outputs, KEYS, 0).metrics["structure/bridge_residual_image"].item()

    assert residual(1) == residual(1) != residual(2)
    value = objective(outputs, KEYS, 0)
    curve = value.diagnose()
    for name, t in BRIDGE_CURVE.items():
        assert image.view is not None
        torch.testing.assert_close(curve[name], bridge(image.view, image.shared, text.shared, t))
    assert min(curve[name] for name in BRIDGE_CURVE) < residual(1)


def test_running_state_of_every_part_comes_back() -> None:
    every = {"in_modal": 0.5, "separation": {"weight": 1.0}}
    first, outputs = _objective(**every)
    first(outputs, KEYS, 0)
    second, _ = _objective(**every)
    second.load_state_dict([first.state_dict()], 0, 1)
    state = second.state_dict()
    assert state == first.state_dict()
    assert state["separation_text"]["uniformity"]["weight"] > 0
    one, other = first(outputs, KEYS, 0), second(outputs, KEYS, 0)
    assert torch.equal(one.loss, other.loss)
