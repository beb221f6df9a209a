"""Generating text: one token after another from the logits that a model gives, and the text that they make.

Tokens are drawn by transformers' own filters of logits; there is no model of theirs here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.errors import InputError
from autolite.measure import Decoder, Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Choose = Callable[[np.ndarray], int]  # logits, float32 [vocab] -> a token

_WINDOW = 5  # tokens before the new ones that they are decoded with: some tokenizers strip the first one's space
_PART = "�"  # what the bytes of a part of a character are decoded to


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits (above 1: more surprising); 0 always takes the most probable token.
        top_k: only so many of the most probable tokens are drawn; 0 for all.
        top_p: only the most probable tokens are drawn that have this probability together (Holtzman et al. 2020).
        seed: equal seeds draw equal tokens; None draws others each time.

    Raises:
        InputError: if one of them is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature={self.temperature} is below 0: give 0 for the most probable token, or more")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} is below 0: give how many tokens to draw from, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is outside 0 to 1: give the share of the probability to draw from")

    def chooser(self) -> Choose:
        """Return what chooses the tokens of one text."""
        if self.temperature == 0:
            return lambda logits: int(logits.argmax())
        import torch
        from transformers.generation import logits_process

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        filters: list[Any] = [logits_process.TemperatureLogitsWarper(float(self.temperature))]
        filters += [logits_process.TopKLogitsWarper(self.top_k)] if self.top_k else []
        filters += [logits_process.TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []

        def choose(logits: np.ndarray) -> int:
            scores = torch.from_numpy(logits)[None]
            for each in filters:
                scores = each(None, scores)
            return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))

        return choose


def tokens(
    runner: Runner, prompt: Sequence[int], count: int, choose: Choose, ends: Collection[int] = ()
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, as they are found.

    Args:
        runner: a language model. If it has a cache it reads each token once, else everything again for each.
        prompt: at least one token.
        count: how many tokens at most.
        choose: the next token, from the logits after the last.
        ends: tokens that end the text, and are not yielded.
    """
    read, new = _reader(runner, len(prompt) + count), list(prompt)
    for _ in range(count):
        token = choose(read(new))
        if token in ends:
            return
        yield token
        new = [token]


def _reader(runner: Runner, limit: int) -> Callable[[Sequence[int]], np.ndarray]:
    """Return what reads further tokens, and gives the logits after the last."""
    if isinstance(runner, Decoder):
        reading = runner.reading(limit)
        return lambda ids: np.asarray(reading.read(np.array([ids], np.int64))[0])
    so_far: list[int] = []

    def read(ids: Sequence[int]) -> np.ndarray:
        so_far.extend(ids)
        whole = np.array([so_far], np.int64)
        return np.asarray(runner.run({"input_ids": whole, "attention_mask": np.ones_like(whole)})["logits"][0, -1])

    return read


def pieces(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the text of new tokens behind a prompt, as soon as they make whole characters.

    Args:
        tokenizer: theirs.
        prompt: its tokens, whose text is not yielded.
        new: further tokens, taken one by one.
        stops: the text ends behind the first of these that it comes to; none of them may be empty.
    """
    longest, tail = max(map(len, stops), default=0), ""
    for piece in _decoded(tokenizer, prompt, new):
        tail += piece
        ends = [tail.find(stop) + len(stop) for stop in stops if stop in tail]
        if ends:
            yield piece[: len(piece) - (len(tail) - min(ends))]
            return
        yield piece
        tail = tail[len(tail) - min(len(tail), max(0, longest - 1)) :]


def _decoded(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Iterable[int]) -> Iterator[str]:
    """Decode few tokens at a time, each with some before it; the first half of a character waits for the second."""
    ids, begin, shown = list(prompt), max(0, len(prompt) - _WINDOW), len(prompt)

    def text(end: int | None = None) -> str:
        return str(tokenizer.decode(ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    for token in new:
        ids.append(token)
        before, after = text(shown), text()
        if len(after) > len(before) and not after.endswith(_PART):
            yield after[len(before) :]
            begin, shown = shown, len(ids)
    if rest := text()[len(text(shown)) :]:
        yield rest
