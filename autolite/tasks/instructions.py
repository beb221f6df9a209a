"""Instruction data: prompts and the responses that are wanted, as tokens of which only the responses' are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.errors import DataError, InputError
from autolite.tasks import data
from autolite.tasks.base import DataSpec, Split, TaskData
from autolite.tasks.encoding import fingerprint
from autolite.tasks.prompts import Chat, chat_ids, is_message, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = ("prompt", "instruction", "question")
RESPONSE = ("response", "output", "completion", "answer")
CONTEXT = "input"  # of an instruction, where there is one
MESSAGES = "messages"
ASSISTANT = "assistant"  # whose messages are learnt


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold prompts and responses; or, without a `response`, whole chats in `prompt`."""

    prompt: str
    response: str | None = None
    context: str | None = None

    def __str__(self) -> str:
        if self.response is None:
            return f"chats '{self.prompt}'"
        return f"prompt '{self.prompt}'{f' with {self.context!r}' if self.context else ''}, response '{self.response}'"


@dataclass(frozen=True)
class Example:
    """A prompt, the response that is wanted, the row that they are of (from 1), and what keeps rows in one split."""

    prompt: str | Chat
    response: str
    row: int
    key: str


def columns(table: data.Table, spec: DataSpec) -> Columns | None:
    """Return the columns of prompts and responses, by name (--text, --label) or by convention; None for documents.

    Raises:
        DataError: naming what is missing.
    """
    if table.plain:
        return None
    if spec.label is not None:
        response = data.column(table, spec.label, (), "response", "--label")
        return _pairs(table, data.column(table, spec.text, PROMPT, "prompt", "--text"), response)
    if spec.text is not None:
        name = data.column(table, spec.text, (), "text", "--text")
        return Columns(name) if any(isinstance(value, list) for value in table.columns[name]) else None
    chats = data.find(table, MESSAGES)
    if chats is not None and any(isinstance(value, list) for value in table.columns[chats]):
        return Columns(chats)
    found = [next(filter(None, (data.find(table, n) for n in names)), None) for names in (PROMPT, RESPONSE)]
    if not any(found) or (None in found and any(data.find(table, name) for name in data.TEXT)):
        return None
    prompt = found[0] or data.column(table, None, PROMPT, "prompt", "--text")
    return _pairs(table, prompt, found[1] or data.column(table, None, RESPONSE, "response", "--label"))


def _pairs(table: data.Table, prompt: str, response: str) -> Columns:
    if prompt == response:
        raise DataError(f"'{prompt}' cannot be the prompt (--text) and its response (--label): name two columns")
    if any(isinstance(value, list) and value and all(map(is_message, value)) for value in table.columns[prompt]):
        raise DataError(
            f"{table.origin}: '{prompt}' holds lists of messages beside '{response}': put both into one column "
            f"'{MESSAGES}', which ends with the message of the '{ASSISTANT}'"
        )
    context = data.find(table, CONTEXT)
    return Columns(prompt, response, None if context in (prompt, response) else context)


