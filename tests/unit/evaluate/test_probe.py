"""The linear probe: against scikit-learn's logistic regression, and where the answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import RunStop
from pipeline.evaluate.probe import DRAWS, _fit, _split, chance, few_shot, linear_probe


def _clusters(rows: int, noise: float, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Three directions of the sphere, and which of them each row is near."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (rows,), generator=generator)
    centres = torch.eye(6)[:3]
    drawn = centres[which] + noise * torch.randn(rows, 6, generator=generator)
    return F.normalize(drawn, dim=1), [f"class {index}" for index in which.tolist()]


def test_separate_clusters_are_found_and_noise_is_at_chance() -> None:
    x, y = _clusters(120, 0.1, 0)
    others, truth = _clusters(90, 0.1, 1)
    assert linear_probe(x, y, others, truth) == 1.0
    shuffled = [y[row] for row in torch.randperm(120, generator=torch.Generator().manual_seed(2))]
    assert linear_probe(x, shuffled, others, truth) < 0.6


def test_rows_without_a_label_are_left_out_and_an_unknown_label_is_wrong() -> None:
    x, y = _clusters(120, 0.1, 0)
    others, truth = _clusters(90, 0.1, 1)
    y[:40] = [""] * 40
    truth[:30] = ["nobody's"] * 30
    truth[30:40] = [""] * 10
    assert linear_probe(x, y, others, truth) == pytest.approx(50 / 80)


def test_the_penalty_keeps_a_wide_probe_from_learning_noise_by_heart() -> None:
    """200 columns of noise beside the three directions, and 90 rows: unpenalised it fits them."""
    x, y = _clusters(90, 0.3, 0)
    others, truth = _clusters(300, 0.3, 1)
    noise = torch.randn(390, 200, generator=torch.Generator().manual_seed(3))
    wide, wide_others = torch.cat([x, noise[:90]], 1), torch.cat([others, noise[90:]], 1)
    found = linear_probe(wide, y, wide_others, truth)
    weights, offsets = _fit(wide.double(), _numbers(y), 3, 1e-9)
    by_heart = (wide_others.double() @ weights.T + offsets).argmax(1) == _numbers(truth)
    assert found > float(by_heart.double().mean())


def test_the_fit_is_a_stationary_point_of_the_penalised_loss() -> None:
    x, y = _clusters(80, 0.5, 4)
    weights, offsets = _fit(x.double(), _numbers(y), 3, 0.01)
    probabilities = (x.double() @ weights.T + offsets).softmax(1).numpy()
    error = probabilities - np.eye(3)[_numbers(y).numpy()]
    by_weight = error.T @ x.double().numpy() / 80 + 2 * 0.01 * weights.numpy()
    assert np.abs(by_weight).max() < 1e-4
    assert np.abs(error.mean(0)).max() < 1e-4


def _numbers(labels: list[str]) -> torch.Tensor:
    return torch.tensor([int(label[-1]) for label in labels])


def test_too_little_to_fit_or_to_test_is_refused() -> None:
    x, y = _clusters(30, 0.1, 0)
    with pytest.raises(RunStop, match="30 training rows of 1 class"):
        linear_probe(x, ["same"] * 30, x, y)
    with pytest.raises(RunStop, match="0 test rows"):
        linear_probe(x, y, x, [""] * 30)


def test_chance_is_the_commonest_label() -> None:
    assert chance(["a", "a", "b", ""]) == pytest.approx(2 / 3)


def test_few_shots_are_few_rows_of_each_class_and_the_same_for_every_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = _clusters(90, 0.1, 0)
    y[::9] = [""] * 10
    sizes = {name: y.count(name) for name in set(y) - {""}}
    seen: list[list[int]] = []

    def spy(train: torch.Tensor, labels: list[str], *rest: object, seed: int) -> float:
        rows = [int((x == row).all(1).nonzero()) for row in train]
        assert [y[row] for row in rows] == labels
        seen.append(rows)
        return 0.5 + seed / 10

    monkeypatch.setattr("pipeline.evaluate.probe.linear_probe", spy)
    mean, spread = few_shot(x, y, x, y, shots=4)
    assert (mean, spread) == (pytest.approx(0.6), pytest.approx(np.std([0.5, 0.6, 0.7])))
    few_shot(x, y, x, y, shots=4)
    assert seen[:DRAWS] == seen[DRAWS:]
    assert seen[0] != seen[1]
    for rows in seen:
        assert {name: [y[row] for row in rows].count(name) for name in sizes} == dict.fromkeys(
            sizes, 4
        )
    seen.clear()
    few_shot(x, y, x, y, shots=1000)
    assert all(len(rows) == sum(sizes.values()) for rows in seen)


def test_more_shots_say_more() -> None:
    x, y = _clusters(300, 0.6, 0)
    others, truth = _clusters(300, 0.6, 1)
    few, many = (few_shot(x, y, others, truth, shots)[0] for shots in (2, 80))
    assert few < many <= linear_probe(x, y, others, truth) + 0.03


def test_the_penalty_is_chosen_on_a_fifth_of_each_class() -> None:
    """Of five rows one, of twelve two, of two one, of one none."""
    y = torch.tensor([0] * 5 + [1] * 12 + [2] * 2 + [3])
    held, kept = _split(y, seed=0)
    assert y[held].bincount(minlength=4).tolist() == [1, 2, 1, 0]
    assert sorted([*held.tolist(), *kept.tolist()]) == [*range(20)]
    assert _split(y, seed=0)[0].tolist() == held.tolist()
    assert _split(y, seed=1)[0].tolist() != held.tolist()
    held, kept = _split(torch.tensor([0, 1, 2]), seed=0)
    assert sorted(held.tolist()) == sorted(kept.tolist()) == [0, 1, 2]
