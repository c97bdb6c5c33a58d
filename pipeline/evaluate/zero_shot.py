"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.data.text import Tokenizer
from pipeline.errors import RunStop

BEST = 5  # classes among which the right one may be


class Confusion(NamedTuple):
    """How often rows of one class were taken for another: `counts` are (class, said, rows).

    By the numbers of `classes`; pairs that never occur are left out.
    """

    classes: list[str]
    counts: list[tuple[int, int, int]]


@torch.no_grad()
def class_embeddings(
    embed_texts: Callable[[Tensor], Tensor],
    classes: Sequence[str],
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    context_length: int,
    device: torch.device,
) -> Float[Tensor, "classes dim"]:
    """Embed each class as the unit-norm mean over its prompts' embeddings (prompt ensemble)."""
    rows = []
    for name in classes:
        tokens, _ = tokenizer.encode(
            [prompt.replace("{}", name) for prompt in prompts], context_length
        )
        text = embed_texts(torch.from_numpy(tokens).to(device))
        rows.append(text.float().mean(dim=0).cpu())
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def zero_shot(
    image: Float[Tensor, "images dim"],
    labels: Sequence[str],
    classes: Sequence[str],
    weights: Float[Tensor, "classes dim"],
) -> Iterator[tuple[str, float]]:
    """Yield top-1 accuracy, its mean over classes, chance, and the rows counted.

    Of more than five classes also top-5 accuracy. Rows without a label ("") are left out. Raises
    `RunStop` for a label that is no class.
    """
    index = {name: position for position, name in enumerate(classes)}
    unknown = sorted({label for label in labels if label and label not in index})
    if unknown:
        raise RunStop(f"labels {unknown[:5]} are not among the classes {list(classes)[:10]}")
    rows = [row for row, label in enumerate(labels) if label]
    if not rows:
        raise RunStop("no row has a label; choose another column or more rows")
    truth = torch.tensor([index[labels[row]] for row in rows])
    scores = image[rows] @ weights.T
    right = scores.argmax(dim=1) == truth
    per_class = [right[truth == k].float().mean() for k in truth.unique()]
    yield "accuracy", right.float().mean().item()
    yield "mean_class_accuracy", torch.stack(per_class).mean().item()
    if len(classes) > BEST:
        among = (scores.topk(BEST).indices == truth[:, None]).any(dim=1)
        yield "top_5_accuracy", among.float().mean().item()
    yield "chance", 1 / len(classes)
    yield "rows", float(len(rows))


def confusion(
    image: Float[Tensor, "images dim"],
    labels: Sequence[str],
    classes: Sequence[str],
    weights: Float[Tensor, "classes dim"],
) -> Confusion:
    """Count what rows of each class are taken for; rows without a label ("") are left out."""
    index = {name: position for position, name in enumerate(classes)}
    said = (image @ weights.T).argmax(dim=1).tolist()
    counts = Counter((index[label], number) for label, number in zip(labels, said, strict=True)
                     if label)  # fmt: skip
    return Confusion(list(classes), [(*pair, rows) for pair, rows in sorted(counts.items())])
