import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pipeline.data.text import Tokenizer, load_tokenizer, train_tokenizer
from pipeline.errors import UserError

CAPTIONS = ["a small red circle", "a large blue square", "a green star above a gray cross"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 300)


def _decode(tokenizer: Tokenizer, text: str, length: int) -> str:
    ids = tokenizer.encode([text], length)[0][0]
    return tokenizers.Tokenizer.from_str(tokenizer.json).decode(ids.tolist()).strip()


def _save(folder: Path, words: list[str], **special: str) -> str:
    """Save a word-level tokenizer in the form of transformers; ids follow `words`."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)
    wrapped.save_pretrained(folder)
    return str(folder)


def test_training_is_deterministic_and_depends_on_the_captions(trained: Tokenizer) -> None:
    assert train_tokenizer(CAPTIONS, 300) == trained
    assert train_tokenizer([*CAPTIONS, "zebra zebra zebra"], 300) != trained


def test_vocabulary_is_bounded_and_ids_are_below_it(trained: Tokenizer) -> None:
    assert trained.vocab_size == 300
    assert train_tokenizer(CAPTIONS, 10_000).vocab_size < 10_000
    assert trained.encode(CAPTIONS, 32)[0].max() < 300


def test_start_tokens_end_padding(trained: Tokenizer) -> None:
    ids, cut = trained.encode([CAPTIONS[0], "red"], 12)
    assert ids.shape == (2, 12)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == trained.start).all()
    ends = (ids == trained.end).argmax(axis=1)
    for row, end in enumerate(ends):
        assert not np.isin(ids[row, 1:end], [trained.start, trained.end, trained.pad]).any()
        assert (ids[row, end + 1 :] == trained.pad).all()
    assert ends[1] < ends[0]
    assert not cut.any()


def test_end_token_is_not_2(trained: Tokenizer) -> None:
    """Transformers' CLIP takes eos_token_id 2 for a legacy marker and pools at the largest id."""
    assert (trained.pad, trained.start, trained.end) == (0, 1, 3)
    vocabulary = tokenizers.Tokenizer.from_str(trained.json).get_vocab()
    assert vocabulary["<|endoftext|>"] == trained.end


def test_truncation_keeps_the_end_token_and_is_reported(trained: Tokenizer) -> None:
    whole = trained.encode(["red circle"], 64)[0][0]
    used = int((whole == trained.end).argmax()) + 1
    ids, cut = trained.encode(["red circle"], used)
    assert (ids[0].tolist(), cut.tolist()) == (whole[:used].tolist(), [False])
    ids, cut = trained.encode(["red circle", "red"], used - 1)
    assert ids[0].tolist() == [*whole[: used - 2].tolist(), trained.end]
    assert cut.tolist() == [True, False]


def test_shortest_length_holds_one_token(trained: Tokenizer) -> None:
    ids, cut = trained.encode(["a small red circle"], 3)
    assert (ids[0, 0], ids[0, 2], cut[0]) == (trained.start, trained.end, True)


@pytest.mark.parametrize("text", ["日本語 🎉", "naïve café", "zq~\x00\x7f", "\u200b\ufffd"])
def test_text_never_seen_survives(trained: Tokenizer, text: str) -> None:
    assert _decode(trained, text, 64) == text


def test_case_and_composition_do_not_matter(trained: Tokenizer) -> None:
    ids, _ = trained.encode(["É RED", "é red", "e\u0301 red"], 16)
    assert (ids == ids[0]).all()


def test_empty_text_and_no_text(trained: Tokenizer) -> None:
    ids, cut = trained.encode([""], 4)
    assert ids.tolist() == [[trained.start, trained.end, trained.pad, trained.pad]]
    assert not cut[0]
    assert trained.encode([], 4)[0].shape == (0, 4)


def test_a_pickled_tokenizer_encodes_alike(trained: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(trained))
    assert again == trained
    assert (again.encode(CAPTIONS, 16)[0] == trained.encode(CAPTIONS, 16)[0]).all()


def test_loaded_tokenizer_with_bos_and_eos(tmp_path: Path) -> None:
    words = ["[UNK]", "a", "red", "<s>", "</s>"]
    tokenizer = load_tokenizer(_save(tmp_path, words, bos_token="<s>", eos_token="</s>"))
    assert (tokenizer.start, tokenizer.end, tokenizer.vocab_size) == (3, 4, 5)
    assert tokenizer.pad == tokenizer.end  # it has none of its own
    ids, cut = tokenizer.encode(["a red a a", "zebra"], 5)
    assert ids.tolist() == [[3, 1, 2, 1, 4], [3, 0, 4, 4, 4]]
    assert cut.tolist() == [True, False]


def test_loaded_tokenizer_with_cls_and_sep(tmp_path: Path) -> None:
    words = ["[PAD]", "[CLS]", "[UNK]", "[SEP]", "red"]
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = load_tokenizer(_save(tmp_path, words, **special))
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (1, 3, 0)
    assert tokenizer.encode(["red"], 4)[0].tolist() == [[1, 4, 3, 0]]


def test_truncation_and_padding_stored_in_the_file_are_dropped(tmp_path: Path) -> None:
    path = _save(tmp_path, ["[UNK]", "a", "b", "<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    file = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(2)
    backend.enable_padding(length=9, pad_id=4, pad_token="</s>")
    backend.save(str(file))
    assert load_tokenizer(path).encode(["a b a b"], 7)[0].tolist() == [[3, 1, 2, 1, 2, 4, 4]]


@pytest.mark.parametrize("special", [{}, {"bos_token": "a"}, {"sep_token": "a"}])
def test_a_tokenizer_without_start_or_end_is_refused(tmp_path: Path, special: dict) -> None:
    path = _save(tmp_path, ["[UNK]", "a"], **special)
    with pytest.raises(UserError, match=r"^data.tokenizer: .* has no start and end \(BOS/EOS or"):
        load_tokenizer(path)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    message = "cannot be loaded as a tokenizer .*give `train`, a folder with tokenizer.json"
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / "none" / "there"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_tokenizer(str(tmp_path))
