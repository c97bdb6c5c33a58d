"""What follows from `loss.kind`: the loss, and what is trained beside the towers."""

from typing import get_args

import pytest
import torch

from pipeline.config.plan import Facts, make_plan
from pipeline.config.schema import LossKind
from pipeline.engine.optimizer import parameter_groups
from pipeline.losses import contrastive
from pipeline.losses.gamma import GammaLoss
from pipeline.train.objective import Outputs, build_loss
from tests.tiny import tiny_config, tiny_module, tiny_pairs

FACTS = Facts(
    train_rows=20,
    epoch_rows=20,
    row_groups=1,
    val_rows=0,
    vocab_size=300,
    num_parameters=1,
    embed_dim=16,
)
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
