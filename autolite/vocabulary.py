"""Vocabularies cut to a corpus: which tokens stay, what becomes of the ids, and the tokenizer that makes only those.

A cut tokenizer makes of every text whose tokens all stay the same tokens as before, and others' words into pieces that
stay: single characters (for byte-level vocabularies, bytes) are never dropped. It is rewritten as data, the content of
tokenizer.json, for WordPiece, BPE, Unigram and WordLevel.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Content = dict[str, Any]  # of a tokenizer.json


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a teacher's vocabulary that a student has.

    `kept` are their old ids, in the order of the new ones. `new_ids` has for each old id the one that stands for it:
    its own new one, or if it was dropped that of its longest beginning that stays, else of the unknown token. What was
    tokenised for the teacher is read by the student in this way, token by token; the student's own tokenizer would make
    several pieces of a dropped one.
    """

    kept: tuple[int, ...]
    new_ids: tuple[int, ...]

    @cached_property
    def table(self) -> np.ndarray:
        """`new_ids` as int64 [old tokens]."""
        return np.array(self.new_ids, np.int64)

    def translate(self, ids: np.ndarray) -> np.ndarray:
        """Return old ids as new ones."""
        translated: np.ndarray = self.table[ids]
        return translated

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `kept`."""
        return hashlib.sha256(np.array(self.kept, "<i8").tobytes()).hexdigest()[:16]


def content_of(tokenizer: PreTrainedTokenizerBase | None) -> Content:
    """Return what a tokenizer's tokenizer.json holds.

    Raises:
        PlanError: if there is no tokenizer, or not one that can be rewritten.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(
            "embedding.vocabulary needs a fast tokenizer (a tokenizer.json), which is rewritten to match: set it to 1"
        )
    content: Content = json.loads(backend.to_str())
    model = content["model"]
    affixes = [model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] not in KINDS or (model["type"] == "BPE" and any(affixes)):
        raise PlanError(
            f"embedding.vocabulary cannot cut a tokenizer of the kind {model['type']} (affixes {affixes}), only "
            f"{', '.join(KINDS)}, of which BPE without affixes: set it to 1"
        )
    return content


def choose(content: Content, counts: np.ndarray, count: int | None, least: int, always: Collection[int]) -> list[int]:
    """Return the ids that stay, ascending: what the tokenizer cannot do without, then by frequency.

    Args:
        content: of the tokenizer.
        counts: occurrences of each id of the model's table in the corpus, int64 [tokens].
        count: how many ids stay; None for all that occur `least` times, with what they are made of.
        least: occurrences; looked at if `count` is None.
        always: ids that stay in any case.

    Raises:
        PlanError: if `count` is below what always stays.
    """
    parts = _parts(content)
    kept = {i for i in (*_essential(content), *always) if 0 <= i < len(counts)}
    kept |= {part for i in kept for part in parts(i)}
    order = np.lexsort((np.arange(len(counts)), -counts)).tolist()
    if count is None:
        for i in order:
            if counts[i] < least:
                break
            kept |= {i, *parts(i)}
        return sorted(kept)
    if count < len(kept):
        raise PlanError(
            f"embedding.vocabulary: {count} tokens are fewer than the {len(kept)} that special tokens and single "
            "characters take, without which unknown text could not be read; keep more"
        )
    while len(kept) < count:  # a token whose parts do not fit any more makes room for simpler ones
        for i in order:
            if i not in kept and len(more := {i, *parts(i)} - kept) <= count - len(kept):
                kept |= more
    return sorted(kept)


def vocabulary_of(content: Content, kept: Sequence[int], tokens: int) -> Vocabulary:
    """Return the vocabulary of the ids `kept` of `tokens`."""
    texts, new = _texts(content), {old: i for i, old in enumerate(kept)}
    ids = {text: new[i] for i, text in texts.items() if i in new}
    unknown = new.get(_unknown(content) or 0, 0)
    words = content["model"]["type"] == "WordLevel"  # a beginning says nothing there
    shortest = len(_continuing(content))

    def nearest(old: int) -> int:
        text = texts.get(old, "")
        start = shortest if text.startswith(_continuing(content)) else 0
        lengths = () if words else range(len(text) - 1, start, -1)
        return next((ids[text[:n]] for n in lengths if text[:n] in ids), unknown)

    return Vocabulary(tuple(kept), tuple(new[i] if i in new else nearest(i) for i in range(tokens)))


