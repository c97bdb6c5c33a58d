"""A run's towers, and how pictures and texts become their inputs.

Enters: a checkpoint of a run. Leaves: `Encoder`, which embeds as `gammaray evaluate` does: the
centre of the picture (the whole with data.squeeze), the caption cut to the context length; shared
features, unit-norm fp32. Must not know: files, Ray.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.clean import clean_captions
from pipeline.data.image import BadImage, decode_eval
from pipeline.data.layout import as_captions
from pipeline.data.text import Tokenizer
from pipeline.errors import UserError
from pipeline.export.trained import read_trained
from pipeline.train.module import FusionPretraining, Pretraining
from pipeline.train.store import MANIFEST, RunFolder, RunRecord, open_run

SPAN = 8  # pictures decoded in one go by a thread
BATCHES = {"cuda": 256, "cpu": 32}  # rows of a forward

Reasons = list[str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Texts as they are embedded: of each row the words, or the reason why it has none.

    `tokens` [good, length] int32 are of the rows that have some, in order; `cut` counts those that
    were too long.
    """

    words: list[str | None]
    reasons: Reasons
    tokens: NDArray[np.int32]
    cut: int


class Encoder:
    """Embeds pictures and texts, on a GPU if this process has one."""

    def __init__(self, config: Config, tokenizer: Tokenizer, module: Any):
        """`module` is what the run has trained, in fp32."""
        self._config, self._tokenizer = config, tokenizer
        self._module: Pretraining | FusionPretraining = module.eval()
        self.dim: int = module.towers.embed_dim

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def batch_size(self) -> int:
        """Rows of a forward."""
        return BATCHES[self.device.type]

    def settle(self) -> None:
        """Move to the device: a GPU in the run's own precision; a CPU in fp32, which all know."""
        is_bf16 = self.device.type == "cuda" and self._config.engine.precision == "bf16"
        self._module.to(self.device, torch.bfloat16 if is_bf16 else torch.float32)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of texts, [len(texts), dim]. Raises `UserError` for one without words."""
        found = self.read_texts(texts)
        for text, reason in zip(texts, found.reasons, strict=True):
            if reason is not None:
                raise UserError(f"texts: {text!r} has no words; leave it out")
        self.settle()
        size = self.batch_size
        parts = [
            self.embed_texts(found.tokens[start : start + size]).cpu().numpy()
            for start in range(0, len(texts), size)
        ]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def read_pictures(
        self, encoded: Sequence[bytes | None], pool: Executor
    ) -> tuple[NDArray[np.uint8], Reasons]:
        """Decode; give [good, size, size, 3], and for each picture why it cannot be used."""
        cv2.setNumThreads(1)  # the pool has the threads
        data, side = self._config.data, self._config.model.image.size
        pixels = np.empty((len(encoded), side, side, 3), np.uint8)
        reasons: Reasons = [None] * len(encoded)

        def read(start: int) -> None:
            for index in range(start, min(start + SPAN, len(encoded))):
                try:
                    pixels[index] = decode_eval(
                        encoded[index], data.background, side, squeeze=data.squeeze
                    )
                except BadImage as error:
                    reasons[index] = error.reason

        for _ in pool.map(read, range(0, len(encoded), SPAN)):
            pass
        if any(reasons):
            pixels = pixels[[reason is None for reason in reasons]]
        return pixels, reasons

    def read_texts(self, cells: Sequence[object]) -> Texts:
        """Of each cell the first text, tokenised."""
        words: list[str | None] = []
        for cell in cells:
            given = as_captions(cell)
            found = clean_captions(given) if self._config.data.clean_captions else given
            words.append(next(iter(found), None))
        length = self._config.model.text.context_length
        tokens, cut = self._tokenizer.encode([text for text in words if text is not None], length)
        reasons: Reasons = ["empty_caption" if text is None else None for text in words]
        return Texts(words=words, reasons=reasons, tokens=tokens, cut=int(cut.sum()))

    @torch.inference_mode()
    def embed_pictures(self, pixels: NDArray[np.uint8]) -> Tensor:
        """[rows, dim] of [rows, size, size, 3], on the device."""
        found = self._module(torch.from_numpy(pixels).to(self.device), None).image
        assert found is not None, "images were given"
        return found

    @torch.inference_mode()
    def embed_texts(self, tokens: NDArray[np.int32]) -> Tensor:
        """[rows, dim] of [rows, length], on the device."""
        found = self._module(None, torch.from_numpy(tokens).to(self.device)).text
        assert found is not None, "texts were given"
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that can be embedded with, not yet read; `weights` is its manifest's SHA-256."""

    folder: RunFolder
    record: RunRecord
    name: str
    weights: str

    @property
    def url(self) -> str:
        """Where its run is."""
        return self.folder.url

    def read(self) -> Encoder:
        """Read it. Raises `UserError` when it is damaged."""
        trained = read_trained(self.folder, self.record, self.name)
        return Encoder(trained.config, self.record.tokenizer, trained.module)


def find_checkpoint(run: str, name: str | None = None) -> Checkpoint:
    """Find a run's newest checkpoint, or the named one. Raises `UserError` when there is none."""
    folder, record = open_run(run)
    task = (record.config.get("task") or {}).get("kind")
    if task is not None:
        raise UserError(
            f"{run}: is fine-tuned for {task}, and no longer tells pairs by their embeddings; give "
            f"the run it began with: {record.config['model'].get('init')}"
        )
    chosen = folder.checkpoint(name)
    manifest = folder.read_text(f"{chosen}/{MANIFEST}") or ""
    weights = hashlib.sha256(manifest.encode()).hexdigest()
    return Checkpoint(folder=folder, record=record, name=chosen, weights=weights)


def read_encoder(run: str, checkpoint: str | None = None) -> Encoder:
    """Give the encoder of the run at the folder or URL `run`. Raises `UserError`."""
    return find_checkpoint(run, checkpoint).read()
