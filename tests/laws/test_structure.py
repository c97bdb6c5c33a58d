"""Laws of the latent structure's terms: literal formulas, gradients, invariances, shards."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.gamma import GammaLoss
from pipeline.losses.structure import (
    Modality,
    Separation,
    Uniformity,
    bridge,
    bridge_mean,
    consistency,
    geometry,
    independent_geometry,
    orthogonality,
    squared_differences,
)

ROWS, DIM = 7, 5


def _unit(seed: int, rows: int = ROWS, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1).requires_grad_()


def _modality(seed: int, rows: int = ROWS) -> Modality:
    return Modality(
        shared=_unit(seed, rows),
        view=_unit(seed + 1, rows),
        independent=_unit(seed + 2, rows),
        independent_view=_unit(seed + 3, rows),
    )


def _scale(value: float = 7.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((x * y for x, y in zip(a, b, strict=True)), a.new_zeros(()))


def _assert_gradients_equal(ours: Tensor, literal: Tensor, inputs: list[Tensor]) -> None:
    mine = torch.autograd.grad(ours, inputs, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(literal, inputs, allow_unused=True)
    for each, expected in zip(mine, theirs, strict=True):
        assert (each is None) == (expected is None)
        if each is not None:
            torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-10)


# ---- literal formulas ----------------------------------------------------------------------------


def _contrast_of_views(anchors: Tensor, views: Tensor, scale: Tensor) -> Tensor:
    """-(1/N) sum_j log e^{s <z_j, z^a_j>} / sum_k e^{s <z_j, z^a_k>}."""
    total = anchors.new_zeros(())
    for j in range(len(anchors)):
        logits = torch.stack([scale * _dot(anchors[j], view) for view in views])
        total = total - (logits[j].exp() / logits.exp().sum()).log() / len(anchors)
    return total


def _uniformity(rows: Tensor) -> Tensor:
    """log of the mean over j != k of e^{-2 |z_j - z_k|^2}, of unit vectors."""
    potentials = [
        (-2 * (2 - 2 * _dot(rows[j], rows[k]))).exp()
        for j, k in itertools.permutations(range(len(rows)), 2)
    ]
    return torch.stack(potentials).mean().log()


def _gaps(v: Tensor, t: Tensor, va: Tensor, ta: Tensor) -> tuple[Tensor, Tensor]:
    """L_GC and L_GC^a as printed."""
    n = len(v)
    plain, viewed = v.new_zeros(()), v.new_zeros(())
    for j in range(n):
        for k in range(n):
            plain = plain + (_dot(v[j], t[k]) - _dot(v[k], t[j])) ** 2
            plain = plain + (_dot(v[j], v[k]) - _dot(t[j], t[k])) ** 2
            viewed = viewed + (_dot(v[j], v[k]) - _dot(va[j], va[k])) ** 2
            viewed = viewed + (_dot(t[j], t[k]) - _dot(ta[j], ta[k])) ** 2
        viewed = viewed + (_dot(v[j], t[j]) - _dot(va[j], ta[j])) ** 2
    return plain / n, viewed / n


def test_the_contrast_of_views_is_the_literal_one_sided_cross_entropy() -> None:
    anchors, views, scale = _unit(0), _unit(1), _scale()
    ours = GammaLoss(virtual_batch=ROWS, one_sided=True)(anchors, views, scale)
    literal = _contrast_of_views(anchors, views, scale)
    torch.testing.assert_close(ours.loss, literal, rtol=1e-12, atol=1e-12)
    _assert_gradients_equal(ours.loss, literal, [anchors, views, scale])
    assert {name for name in ours.diagnose() if name.endswith("_text")} == set()


def test_a_one_sided_loss_has_no_partners_who_know_two_sides() -> None:
    with pytest.raises(ValueError, match="one_sided"):
        GammaLoss(virtual_batch=8, one_sided=True, reach=object())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("block", [3, 256])
def test_uniformity_is_the_literal_log_mean_at_its_first_batch(block: int) -> None:
    """Then u is one over this batch's own mean, and the bound is the log itself."""
    rows = _unit(2)
    ours, metrics = Uniformity(block=block)(rows)
    literal = _uniformity(rows)
    torch.testing.assert_close(ours, literal, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["uniformity"], literal.detach())
    _assert_gradients_equal(ours, literal, [rows])


def test_the_auxiliary_scalar_is_one_over_the_mean_of_the_batches_before() -> None:
    """u A - log u - 1: above log A, and touching it where u is one over A."""
    uniformity, means = Uniformity(), []
    for seed in range(4):
        rows = _unit(seed)
        value, metrics = uniformity(rows)
        batch_mean = metrics["uniformity"].exp()
        if means:
            weights = torch.tensor([0.95**age for age in range(len(means))][::-1])
            before = (weights * torch.tensor(means)).sum() / weights.sum()
            literal = _uniformity(rows).exp() / float(before) + math.log(float(before)) - 1
            torch.testing.assert_close(value, literal, rtol=1e-6, atol=1e-6)
            mine = torch.autograd.grad(value, rows)[0]
            expected = torch.autograd.grad(literal, rows)[0]
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
            assert value >= metrics["uniformity"] - 1e-12
        means.append(float(batch_mean))


