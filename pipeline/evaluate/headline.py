"""The measures of a run that a person looks at first.

Enters: metrics by name. Leaves: rows of a short table. Must not know: who shows it.
"""

import re
from collections.abc import Mapping, Sequence

TASKS = {
    "vqa": "answers to questions",
    "reasoning": "statements, true or false",
    "entailment": "entailment",
    "classification": "classification",
    "assignment": "texts to pictures",
}


def headline(metrics: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Give (label, value, chance) rows of the measures a person looks at first.

    A measure without its chance, as early runs logged a probe, is left out.
    """
    rows = in_words(metrics, (1,))
    return [(label, value, chance) for label, value, chance in rows if chance is not None]


def in_words(
    metrics: Mapping[str, float], ks: Sequence[int]
) -> list[tuple[str, float, float | None]]:
    """Give (label, value, chance) rows of all accuracies, and of the recalls at `ks`."""
    rows: list[tuple[str, float, float | None]] = [
        (label, metrics[f"{kind}/accuracy"], metrics.get(f"{kind}/chance"))
        for kind, label in TASKS.items()
        if f"{kind}/accuracy" in metrics
    ]
    for kind, label in (("zero_shot", "zero-shot accuracy"), ("linear_probe", "linear probe")):
        for name, value in metrics.items():
            if name.startswith(f"{kind}/") and name.endswith("/accuracy"):
                rest = name.removeprefix(f"{kind}/").removesuffix("/accuracy")
                column, *shots = re.split(r"/(?=\d+_shots$)", rest)  # a column may hold a slash
                of = ", ".join([column, *(part.replace("_", " ") for part in shots)])
                rows.append((f"{label}, {of}", value, metrics.get(f"{kind}/{column}/chance")))
    for kind, how in (("retrieval", ""), ("retrieval_reranked", ", re-ranked")):
        for way, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
            for k in ks:
                value = metrics.get(f"{kind}/{way}_recall_at_{k}")
                if value is not None:
                    chance = metrics.get(f"{kind}/{way}_chance_at_{k}")
                    rows.append((f"{label} R@{k} of {metrics['rows']:,.0f}{how}", value, chance))
    return rows
