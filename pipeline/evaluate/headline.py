"""The measures of a run that a person looks at first.

Enters: metrics by name. Leaves: rows of a short table. Must not know: who shows it.
"""

import re
from collections.abc import Mapping

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
    rows = [
        (label, metrics[f"{kind}/accuracy"], metrics[f"{kind}/chance"])
        for kind, label in TASKS.items()
        if f"{kind}/accuracy" in metrics
    ]
    for kind, label in (("zero_shot", "zero-shot accuracy"), ("linear_probe", "linear probe")):
        for name, value in metrics.items():
            if name.startswith(f"{kind}/") and name.endswith("/accuracy"):
                rest = name.removeprefix(f"{kind}/").removesuffix("/accuracy")
                column, *shots = re.split(r"/(?=\d+_shots$)", rest)  # a column may hold a slash
                of = ", ".join([column, *(part.replace("_", " ") for part in shots)])
                if (chance := metrics.get(f"{kind}/{column}/chance")) is not None:
                    rows.append((f"{label}, {of}", value, chance))
    for kind, how in (("retrieval", ""), ("retrieval_reranked", ", re-ranked")):
        for way, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
            value = metrics.get(f"{kind}/{way}_recall_at_1")
            if value is not None:
                chance = metrics[f"{kind}/{way}_chance_at_1"]
                rows.append((f"{label} R@1 of {metrics['rows']:,.0f}{how}", value, chance))
    return rows
