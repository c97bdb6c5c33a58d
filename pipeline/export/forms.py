"""A run's checkpoint in a form that others load: weights, tokenizer, preprocessing, model card.

transformers   a CLIPModel with its processor; of a fusion model a ViT, two BERTs, and heads
openclip       of a two-tower model: a configuration and weights for open_clip
safetensors    all weights by our names in one file, with the run's config

Enters: the folder of a run. Leaves: a folder, whole or not at all.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.config.load import dump
from pipeline.data.storage import explain
from pipeline.errors import UserError
from pipeline.export import clip, fusion
from pipeline.export.card import write_card
from pipeline.export.inputs import save_pictures, save_tokenizer
from pipeline.export.trained import Trained, read_trained
from pipeline.tracking.measures import last_measures
from pipeline.train.store import RunFolder, RunRecord

Form = Literal["transformers", "openclip", "safetensors"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
USE = """\
import yaml
from safetensors.torch import load_file

weights = load_file("model.safetensors")  # by name; the model's begin with "towers."
config = yaml.safe_load(open("config.yaml"))  # the run's: config["model"] says layers and widths
"""
Save = Callable[[Trained, Path, torch.dtype], list[str]]  # gives what the card must say


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written: of which checkpoint, which files with their sizes in bytes.

    `lack`: why the card has no measures, if it has none.
    """

    checkpoint: str
    files: dict[str, int]
    lack: str | None


def export_run(
    folder: RunFolder,
    record: RunRecord,
    out: Path,
    *,
    form: Form,
    dtype: str,
    checkpoint: str | None = None,
) -> Exported:
    """Write a checkpoint (the newest, or the named one) to the folder `out`, which must not be.

    Raises `UserError` when it cannot have this form, or cannot be read.
    """
    save, use = _way(form, record)
    with _unfinished(out) as unfinished:  # before the weights are read: that takes its time
        trained = read_trained(folder, record, checkpoint)
        measures, lack = _read_measures(trained)
        with _writing(out):
            notes = save(trained, unfinished, DTYPES[dtype])
            card = write_card(trained, measures, form=form, dtype=dtype, use=use, notes=notes)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
            for path in unfinished.rglob("*"):  # safetensors keeps others from reading its files
                path.chmod(0o755 if path.is_dir() else 0o644)
            unfinished.chmod(0o755)
            unfinished.rename(out)
    files = {
        path.relative_to(out).as_posix(): path.stat().st_size
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    return Exported(checkpoint=trained.checkpoint, files=files, lack=lack)


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which must not be; it is gone afterwards unless it was renamed."""
    if ":/" in str(out):
        raise UserError(f"OUT: {out} is a URL; give a local folder, and copy it there afterwards")
    with _writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"OUT: {out} is there already; give a new folder, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """What the disk refuses is a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UserError(
            f"OUT: {out} cannot be written ({explain(error)}); give a folder on a disk that has "
            "room, where you may write"
        ) from error


def _way(form: Form, record: RunRecord) -> tuple[Save, str]:
    """How the form is written, and the Python that uses it. Raises `UserError`."""
    if form == "safetensors":
        return _save_plain, USE
    kind = record.config["model"]["kind"]
    task = (record.config.get("task") or {}).get("kind")
    if task is not None:
        raise UserError(
            f"--format: is {form}; the run is fine-tuned for {task}, with a head that no class of "
            "others has: take safetensors, or export the run it began with"
        )
    if kind == "two_tower":
        if form == "transformers":
            return clip.save_transformers, clip.USE_TRANSFORMERS
        return clip.save_open_clip, clip.USE_OPEN_CLIP
    if form == "openclip":
        raise UserError(
            "--format: is openclip; the run's model is fusion, and open_clip has no such model: "
            "take transformers or safetensors"
        )
    if record.config["model"]["image"].get("stem") == "conv":
        raise UserError(
            f"--format: is {form}; the run's model.image.stem is conv, and transformers' ViT reads "
            "patches: take safetensors"
        )
    return fusion.save_transformers, fusion.USE


def _save_plain(trained: Trained, folder: Path, dtype: torch.dtype) -> list[str]:
    save_file(trained.weights(dtype), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.yaml").write_text(dump(trained.config), encoding="utf-8")
    save_tokenizer(trained.record.tokenizer, trained.config.model.text.context_length, folder)
    save_pictures(trained.config, folder)
    return [
        "model.safetensors holds every weight by its name in the run's module. config.yaml is the "
        "run's, with which Gammaray builds that module."
    ]


def _read_measures(trained: Trained) -> tuple[dict[str, float], str | None]:
    """Those of the tracker; where it does not answer none, and why."""
    record = trained.record
    try:
        return last_measures(record.mlflow, "eval/", trained.meta["progress"]["samples"]), None
    except UserError as error:
        return {}, str(error)
