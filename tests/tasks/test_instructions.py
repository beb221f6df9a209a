"""Prompts and responses become examples in which only the responses are learnt and judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import normalizers
from transformers.pipelines.text_generation import Chat

from autolite import contracts
from autolite.errors import DataError
from autolite.tasks.base import DataSpec, Split, TaskData
from autolite.tasks.language_modeling import LanguageModeling
from autolite.tasks.text_classification import TextClassification
from autolite.techniques.distill import Distill
from autolite.testing import PAD, tiny_model
from tests.byte_tokenizer import TEMPLATE, byte_tokenizer
from tests.conftest import write_jsonl

TASK = LanguageModeling()
END = 256
# ChatML, as Qwen has it: the end of a turn, which ends what is generated, is not the end of what the template writes.
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def config() -> Any:
    return tiny_model("llama", "language-modeling", vocab_size=257, max_position_embeddings=128).config


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + {i}? ", "response": f"It is {2 * i}."} for i in range(count)]


def chat(i: int) -> list[dict[str, str]]:
    said = [("system", "Add."), ("user", f"{i} + 1"), ("assistant", f"{i + 1}"), ("user", "+ 1"), ("assistant", "more")]
    return [{"role": role, "content": content} for role, content in said]


def load(folder: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **spec: Any) -> TaskData:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TASK.load(DataSpec(str(file), **spec), tokenizer or byte_tokenizer(), config())


def splits(found: TaskData) -> tuple[Split, ...]:
    return found.train, found.search, found.selection, found.test


def examples(found: TaskData) -> list[tuple[str, str]]:
    """Prompts and responses as texts, of all splits, in order."""
    decode = byte_tokenizer().decode
    return sorted(
        (decode(ids[:given]), decode(ids[given:]))
        for split in splits(found)
        for ids, given in zip(split.input_ids, split.labels, strict=True)
    )


def test_only_the_tokens_of_the_response_have_labels(tmp_path: Path) -> None:
    found = load(tmp_path, pairs(40))
    expected = sorted((row["prompt"], row["response"] + "<end>") for row in pairs(40))
    assert examples(found) == expected
    for batch in TASK.batches(found.train, 5, pad_id=END):
        for ids, labels, i in zip(batch.inputs["input_ids"], batch.labels, batch.indices, strict=True):
            # As transformers' collators have them: a label a token, -100 for those of the prompt and the padding.
            whole, given = found.train.input_ids[i], found.train.labels[i]
            own = np.full(len(ids), -100)
            own[given : len(whole)] = whole[given:]
            assert labels.tolist() == [*own[1:], -100]
            assert whole[-1] == END
    assert found.notes[:2] == ("train: 40 rows, data.jsonl", "prompt 'prompt', response 'response'")


def test_loss_and_score_are_those_of_transformers_with_masked_labels(tmp_path: Path) -> None:
    found = load(tmp_path, pairs(40))
    model = tiny_model("llama", "language-modeling", vocab_size=257, max_position_embeddings=128)
    (batch,) = TASK.batches(found.search.take([0]), 8, pad_id=PAD)
    ids = torch.from_numpy(batch.inputs["input_ids"])
    own = ids.clone()
    own[:, : found.search.labels[0]] = -100
    with torch.no_grad():
        out = model(ids, labels=own)
    assert TASK.loss(out.logits, torch.from_numpy(batch.labels)).item() == pytest.approx(out.loss.item(), rel=1e-6)
    ((nats, tokens),) = TASK.score_examples(out.logits.numpy(), batch.labels)
    assert tokens == len(found.search.input_ids[0]) - found.search.labels[0]
    assert nats / tokens == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("template", [TEMPLATE, CHATML])
def test_prompts_are_the_tokens_that_the_pipeline_of_transformers_gives(tmp_path: Path, template: str) -> None:
    tokenizer = byte_tokenizer(template)
    model = tiny_model("llama", "language-modeling", vocab_size=257, max_position_embeddings=128)
    run: Any = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    given = {p for p, _ in examples(load(tmp_path, pairs(40), tokenizer))}
    assert given == {tokenizer.decode(run.preprocess(row["prompt"])["input_ids"][0]) for row in pairs(40)}
    found = examples(load(tmp_path, [{"messages": chat(i)} for i in range(40)], tokenizer))
    expected = [run.preprocess(Chat(chat(i)[:n]))["input_ids"][0] for i in range(40) for n in (2, 4)]
    assert [p for p, _ in found] == sorted(map(tokenizer.decode, expected))


def test_each_answer_of_a_chat_is_an_example_and_a_row_stays_in_one_split(tmp_path: Path) -> None:
    found = load(tmp_path, [{"messages": chat(i)} for i in range(40)], byte_tokenizer(CHATML))
    begun = "<|system|>Add.<end>\n<|user|>7 + 1<end>\n<|assistant|>"
    more = f"{begun}8<end>\n<|user|>+ 1<end>\n<|assistant|>"
    assert {(begun, "8<end>"), (more, "more<end>")} <= set(examples(found))
    assert len(examples(found)) == 80
    decode = byte_tokenizer().decode
    rows = [{decode(ids).split("+")[0] for ids in split.input_ids} for split in splits(found)]
    assert sum(map(len, rows)) == len(set().union(*rows)) == 40


def test_chats_become_lines_where_there_is_no_template(tmp_path: Path) -> None:
    found = load(tmp_path, [{"messages": chat(i)} for i in range(40)])
    assert ("system: Add.\nuser: 7 + 1\nassistant:", " 8<end>") in examples(found)
    assert "the tokenizer has no chat template: chats become lines such as 'user: ...' and 'assistant:'" in found.notes


def test_a_response_is_tokenised_as_what_follows_the_prompt_or_by_itself(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    # This tokenizer ends every text by [SEP], so that no text goes on from another's tokens.
    rows = [{"prompt": f"w{i} w2", "response": "w3"} for i in range(40)]
    found = load(tmp_path, rows, tokenizer)
    assert {tuple(ids[i] for i in (0, 2, 3, 4, 5)) for ids in found.train.input_ids} == {(2, 6, 3, 7, 3)}
    assert set(found.train.labels) == {4}


@pytest.mark.parametrize(
    ("names", "spec", "note"),
    [
        (("question", "answer"), {}, "prompt 'question', response 'answer'"),
        (("Instruction", "Output"), {}, "prompt 'Instruction', response 'Output'"),
        (("ask", "say"), {"text": "ask", "label": "say"}, "prompt 'ask', response 'say'"),
        (("prompt", "say"), {"label": "say"}, "prompt 'prompt', response 'say'"),
    ],
)
def test_columns_are_found_by_convention_or_by_name(
    tmp_path: Path, names: tuple[str, str], spec: dict[str, str], note: str
) -> None:
    rows = [dict(zip(names, row.values(), strict=True)) for row in pairs(40)]
    found = load(tmp_path, rows, **spec)
    assert note in found.notes
    assert examples(found) == examples(load(tmp_path, pairs(40)))


def test_an_instruction_may_have_an_input(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i}.", "input": "1" if i % 2 else "", "output": "2"} for i in range(40)]
    found = load(tmp_path, rows)
    assert {("Add 3.\n\n1", "2<end>"), ("Add 4.", "2<end>")} <= set(examples(found))
    assert "prompt 'instruction' with 'input', response 'output'" in found.notes


def test_a_named_column_of_texts_holds_documents(tmp_path: Path) -> None:
    found = load(tmp_path, [{**row, "text": str(row) * 2} for row in pairs(40)], text="text", max_length=16)
    assert len(found.train.labels) == 0


def test_csv_and_parquet_are_read_alike(tmp_path: Path) -> None:
    expected = load(tmp_path, pairs(40)).fingerprint
    pd.DataFrame(pairs(40)).to_csv(tmp_path / "data.csv", index=False)
    assert TASK.load(DataSpec(str(tmp_path / "data.csv")), byte_tokenizer(), config()).fingerprint == expected
    chats = [{"messages": chat(i)} for i in range(40)]
    expected = load(tmp_path, chats, byte_tokenizer(CHATML)).fingerprint
    pd.DataFrame(chats).to_parquet(tmp_path / "data.parquet")
    found = TASK.load(DataSpec(str(tmp_path / "data.parquet")), byte_tokenizer(CHATML), config())
    assert found.fingerprint == expected


def test_long_prompts_are_cut_on_the_left_and_keep_the_token_that_begins_texts(tmp_path: Path) -> None:
    found = load(tmp_path, pairs(40), max_length=20)
    whole = {response: prompt for prompt, response in examples(load(tmp_path, pairs(40)))}
    assert all(whole[response].endswith(prompt) for prompt, response in examples(found))
    assert max(len(ids) for split in splits(found) for ids in split.input_ids) == 20
    assert any(note.endswith("prompts are cut on the left: examples have up to 20 tokens") for note in found.notes)
    begins = byte_tokenizer()
    begins.bos_token = "W"  # every prompt's first token
    short = load(tmp_path, pairs(40), begins, max_length=20)
    assert {prompt[0] for prompt, _ in examples(short)} == {"W"}
    assert [len(ids) for ids in short.train.input_ids] == [len(ids) for ids in found.train.input_ids]


def test_the_fingerprint_knows_which_tokens_are_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"] + "It", "response": row["response"][2:]} for row in pairs(40)]
    one, other = load(tmp_path, pairs(40)), load(tmp_path, rows)
    assert one.fingerprint != other.fingerprint


BAD = [
    ({"prompt": "Why?", "response": " "}, {}, "row 3 of data.jsonl: the response is empty"),
    ({"prompt": "", "response": "So."}, {}, "row 3 of data.jsonl: the prompt is empty"),
    ({"prompt": "Why?", "response": 7}, {}, "row 3 of data.jsonl: 'response' is 7, which is not a text"),
    ({"prompt": ["Why?"], "response": "So."}, {}, r"row 3 of data.jsonl: 'prompt' is \['Why\?'\], which is not a text"),
    ({"prompt": "Why?", "response": "So" * 40}, {"max_length": 60}, "row 3 .*: the response has 81 tokens, .* into 60"),
]
BAD_CHATS: list[tuple[Any, str]] = [
    ("Hi", "row 3 of data.jsonl: 'messages' is 'Hi', which is not a list of"),
    ([{"role": "user"}], "row 3 of data.jsonl: 'messages' is .*, which is not a list of"),
    ([{"role": "user", "content": None}], "row 3 of data.jsonl: 'messages' is .* with texts"),
    ([{"role": "user", "content": "Hi"}], "row 3 of data.jsonl: no message of the role 'assistant' answers another"),
    (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}],
        "row 3 of data.jsonl: the response is empty",
    ),
]


@pytest.mark.parametrize(("row", "spec", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    rows = pairs(40)
    rows[2] = row
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows, **spec)


@pytest.mark.parametrize(("messages", "message"), BAD_CHATS)
def test_a_bad_chat_is_named(tmp_path: Path, messages: Any, message: str) -> None:
    rows: list[dict[str, Any]] = [{"messages": chat(i)} for i in range(40)]
    rows[2] = {"messages": messages}
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows)


def test_what_a_template_refuses_is_named(tmp_path: Path) -> None:
    picky = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 1 of data.jsonl: the chat template refuses these messages: no system"):
        load(tmp_path, [{"messages": chat(i)} for i in range(40)], byte_tokenizer(picky))


def test_texts_without_tokens_are_named(tmp_path: Path) -> None:
    deaf = byte_tokenizer()
    deaf.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    rows = pairs(40)
    rows[2] = {"prompt": "?", "response": "So."}
    with pytest.raises(DataError, match=r"row 3 of data.jsonl: '\?' has no tokens"):
        load(tmp_path, rows, deaf)
    rows[2] = {"prompt": "So", "response": "??"}
    with pytest.raises(DataError, match=r"row 3 of data.jsonl: the response '\?\?' has no tokens"):
        load(tmp_path, rows, deaf)


@pytest.mark.parametrize(
    ("row", "spec", "message"),
    [
        ({"prompt": "Why?"}, {}, "no response column in data.jsonl: name it with --label. Columns: 'prompt'"),
        ({"response": "So."}, {}, "no prompt column in data.jsonl: name it with --text. Columns: 'response'"),
        ({"prompt": "Why?", "say": "So."}, {"label": "said"}, "no column 'said' in data.jsonl .*did you mean 'say'"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, row: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [row] * 40, **spec)


def test_all_splits_have_responses_or_none(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(40)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"test.jsonl has documents, but another split prompt 'prompt', response"):
        TASK.load(DataSpec(str(tmp_path)), byte_tokenizer(), config())


def test_a_length_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a length of 129 tokens is outside 4 to 128"):
        load(tmp_path, pairs(40), max_length=129)


def test_a_stride_is_for_texts(
    tmp_path: Path, tiny_data: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="--stride 8 is for texts"):
        load(tmp_path, pairs(40), stride=8)
    with pytest.raises(DataError, match="--stride 8 is for the texts of language models"):
        TextClassification().load(DataSpec(str(tiny_data), stride=8), tokenizer, config())


def test_the_task_keeps_its_promises_with_it(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"w{i} w{i % 7}", "response": f"w{i % 5} w9"} for i in range(60)]
    contracts.check_task(TASK, write_jsonl(tmp_path / "data.jsonl", rows), "llama")


def test_distillation_looks_at_the_responses_alone(tmp_path: Path) -> None:
    context = contracts.tiny_context("llama", TASK)
    ids = [np.append(row, [5, 6]) for row in context.train.input_ids]
    given = np.array([len(row) - 2 for row in ids], dtype=np.int64)
    train = Split("train", ids, None, given)
    context = replace(context, train=train)
    contracts.check_technique(Distill(), context, {"steps": 2, "batch_size": 8})
    (batch,) = TASK.batches(train, 24, PAD)
    logits, labels = torch.randn(*batch.labels.shape, 7), torch.from_numpy(batch.labels)
    assert TASK.soft_targets(logits, labels).shape == (2 * 24, 7)


def test_an_end_inside_a_response_is_text_like_any_other(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}. ", "response": f"one<end>two {i}"} for i in range(40)]
    assert examples(load(tmp_path, rows)) == sorted((row["prompt"], row["response"] + "<end>") for row in rows)
    ended = [{"prompt": f"Say {i}. ", "response": f"two {i}<end>"} for i in range(40)]
    assert examples(load(tmp_path, ended)) == sorted((row["prompt"], row["response"]) for row in ended)


def test_half_of_a_character_is_replaced_in_chats_as_in_texts(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}\ud83d"}, *chat(i)[2:3]]} for i in range(40)]
    assert ("user: 7\ufffd\nassistant:", " 8<end>") in examples(load(tmp_path, rows))


def test_a_column_of_no_chats_that_is_called_messages_is_nothing_special(tmp_path: Path) -> None:
    rows = [{"text": f"A text of some words, number {i}. " * 20, "messages": i} for i in range(60)]
    assert not len(load(tmp_path, rows).train.labels)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
PARTS = [{"type": "text", "text": "hello"}]


@pytest.mark.parametrize(
    ("row", "spec", "message"),
    [
        (
            {"messages": [*chat(1)[:2], CALL]},
            {},
            "row 1 of .*: a message of 'messages' calls a tool, which is not learnt",
        ),
        (
            {"messages": [{"role": "user", "content": PARTS}, *chat(1)[2:3]]},
            {},
            "join the parts of each text",
        ),
        ({"ask": "a", "say": "b"}, {"text": "ask", "label": "ask"}, "'ask' cannot be the prompt .* and its response"),
        ({"prompt": chat(1)[:2], "completion": chat(1)[2:3]}, {}, "put both into one column 'messages'"),
    ],
    ids=["tool", "parts", "twice", "lists"],
)
def test_what_cannot_be_learnt_says_what_to_do(tmp_path: Path, row: Any, spec: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [row] * 20, **spec)
