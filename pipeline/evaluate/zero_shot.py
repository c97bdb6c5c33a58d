"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.data.text import Tokenizer
from pipeline.errors import RunStop


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

    Rows without a label ("") are left out. Raises `RunStop` for a label that is no class.
    """
    index = {name: position for position, name in enumerate(classes)}
    unknown = sorted({label for label in labels if label and label not in index})
    if unknown:
        raise RunStop(f"labels {unknown[:5]} are not among the classes {list(classes)[:10]}")
    rows = [row for row, label in enumerate(labels) if label]
    if not rows:
        raise RunStop("no row has a label; choose another column or more rows")
    truth = torch.tensor([index[labels[row]] for row in rows])
    right = (image[rows] @ weights.T).argmax(dim=1) == truth
    per_class = [right[truth == k].float().mean() for k in truth.unique()]
    yield "accuracy", right.float().mean().item()
    yield "mean_class_accuracy", torch.stack(per_class).mean().item()
    yield "chance", 1 / len(classes)
    yield "rows", float(len(rows))
