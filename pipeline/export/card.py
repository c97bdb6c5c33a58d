"""The model card, README.md, written from what a run knows of itself.

Enters: `Trained`, measures, how the form is used. Leaves: Markdown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.export.trained import Trained

MEASURES = ("/accuracy", "_at_1", "_at_5", "_at_10")  # how the names of those that are shown end
LIBRARIES = {"transformers": "transformers", "openclip": "open_clip", "safetensors": "gammaray"}
PICTURES = (
    "Pictures: training and its evaluation shrink the centre square by areas (enlarge it by "
    "bicubic interpolation) after it is cut, and show `data.background` under transparency; the "
    "processor here resizes by Pillow's bicubic filter before it cuts, and drops transparency. On "
    "a photograph of 512x512 pixels the two differ by 1 to 2 grey levels of 255 in the mean; where "
    "sides do not divide, the cut may be off by half a pixel. Pictures of the model's own size are "
    "the same to the bit."
)
SQUEEZED = (
    "Pictures: training shrinks the whole picture into the square by areas; the processor here "
    "does so by Pillow's bicubic filter: 1 to 2 grey levels of 255 differ in the mean."
)


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
        *(["## Use", f"```python\n{use}```"] if use else []),
        "## Model",
        _table(_model_facts(trained)),
        "## Training",
        _table(_training_facts(trained)),
        "## Measures",
        _measures(trained, measures),
        "## What to know",
        "\n".join(f"- {note}" for note in [SQUEEZED if config.data.squeeze else PICTURES, *notes]),
    ]
    return "\n\n".join(parts) + "\n"


def _head(trained: Trained, form: str, kind: str) -> str:
    lines = [f"library_name: {LIBRARIES[form]}", "tags:", f"- {kind.lower()}", "- image-text"]
    if kind == "CLIP":
        lines.append("pipeline_tag: zero-shot-image-classification")
    return "\n".join(["---", *lines, "---"])


def _model_facts(trained: Trained) -> dict[str, Any]:
    model, tokenizer = trained.config.model, trained.record.tokenizer
    image, text = model.image, model.text
    facts = {
        "parameters": f"{sum(p.numel() for p in trained.module.towers.parameters()):,}",
        "image tower": f"ViT, {image.layers} layers, width {image.width}, {image.heads} heads, "
        f"patches of {image.patch} in {image.size}x{image.size} pixels",
        "text tower": f"{text.layers} layers, width {text.width}, {text.heads} heads, up to "
        f"{text.context_length} tokens of {tokenizer.vocab_size:,}",
        "embedding": f"{model.embed_dim} dimensions",
    }
    if model.kind == "fusion":
        facts["fusion encoder"] = f"{model.fusion.layers} layers"
    if model.pretrained is not None:
        return {**facts, "sizes": f"those of {model.pretrained}, where they differ"}
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
    shown = {name: value for name, value in measures.items() if name.endswith(MEASURES)}
    if not shown:
        return "None are known for this checkpoint."
    rows = {
        name.removeprefix("eval/"): f"{100 * value:.1f} %"
        for name, value in sorted(shown.items())
        if "chance" not in name
    }
    where = trained.config.data.val or "evaluation rows"
    samples = trained.meta["progress"]["samples"]
    return f"On {where}, the last by {samples:,} pairs:\n\n{_table(rows)}"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
