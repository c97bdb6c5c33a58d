"""The model card, README.md, written from what a run knows of itself.

Enters: `Trained`, measures, how the form is used. Leaves: Markdown.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluate.headline import in_words
from pipeline.evaluate.retrieval import KS
from pipeline.export.trained import Trained

LIBRARIES = {"transformers": "transformers", "openclip": "open_clip", "safetensors": "gammaray"}
PICTURES = (
    "Pictures: training and its evaluation cut the centre square first and then shrink it, by the "
    "mean of areas (by less than one and a half bilinearly), or enlarge it by OpenCV's bicubic "
    "filter; the processor here resizes by Pillow's bicubic filter and then cuts, where sides do "
    "not divide up to half a pixel beside. Of 180 figures of textbooks shrunk to 64x64 pixels half "
    "differed by less than 4 grey levels of 255 in the mean, nine in ten by less than 9."
)
SQUEEZED = (
    "Pictures: training and its evaluation shrink the whole picture into the square by the mean of "
    "areas (by less than one and a half bilinearly), or enlarge it by OpenCV's bicubic filter; the "
    "processor here does so by Pillow's bicubic filter. Of 180 figures of textbooks shrunk to "
    "64x64 pixels half differed by less than 2 grey levels of 255 in the mean, nine in ten by less "
    "than 4."
)
KINDS_OF_PICTURES = (
    "Pictures of the model's own size have the same pixels here as in training, but for these. "
    "Turned by EXIF, as cameras do: training turns them upright, the processor does not; "
    "`ImageOps.exif_transpose` does it. Transparent ones: training shows {background} (RGB, "
    "`data.background`) beneath; the processor white, or whatever the file hides there, by its "
    "version. Of 16 bits a channel: training scales them to 8, the processor cuts off what is "
    "above 255."
)
TEXTS = (
    "Texts: training makes one blank of each run of blanks and line breaks and none at the ends"
    "{cleaned}; {here}."
)
CLEANED = ", and mends encoding, HTML entities and markup before (`data.clean_captions`)"
HERE = {
    "openclip": "OpenCLIP's tokenizer does the first too, and mends encoding and HTML entities in "
    "its own way whatever training did (it also makes curly quotes straight)",
    "other": 'the tokenizer here takes a text as it is: give it `" ".join(text.split())`',
}


def write_card(
    trained: Trained,
    measures: Mapping[str, float],
    *,
    form: str,
    dtype: str,
    use: str,
    notes: Sequence[str],
) -> str:
    """The card of `trained` in a form; `use` is Python, `notes` what differs from training."""
    record, config = trained.record, trained.config
    kind = "CLIP" if config.model.kind == "two_tower" else "ALBEF"
    parts = [
        _head(trained, form, kind),
        f"# {record.name}",
        f"An image-text model of {kind}'s architecture, trained by Gammaray and exported from "
        f"checkpoint {trained.checkpoint} in the form `{form}`, weights in {dtype}.",
        "## Use",
        f"```python\n{use}```",
        "## Model",
        _table(_model_facts(trained)),
        "## Training",
        _table(_training_facts(trained)),
        "## Measures",
        _measures(trained, measures),
        "## What to know",
        "\n".join(f"- {note}" for note in [*_inputs(trained, form), *notes]),
    ]
    return "\n\n".join(parts) + "\n"


def _inputs(trained: Trained, form: str) -> list[str]:
    """How pictures and texts are prepared otherwise than in training."""
    data = trained.config.data
    here = HERE.get(form, HERE["other"])
    return [
        SQUEEZED if data.squeeze else PICTURES,
        KINDS_OF_PICTURES.format(background=", ".join(map(str, data.background))),
        TEXTS.format(cleaned=CLEANED if data.clean_captions else "", here=here),
    ]


def _head(trained: Trained, form: str, kind: str) -> str:
    lines = [f"library_name: {LIBRARIES[form]}", "tags:", f"- {kind.lower()}", "- image-text"]
    if kind == "CLIP":
        lines.append("pipeline_tag: zero-shot-image-classification")
    return "\n".join(["---", *lines, "---"])


def _model_facts(trained: Trained) -> dict[str, Any]:
    model, tokenizer = trained.config.model, trained.record.tokenizer
    towers: Any = trained.module.towers  # a pretrained one's sizes are not the config's
    image, text = towers.vision_model.config, towers.text_model.config
    facts = {
        "parameters": f"{sum(p.numel() for p in towers.parameters()):,}",
        "image tower": f"ViT, {image.num_hidden_layers} layers, width {image.hidden_size}, "
        f"{image.num_attention_heads} heads, patches of {image.patch_size} in "
        f"{image.image_size}x{image.image_size} pixels",
        "text tower": f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads, up to {model.text.context_length} tokens of "
        f"{tokenizer.vocab_size:,}",
        "embedding": f"{towers.embed_dim} dimensions",
    }
    if model.kind == "fusion":
        facts["fusion encoder"] = f"{model.fusion.layers} layers"
    return facts


def _training_facts(trained: Trained) -> dict[str, Any]:
    config, meta, record = trained.config, trained.meta, trained.record
    progress, plan = meta["progress"], meta["plan"]
    sources = ", ".join(
        f"{source.path} (weight {source.weight:g})" if len(config.data.train) > 1 else source.path
        for source in config.data.train
    )
    starts = {
        "model.init": config.model.init,
        "model.pretrained": config.model.pretrained,
        "model.image.pretrained": config.model.image.pretrained,
        "model.text.pretrained": config.model.text.pretrained,
    }
    loss = config.loss.kind if config.task is None else f"of task {config.task.kind}"
    is_whole = progress["samples"] >= plan["samples"]
    facts = {
        "data": f"{sources}; {plan['train_rows']:,} rows, digest {record.data_digest[:16]}",
        "started from": ", ".join(f"{key} {value}" for key, value in starts.items() if value)
        or "random weights",
        "seen": f"{progress['samples']:,} pairs in {progress['step']:,} steps"
        + ("" if is_whole else f", of {plan['samples']:,} planned"),
        "loss": f"{loss}, virtual batch {plan['virtual_batch']:,}" if loss == "gamma" else loss,
        "batch": f"{plan['global_batch']:,} pairs on {meta['world_size']} worker(s)",
        "optimiser": f"learning rate {config.optim.lr:g}, weight decay "
        f"{config.optim.weight_decay:g}, schedule {config.optim.schedule}",
        "precision": f"{config.engine.precision}, ZeRO stage {meta['zero_stage']}",
        "seed": config.train.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        "MLflow run": record.mlflow_run_id,
    }
    terms = ", ".join(plan["structure"])
    return {**facts, "structure": terms} if terms else facts


def _measures(trained: Trained, measures: Mapping[str, float]) -> str:
    """By the names that the table at a run's end has."""
    found = {
        name.removeprefix("eval/"): value for name, value in sorted(measures.items(), key=_in_order)
    }
    rows = {
        label: f"{100 * value:.1f} %"
        + ("" if chance is None else f", by chance {100 * chance:.2f} %")
        for label, value, chance in in_words(found, KS)
    }
    if not rows:
        return "None are known for this checkpoint."
    where = trained.config.data.val or "evaluation rows"
    samples = trained.meta["progress"]["samples"]
    return f"On {where}, the last by {samples:,} pairs:\n\n{_table(rows)}"


def _in_order(measure: tuple[str, float]) -> list[str | int]:
    """By name, numbers as such: 5 shots before 20."""
    parts = re.split(r"([0-9]+)", measure[0])
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