def test_separation_is_the_sum_of_its_literal_terms() -> None:
    features, scale = _modality(10), _scale()
    term = Separation(
        contrast=GammaLoss(virtual_batch=ROWS, one_sided=True),
        orthogonality_weight=0.5,
        contrast_weight=2.0,
        uniformity_weight=3.0,
    )
    ours, metrics = term(features, scale)
    z, own, own_view = features.shared, features.independent, features.independent_view
    assert own is not None
    assert own_view is not None
    ortho = torch.stack([_dot(z[j], own[j]) ** 2 for j in range(ROWS)]).mean()
    literal = 0.5 * ortho + 2 * _contrast_of_views(own, own_view, scale) + 3 * _uniformity(own)
    torch.testing.assert_close(ours, literal, rtol=1e-12, atol=1e-12)
    _assert_gradients_equal(ours, literal, [z, own, own_view, scale])
    torch.testing.assert_close(metrics["orthogonality"], ortho.detach())


@settings(max_examples=30)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_the_bridge_is_its_exact_expansion(t: float, seed: int) -> None:
    """On the sphere: gradients are taken by what is normalised, as it is in training."""
    inputs = [_unit(seed + index) for index in range(3)]
    view, v, text = (F.normalize(each, dim=1) for each in inputs)
    norm = (t**2 + (1 - t) ** 2 + 2 * t * (1 - t) * (v * text).sum(1)).sqrt()
    literal = (2 - 2 * (t * (v * view).sum(1) + (1 - t) * (text * view).sum(1)) / norm).mean()
    ours = bridge(view, v, text, t)
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)
    _assert_gradients_equal(ours, literal, inputs)


def test_consistency_is_the_printed_double_sum() -> None:
    """On a whole batch N = b; with views, and without."""
    image, text = _modality(20), _modality(30)
    va, ta = image.view, text.view
    assert va is not None
    assert ta is not None
    plain, viewed = _gaps(image.shared, text.shared, va, ta)
    both, metrics = consistency(image, text, ROWS)
    torch.testing.assert_close(both, plain + viewed, rtol=1e-10, atol=1e-10)
    _assert_gradients_equal(both, plain + viewed, [image.shared, text.shared, va, ta])
    alone, _ = consistency(Modality(shared=image.shared), Modality(shared=text.shared), ROWS)
    torch.testing.assert_close(alone, plain, rtol=1e-10, atol=1e-10)
    v, t = image.shared.detach(), text.shared.detach()
    off = ~torch.eye(ROWS, dtype=torch.bool)
    cross = (v @ t.T - t @ v.T)[off].square().mean().sqrt()
    torch.testing.assert_close(metrics["cross_modal_asymmetry"], cross)
    inner = (v @ v.T - t @ t.T)[off].square().mean().sqrt()
    torch.testing.assert_close(metrics["in_modal_asymmetry"], inner)


@settings(max_examples=30)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(0, 1000))
def test_squared_differences_of_many_rows_need_no_matrix_of_pairs(
    rows: int, dim: int, seed: int
) -> None:
    a, b, c, d = (_unit(seed + each, rows, dim).detach() for each in range(4))
    literal = (a @ b.T - c @ d.T).square().sum()
    torch.testing.assert_close(squared_differences(a, b, c, d), literal, rtol=1e-9, atol=1e-9)


# ---- gradients -----------------------------------------------------------------------------------