def load(
    tables: Mapping[str, data.Table],
    found: Mapping[str, Columns | None],
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> TaskData:
    """Return the splits of instruction data: an example for each response, of at most `limit` tokens.

    Of an example's tokens, the first `Split.labels` are the prompt's. They are those that
    `transformers.pipeline("text-generation")` makes of the prompt; of one that is too long, the last ones (and the
    token that begins every text). The response ends with the end-of-sequence token, or as the chat template ends it.

    Raises:
        DataError: naming the row that is wrong, or whose response does not fit, or a split without responses.
    """
    if spec.stride is not None:
        raise DataError(
            f"--stride {spec.stride} is for texts: a response is scored behind its whole prompt; leave it out"
        )
    named = {split: names for split, names in found.items() if names is not None}
    if others := [tables[split].origin for split in found if split not in named]:
        raise DataError(
            f"{others[0]} has documents, but another split {next(iter(named.values()))}: name the columns of all with "
            "--text and --label"
        )
    notes = [f"{split}: {len(table)} rows, {table.origin}" for split, table in tables.items()]
    notes += dict.fromkeys(map(str, named.values()))
    if tokenizer.chat_template is None and any(each.response is None for each in named.values()):
        notes.append(f"the tokenizer has no chat template: chats become lines such as 'user: ...' and '{ASSISTANT}:'")
    examples = {split: list(_examples(table, named[split])) for split, table in tables.items()}
    where, cuts = data.assign({split: [e.key for e in each] for split, each in examples.items()}, spec.seed)
    encoded, cut = {}, 0
    for split, each in examples.items():
        rows, origin = [], tables[split].origin
        for example, (prompt, response) in zip(each, _encoded(each, tokenizer, origin), strict=True):
            fitted = _fitted(prompt, response, limit, tokenizer.bos_token_id)
            if fitted is None:
                raise DataError(
                    f"row {example.row} of {origin}: the response has {len(response)} tokens, which do not fit into "
                    f"{limit} with one of its prompt: give a larger --max-length, or leave the row out"
                )
            cut += len(fitted) < len(prompt)
            rows.append((np.array([*fitted, *response], dtype=np.int64), len(fitted)))
        labels = np.array([given for _, given in rows], dtype=np.int64)
        encoded[split] = Split(split, [ids for ids, _ in rows], None, labels)
    if cut:
        notes.append(f"{cut} prompts are cut on the left: examples have up to {limit} tokens")
    train, search, selection, test = (
        replace(encoded[where[name][0]].take(where[name][1]), name=name)
        for name in ("train", "search", "selection", "test")
    )
    digest = fingerprint((train, search, selection, test))
    return TaskData(train, search, selection, test, digest, notes=(*notes, *cuts))


def _examples(table: data.Table, names: Columns) -> Iterator[Example]:
    if names.response is None:
        for row, value in enumerate(table.columns[names.prompt], 1):
            yield from _turns(_chat(value, row, table.origin, names.prompt), row, table.origin)
        return
    texts = [data.texts(table, names.prompt), data.texts(table, names.response)]
    texts.append(data.texts(table, names.context) if names.context else [""] * len(table))
    for row, (prompt, response, context) in enumerate(zip(*texts, strict=True), 1):
        for what, text in (("prompt", prompt), ("response", response)):
            if not text.strip():
                raise DataError(f"row {row} of {table.origin}: the {what} is empty: fill it in, or leave the row out")
        whole = f"{prompt}\n\n{context}" if context.strip() else prompt
        yield Example(whole, response, row, whole)


def _chat(value: Any, row: int, origin: str, column: str) -> Chat:
    """Return a chat, without what templates may not know."""
    for each in value if isinstance(value, list) else ():
        if isinstance(each, Mapping) and each.get("tool_calls"):
            raise DataError(
                f"row {row} of {origin}: a message of '{column}' calls a tool, which is not learnt: leave it out"
            )
    if not isinstance(value, list) or not all(
        is_message(each) and isinstance(each["role"], str) and isinstance(each["content"], str) for each in value
    ):
        raise DataError(
            f"row {row} of {origin}: '{column}' is {data.short(value)}, which is not a list of "
            '{"role": ..., "content": ...} with texts: join the parts of each text, or leave the row out'
        )
    return [{"role": each["role"], "content": data.whole(each["content"])} for each in value]


def _turns(chat: Chat, row: int, origin: str) -> Iterator[Example]:
    """Yield an example for each message of the assistant's, whose prompt is all that was said before."""
    places = [i for i, message in enumerate(chat) if i and message["role"] == ASSISTANT]
    if not places:
        raise DataError(f"row {row} of {origin}: no message of the role '{ASSISTANT}' answers another; leave it out")
    for i in places:
        response = chat[i]["content"]
        if not response.strip():
            raise DataError(f"row {row} of {origin}: the response is empty: fill it in, or leave the row out")
        yield Example(chat[:i], response, row, json.dumps(chat[: places[0]], sort_keys=True))


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, origin: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of each prompt and response.

    Those of the response are what follows the prompt's in the tokens of both together; where the prompt's are no
    beginning of these, since a token would reach over the border, the response is tokenised by itself.
    """
    end = tokenizer.eos_token_id
    chats = tokenizer.chat_template is not None and not isinstance(examples[0].prompt, str)
    both = _chats(examples, tokenizer, origin) if chats else _texts(examples, tokenizer)
    for example, (given, whole, response) in zip(examples, both, strict=True):
        if not given:
            raise DataError(f"row {example.row} of {origin}: {example.prompt!r:.80} has no tokens; leave it out")
        follows = whole[: len(given)] == given
        if follows:
            wanted = whole[len(given) :]
        else:
            wanted = list(tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"])
        if chats and end in wanted:  # a template may write more, which nobody generates
            wanted = wanted[: len(wanted) - wanted[::-1].index(end)]
        elif wanted and end not in (None, wanted[-1]) and not (chats and follows):  # a template may have its own end
            wanted = [*wanted, end]
        if not wanted:
            raise DataError(f"row {example.row} of {origin}: the response {response!r:.80} has no tokens; leave it out")
        yield given, wanted


# Tokens of a prompt, and of it with the response; and the response.
_Both = tuple[list[int], list[int], str]


def _texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Both]:
    """Tokenise all texts at once, as `prompt_ids` does each: that is many times faster."""
    texts = [
        (e.prompt, e.response) if isinstance(e.prompt, str) else (plain(e.prompt), f" {e.response}") for e in examples
    ]
    given, whole = (
        tokenizer(each, verbose=False)["input_ids"] for each in ([p for p, _ in texts], [p + r for p, r in texts])
    )
    yield from zip(given, whole, (response for _, response in texts), strict=True)


def _chats(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, origin: str) -> Iterator[_Both]:
    for example in examples:
        assert not isinstance(example.prompt, str)
        answered = [*example.prompt, {"role": ASSISTANT, "content": example.response}]
        try:
            given = prompt_ids(tokenizer, example.prompt)
            whole = chat_ids(tokenizer, answered, add_generation_prompt=False)
        except InputError as error:
            raise DataError(f"row {example.row} of {origin}: {error}") from error
        yield given, whole, example.response


def plain(chat: Chat) -> str:
    """Return a chat as a text that the assistant's answer, behind a space, goes on."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in chat) + f"{ASSISTANT}:"


def _fitted(prompt: Sequence[int], response: Sequence[int], limit: int, begin: int | None) -> Sequence[int] | None:
    """Return as much of a prompt as there is room for beside the response; None if that is not a token."""
    room = limit - len(response)
    if room < 1:
        return None
    if len(prompt) <= room:
        return prompt
    kept = 1 if prompt[0] == begin else 0
    return [*prompt[:kept], *prompt[len(prompt) - room + kept :]]