def trimmed(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """Return the tokenizer that makes only the tokens of `vocabulary`, with their new ids.

    Raises:
        PlanError: if it is not one that can be rewritten.
    """
    from tokenizers import Tokenizer

    content = content_of(tokenizer)
    new = {old: i for i, old in enumerate(vocabulary.kept)}
    model, texts = content["model"], _texts(content)
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in vocabulary.kept if old < len(model["vocab"])]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = {text: new[i] for text, i in model["vocab"].items() if i in new}
    if model["type"] == "BPE":
        stay = {text for i, text in texts.items() if i in new}
        pairs = ((*_pair(merge), merge) for merge in model["merges"])
        model["merges"] = [merge for a, b, merge in pairs if {a, b, a + b} <= stay]
    content["added_tokens"] = [{**t, "id": new[t["id"]]} for t in content["added_tokens"] if t["id"] in new]
    _renumber(content["post_processor"], new)
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    found: Any = copy.deepcopy(tokenizer)
    found._tokenizer = Tokenizer.from_str(json.dumps(content))
    cut: PreTrainedTokenizerBase = found
    return cut


def _texts(content: Content) -> dict[int, str]:
    """The text of each id, added tokens included."""
    vocab = content["model"]["vocab"]
    pairs = enumerate(p for p, _ in vocab) if isinstance(vocab, list) else ((i, text) for text, i in vocab.items())
    return {**dict(pairs), **{token["id"]: token["content"] for token in content["added_tokens"]}}


def _continuing(content: Content) -> str:
    return content["model"].get("continuing_subword_prefix") or ""


def _unknown(content: Content) -> int | None:
    model = content["model"]
    if model["type"] == "Unigram":
        found: int | None = model.get("unk_id")
        return found
    return next((i for i, text in _texts(content).items() if text == model.get("unk_token")), None)


def _essential(content: Content) -> set[int]:
    """Added tokens, the unknown one, and but for whole words every single character and byte."""
    kept = {token["id"] for token in content["added_tokens"]} | {i for i in (_unknown(content),) if i is not None}
    model, prefix = content["model"], _continuing(content)
    if model["type"] == "WordLevel":
        return kept
    if model["type"] == "Unigram":  # characters without a token cost a fixed amount more than the least likely token
        kept.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
    single = (i for i, text in _texts(content).items() if len(text.removeprefix(prefix)) == 1 or _BYTE.fullmatch(text))
    return kept | set(single)


def _parts(content: Content) -> Callable[[int], set[int]]:
    """Return what gives the ids of the tokens that a token is made of on the way to it: by the merges of BPE; a token
    of any other kind stands for itself."""
    model = content["model"]
    if model["type"] != "BPE":
        return lambda i: set()
    texts, ids = _texts(content), model["vocab"]
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}

    def parts(i: int) -> set[int]:
        made = _made(texts.get(i, ""), ranks)
        return {ids[text] for text in made if text in ids}

    return parts


def _made(text: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """The tokens that byte-pair encoding makes of one text on the way (Sennrich, Haddow & Birch 2016): the pair of the
    lowest rank is merged, the first from the left, until none is left."""
    symbols = list(text)
    made = set(symbols)
    while True:
        pairs = [(ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(symbols))]
        rank, at = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return made
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        made.add(symbols[at])


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge is two tokens, in files of older versions in one text."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Give the special tokens of a post-processor their new ids."""
    for part in processor.get("processors", []) if processor else []:
        _renumber(part, new)
    if not processor:
        return
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            text, old = processor[name]
            processor[name] = [text, new[old]]


def special_ids(settings: Mapping[str, Any]) -> Iterable[int]:
    """Yield the ids of special tokens that a transformers configuration names."""
    for name, value in settings.items():
        if name.endswith("_token_id"):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= 0)