TERMS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "orthogonality": (2, orthogonality),
    "bridge": (3, lambda view, own, other: bridge(view, own, other, 0.25)),
    "consistency": (
        4,
        lambda v, va, t, ta: consistency(
            Modality(shared=v, view=va), Modality(shared=t, view=ta), 50
        )[0],
    ),
    "uniformity": (1, lambda rows: Uniformity()(rows)[0]),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Of uniformity with u = 1 / A, whose gradient is that of log A."""
    count, term = TERMS[name]
    inputs = [_unit(40 + index, 4, 3) for index in range(count)]
    assert torch.autograd.gradcheck(term, inputs, eps=1e-6, atol=1e-6)


# ---- invariances ---------------------------------------------------------------------------------


def _rotation(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_a_rotation_of_both_modalities_changes_no_term(seed: int) -> None:
    turn = _rotation(seed)
    image, text = _modality(seed), _modality(seed + 50)

    def turned(features: Modality) -> Modality:
        assert features.view is not None
        return Modality(shared=features.shared @ turn, view=features.view @ turn)

    before, after = consistency(image, text, 9)[0], consistency(turned(image), turned(text), 9)[0]
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)
    assert image.view is not None
    one = bridge(image.view, image.shared, text.shared, 0.3)
    other = bridge(image.view @ turn, image.shared @ turn, text.shared @ turn, 0.3)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        Uniformity()(image.shared)[0], Uniformity()(image.shared @ turn)[0], rtol=1e-9, atol=1e-9
    )


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_modalities_of_one_geometry_are_consistent(seed: int) -> None:
    """In-modal: whatever rotation lies between them. Cross-modal: equal embeddings."""
    v = _unit(seed).detach()
    turned = v @ _rotation(seed)
    metrics = consistency(Modality(shared=v), Modality(shared=turned), 9)[1]
    assert metrics["in_modal_asymmetry"] == pytest.approx(0, abs=1e-6)
    value, metrics = consistency(Modality(shared=v, view=v), Modality(shared=v, view=v), 9)
    assert value == pytest.approx(0, abs=1e-9)
    assert metrics["cross_modal_asymmetry"] == pytest.approx(0, abs=1e-6)


def test_orthogonal_parts_cost_nothing() -> None:
    shared = _unit(3).detach()
    drawn = _unit(4).detach()
    parts = F.normalize(drawn - (drawn * shared).sum(1, keepdim=True) * shared, dim=1)
    assert orthogonality(shared, parts) == pytest.approx(0, abs=1e-12)
    assert orthogonality(shared, shared) == pytest.approx(1)


@settings(max_examples=20)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_a_view_on_the_bridge_costs_nothing_and_the_ends_are_the_pair(t: float, seed: int) -> None:
    v, text = _unit(seed).detach(), _unit(seed + 1).detach()
    assert bridge(bridge_mean(v, text, t), v, text, t) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(bridge_mean(v, text, 1.0), v)
    torch.testing.assert_close(bridge_mean(v, text, 0.0), text)


def test_opposite_points_have_no_middle_and_stay_finite() -> None:
    v, view = _unit(5), _unit(6)
    value = bridge(view, v, -v.detach(), 0.5)
    value.backward()
    assert value.isfinite()
    assert v.grad is not None
    assert v.grad.isfinite().all()


def test_a_single_pair_is_finite_everywhere() -> None:
    image, text = _modality(60, 1), _modality(70, 1)
    value, _ = consistency(image, text, 8)
    separation = Separation(contrast=GammaLoss(virtual_batch=8, one_sided=True))
    value = value + separation(image, _scale())[0]
    value.backward()
    assert value.isfinite()


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "local"), [(6, 2), (6, 3)])
def test_pairwise_terms_are_unbiased_over_all_shardings(total: int, local: int) -> None:
    """The mean over every way to cut the batch equals the whole's: all pairs meet alike often."""
    image, text = _modality(80, total), _modality(90, total)

    def part(features: Modality, rows: list[int]) -> Modality:
        assert features.view is not None
        return Modality(shared=features.shared[rows], view=features.view[rows])

    shards = [list(rows) for rows in itertools.combinations(range(total), local)]
    values = [consistency(part(image, rows), part(text, rows), total)[0] for rows in shards]
    whole = consistency(image, text, total)[0]
    torch.testing.assert_close(torch.stack(values).mean(), whole, rtol=1e-10, atol=1e-10)
    inputs = [features for side in (image, text) for features in (side.shared, side.view)]
    _assert_gradients_equal(torch.stack(values).mean(), whole, [x for x in inputs if x is not None])

    def held(rows: Tensor) -> Tensor:
        """With u fixed by what came before."""
        return Uniformity(mean=0.3, weight=1.0)(rows)[0]

    values = [held(image.shared[rows]) for rows in shards]
    torch.testing.assert_close(torch.stack(values).mean(), held(image.shared))
    _assert_gradients_equal(torch.stack(values).mean(), held(image.shared), [image.shared])


# ---- metrics and state ---------------------------------------------------------------------------


def test_geometry_says_how_the_modalities_lie() -> None:
    v, t = _unit(7).detach(), _unit(8).detach()
    found = geometry(v, t)
    assert found["modality_gap"] == pytest.approx(float((v.mean(0) - t.mean(0)).norm()))
    assert found["alignment"] == pytest.approx(float((v - t).square().sum(1).mean()))
    assert found["uniformity_image"] == pytest.approx(float(_uniformity(v)))
    assert found["uniformity_text"] == pytest.approx(float(_uniformity(t)))
    off = ~torch.eye(ROWS, dtype=torch.bool)
    assert found["cross_modal_asymmetry"] == pytest.approx(
        float((v @ t.T - t @ v.T)[off].square().mean().sqrt())
    )


def test_independent_features_that_are_all_the_same_have_no_share() -> None:
    shared = _unit(9).detach()
    same = shared[:1].expand_as(shared)
    assert independent_geometry(shared, same)["independent_share"] == pytest.approx(0, abs=1e-12)
    assert independent_geometry(shared, shared)["independent_share"] == pytest.approx(0.5)
    assert independent_geometry(shared, shared)["orthogonality"] == pytest.approx(1)


def test_the_running_mean_outlives_a_restart_and_a_resize() -> None:
    parts = [Uniformity() for _ in range(2)]
    for seed, part in enumerate(parts):
        part(_unit(seed))
    states = [part.state_dict() for part in parts]
    same, fewer = Uniformity(), Uniformity()
    same.load_state_dict(states, 1, 2)
    assert same.state_dict() == states[1]
    fewer.load_state_dict(states, 0, 1)
    means = [state["mean"] / state["weight"] for state in states]
    assert fewer.mean / fewer.weight == pytest.approx(sum(means) / 2)
