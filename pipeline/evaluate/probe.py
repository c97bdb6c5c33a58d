"""Linear probe: how much of a label a linear classifier finds in frozen embeddings.

Fitted to all labelled rows, or to few of each class.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import RunStop

PENALTIES = tuple(10.0**power for power in range(-6, 2))  # of the squared weights
HELD_BACK = 5  # one row in so many of the training rows chooses the penalty
DRAWS = 3  # of the rows of a few-shot probe
SHOTS = (5, 20, 50)  # rows a class of the usual few-shot probes
MOST_STEPS = 200  # of L-BFGS


def linear_probe(
    train: Float[Tensor, "rows dim"],
    train_labels: Sequence[str],
    test: Float[Tensor, "others dim"],
    test_labels: Sequence[str],
    seed: int = 0,
) -> float:
    """Give the test accuracy of logistic regression on `train`, rows without a label left out.

    The L2 penalty is chosen on a fifth of each class's training rows, drawn by `seed`, and the
    classifier then fitted to all, as ELEVATER does; features are scaled to unit variance by
    training's.
    A label that training has not is always wrong. O(rows dim classes) a step. Raises `RunStop` when
    there is too little to fit or to test.
    """
    train_rows = [row for row, label in enumerate(train_labels) if label]
    test_rows = [row for row, label in enumerate(test_labels) if label]
    classes = sorted({train_labels[row] for row in train_rows})
    if len(classes) < 2 or len(train_rows) < HELD_BACK or not test_rows:
        raise RunStop(
            f"linear probe: {len(train_rows)} training rows of {len(classes)} class(es) and "
            f"{len(test_rows)} test rows have a label; two classes, {HELD_BACK} training rows and "
            "one test row are the least: choose another column or more rows"
        )
    number = {name: index for index, name in enumerate(classes)}
    x, others = train[train_rows].double(), test[test_rows].double()
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-8)
    x, others = (x - mean) / spread, (others - mean) / spread
    y = torch.tensor([number[train_labels[row]] for row in train_rows])
    truth = torch.tensor([number.get(test_labels[row], -1) for row in test_rows])
    held, kept = _split(y, seed)
    best = max(
        PENALTIES,
        key=lambda penalty: _accuracy(
            _fit(x[kept], y[kept], len(classes), penalty), x[held], y[held]
        ),
    )
    return _accuracy(_fit(x, y, len(classes), best), others, truth)


def _split(y: Int[Tensor, " rows"], seed: int) -> tuple[Int[Tensor, " held"], Int[Tensor, " kept"]]:
    """Rows to choose by, a fifth of each class but one at least, and the others, in random order.

    A class of one row has none to spare; where all are so, the rows to choose by are all rows.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    is_held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        mine = order[y[order] == label]
        spare = max(1, len(mine) // HELD_BACK) if len(mine) > 1 else 0
        is_held[mine[:spare]] = True
    held, kept = order[is_held[order]], order[~is_held[order]]
    return (held if len(held) else kept), kept


def few_shot(
    train: Float[Tensor, "rows dim"],
    train_labels: Sequence[str],
    test: Float[Tensor, "others dim"],
    test_labels: Sequence[str],
    shots: int,
) -> tuple[float, float]:
    """Give mean and standard deviation of the probe's accuracy over `DRAWS` draws of its rows.

    Each draw has `shots` rows of every class, or all where a class has fewer; draw k is the same
    for every model, so that models are compared on the same rows. Raises as `linear_probe`.
    """
    accuracies = []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(train_labels))
        taken: Counter[str] = Counter()
        rows: list[int] = []
        for row in map(int, order):
            label = train_labels[row]
            if label and taken[label] < shots:
                taken[label] += 1
                rows.append(row)
        chosen = [train_labels[row] for row in rows]
        accuracies.append(linear_probe(train[rows], chosen, test, test_labels, seed=draw))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def chance(labels: Sequence[str]) -> float:
    """The accuracy of always naming the commonest label."""
    counts = Counter(label for label in labels if label)
    return max(counts.values(), default=0) / max(sum(counts.values()), 1)


def _fit(x: Tensor, y: Int[Tensor, " rows"], classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [classes, dim] and offsets [classes] of multinomial logistic regression."""
    weights = x.new_zeros(classes, x.shape[1]).requires_grad_()
    offsets = x.new_zeros(classes).requires_grad_()
    solver = torch.optim.LBFGS(
        [weights, offsets], max_iter=MOST_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        solver.zero_grad()
        value = F.cross_entropy(x @ weights.T + offsets, y) + penalty * weights.square().sum()
        value.backward()
        return value.item()

    solver.step(loss)
    return weights.detach(), offsets.detach()


def _accuracy(fitted: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    weights, offsets = fitted
    return float(((x @ weights.T + offsets).argmax(1) == y).double().mean())
