"""Captions -> token ids of a fixed length, and the tokenizer that makes them.

Enters: captions, or a Hugging Face tokenizer path. Leaves: `Tokenizer`, which travels between
processes as text. Must not know: Ray, torch, the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pipeline.errors import UserError

# The order fixes the ids. The end token must not be 2: transformers' CLIP reads that id as a
# legacy marker and then pools at the largest id instead of at the end token.
SPECIAL_TOKENS = ("<|pad|>", "<|startoftext|>", "<|unknown|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A tokenizer as text (`json`, in the format of the tokenizers library) and its special ids.

    `mask` stands for a word that is to be guessed; None if it has none.
    """

    json: str
    start: int
    end: int
    pad: int
    mask: int | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""
        return max(_backend(self.json).get_vocab(with_added_tokens=True).values()) + 1

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Give ids [len(texts), length] int32 (start, tokens, end, padding) and which were cut."""
        ids = np.full((len(texts), length), self.pad, dtype=np.int32)
        cut = np.zeros(len(texts), dtype=np.bool_)
        encodings = _backend(self.json).encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding in enumerate(encodings):
            tokens = encoding.ids
            cut[row] = len(tokens) > length - 2
            tokens = [self.start, *tokens[: length - 2], self.end]
            ids[row, : len(tokens)] = tokens
        return ids, cut

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones left out."""
        return _backend(self.json).decode(list(ids), skip_special_tokens=True).strip()


@lru_cache(maxsize=4)
def _backend(json: str) -> tokenizers.Tokenizer:
    """Parse once per process: a large vocabulary takes a good part of a second."""
    backend = tokenizers.Tokenizer.from_str(json)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "<|endoftext|>" in a caption is text like any other
    return backend


def train_tokenizer(captions: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a lower-casing byte-level BPE with at most `vocab_size` ids on `captions`."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL_TOKENS[2]))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    # All bytes being in the alphabet, no text holds the unknown token: it is free to be the mask.
    return Tokenizer(json=backend.to_str(), pad=0, start=1, end=3, mask=2)


def load_tokenizer(path: str) -> Tokenizer:
    """Load a Hugging Face tokenizer from a folder or hub id.

    Start and end are its BOS and EOS, or CLS and SEP where it has those instead. Raises `UserError`
    when it cannot be loaded, has no fast form, or lacks these tokens.
    """
    from transformers import AutoTokenizer  # seconds to import; not needed for a trained tokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.tokenizer: {path!r} cannot be loaded as a tokenizer ({error}); give `train`, "
            "a folder with tokenizer.json, or a hub id that is reachable from here"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"data.tokenizer: {path!r} has no fast form (tokenizer.json); convert it")
    start = loaded.bos_token_id if loaded.bos_token_id is not None else loaded.cls_token_id
    end = loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id
    if start is None or end is None:
        raise UserError(f"data.tokenizer: {path!r} has no start and end (BOS/EOS or CLS/SEP) token")
    pad = loaded.pad_token_id if loaded.pad_token_id is not None else end
    mask = loaded.mask_token_id
    return Tokenizer(json=backend.to_str(), start=start, end=end, pad=pad, mask=mask)
