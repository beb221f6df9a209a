"""Cut tokenizers: what stays is tokenised as before, what went is made of pieces that stay, whatever the text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autolite.errors import PlanError
from autolite.tasks.demo import demo_model_path
from autolite.testing import tiny_tokenizer
from autolite.vocabulary import Vocabulary, choose, content_of, special_ids, trimmed, vocabulary_of

CORPUS = (Path(__file__).parent.parent / "autolite" / "vocabulary.py").read_text(encoding="utf-8").splitlines() * 2
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def _wordpiece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    raw.decoder = decoders.WordPiece()
    return raw


def _bytes() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    raw.train_from_iterator(CORPUS, trainer)
    raw.decoder = decoders.ByteLevel()
    return raw


def _fallback() -> Tokenizer:
    """As Llama's: spaces are a character of their own, and characters without a token are bytes."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    byte = [f"<0x{i:02X}>" for i in range(256)]
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *byte]))
    content = json.loads(raw.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    raw = Tokenizer.from_str(json.dumps(content))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return raw


def _unigram() -> Tokenizer:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    raw.train_from_iterator(CORPUS, trainer)
    raw.decoder = decoders.Metaspace()
    return raw


def _words() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer(["the", "id", "token"]).backend_tokenizer.to_str())


MAKERS = {"WordPiece": _wordpiece, "bytes": _bytes, "fallback": _fallback, "Unigram": _unigram, "WordLevel": _words}


@cache
def whole(kind: str) -> Any:
    raw = MAKERS[kind]()
    if kind == "WordLevel":
        return tiny_tokenizer(["the", "id", "token"])
    ids = [(text, raw.token_to_id(text)) for text in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    raw.add_special_tokens([AddedToken("<extra>", special=True)])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def cut(tokenizer: Any, texts: list[str], count: int | None = None, least: int = 1) -> tuple[Vocabulary, Any]:
    ids = tokenizer(texts)["input_ids"]
    counts = np.bincount(np.concatenate(ids).astype(np.int64), minlength=len(tokenizer))
    content = content_of(tokenizer)
    vocabulary = vocabulary_of(content, choose(content, counts, count, least, ()), len(tokenizer))
    return vocabulary, trimmed(tokenizer, vocabulary)


@cache
def pair(kind: str) -> tuple[Any, Vocabulary, Any]:
    tokenizer = whole(kind)
    return tokenizer, *cut(tokenizer, CORPUS[:40])


kinds = pytest.mark.parametrize("kind", MAKERS)
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(" ".join(CORPUS).split()), max_size=12).map(" ".join))


@kinds
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_text_is_read_and_what_stays_is_read_as_before(kind: str, text: str) -> None:
    tokenizer, vocabulary, small = pair(kind)
    before, after = tokenizer(text)["input_ids"], small(text)["input_ids"]
    assert all(0 <= i < len(vocabulary.kept) for i in after)
    if set(before) <= set(vocabulary.kept):
        assert after == vocabulary.translate(np.array(before, np.int64)).tolist()
    if kind not in ("WordLevel", "Unigram"):
        assert small.decode(after, skip_special_tokens=True) == tokenizer.decode(before, skip_special_tokens=True)
    if kind in ("WordPiece", "bytes", "fallback"):
        # Nothing became unknown that was not
        assert after.count(small.unk_token_id) == before.count(tokenizer.unk_token_id)


@kinds
def test_tokens_are_those_of_the_corpus_and_keep_their_texts(kind: str) -> None:
    tokenizer, vocabulary, small = pair(kind)
    assert len(small) == len(vocabulary.kept) < len(tokenizer)
    assert small.convert_ids_to_tokens(range(len(small))) == tokenizer.convert_ids_to_tokens(list(vocabulary.kept))
    assert {i for ids in tokenizer(CORPUS[:40])["input_ids"] for i in ids} <= set(vocabulary.kept)
    for name in ("unk_token", "pad_token", "eos_token", "bos_token", "cls_token", "sep_token"):
        if getattr(tokenizer, name) is not None:
            assert vocabulary.kept[getattr(small, f"{name}_id")] == getattr(tokenizer, f"{name}_id")


@kinds
def test_a_number_of_tokens_is_met_exactly_and_a_resolved_one_gives_the_same(kind: str) -> None:
    tokenizer, vocabulary, _ = pair(kind)
    again, _ = cut(tokenizer, CORPUS[:40], count=len(vocabulary.kept))
    assert again == vocabulary
    for count in (len(vocabulary.kept) - 1, len(vocabulary.kept) + 7):
        if count < len(tokenizer):
            assert len(cut(tokenizer, CORPUS[:40], count=count)[0].kept) == count
    with pytest.raises(PlanError, match="2 tokens are fewer than"):
        cut(tokenizer, CORPUS[:40], count=2)


@kinds
def test_a_saved_one_is_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    _, _, small = pair(kind)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CORPUS[:60], "naïve 東京 🙂 <extra> </s>", ""]
    assert loaded(texts)["input_ids"] == small(texts)["input_ids"]
    assert loaded.pad_token_id == small.pad_token_id


def test_a_dropped_token_is_read_as_its_longest_beginning_that_stays() -> None:
    tokenizer, vocabulary, small = pair("WordPiece")
    texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for old in set(range(len(tokenizer))) - set(vocabulary.kept):
        beginning = small.convert_ids_to_tokens(vocabulary.new_ids[old])
        assert texts[old].startswith(beginning)
        assert beginning not in ("##", "")
    words, words_kept, _ = pair("WordLevel")
    dropped = next(i for i in range(len(words)) if i not in words_kept.kept)
    assert words_kept.kept[words_kept.new_ids[dropped]] == words.unk_token_id


def test_special_tokens_of_a_configuration_are_found() -> None:
    found = special_ids({"pad_token_id": 1, "eos_token_id": [2, 3], "bos_token_id": None, "vocab_size": 9})
    assert list(found) == [1, 2, 3]


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(PlanError, match="needs a fast tokenizer"):
        content_of(None)


def test_the_demo_models_tokenizer_cut_to_a_few_texts_reads_all_others(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    vocabulary, small = cut(tokenizer, CORPUS[:40], least=2)
    assert len(vocabulary.kept) < len(tokenizer)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    strange = "Ein völlig anderer Satz: 東京 🙂 zzzz"
    assert loaded(strange)["input_ids"] == small(strange)["input_ids"]
    assert max(loaded(strange)["input_ids"]) < len(vocabulary.kept)
    assert loaded.decode(loaded(strange)["input_ids"], skip_special_tokens=True) == tokenizer.decode(
        tokenizer(strange)["input_ids"], skip_special_tokens=True
    )
