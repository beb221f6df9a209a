"""Folders of language models generate what transformers does, with a cache and without, and say what they cannot."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import GenerationConfig, LogitsProcessorList

import autolite
from autolite.architecture import shape_of
from autolite.cli import main
from autolite.errors import InputError, ModelError
from autolite.generation import Sampling, pieces, tokens
from autolite.inference import LanguageModelingPipeline
from autolite.measure import Decoder
from autolite.runtime.emit import emit
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.testing import tiny_model
from tests.byte_tokenizer import TEMPLATE, byte_tokenizer

_WEIGHTS = os.environ.get("AUTOLITE_WEIGHTS", Path(__file__).parents[2] / "shared" / "weights")
STORIES = Path(_WEIGHTS) / "stories260K"


def write(folder: Path, family: str = "llama", cache: bool = True, template: str | None = None) -> Path:
    tokenizer = byte_tokenizer(template)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = tiny_model(family, "language-modeling", vocab_size=257, max_position_embeddings=128, **ends)
    return candidate(folder, model, tokenizer, cache)


def candidate(folder: Path, model: Any, tokenizer: Any, cache: bool = True) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    emit(Student(model, shape_of(model)), folder, cache=cache)
    manifest = {"schema": 1, "task": "language-modeling", "plan": {"seed": 0, "steps": []}}
    (folder / "autolite.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate of a model that was trained on stories."""
    if not STORIES.is_dir():
        pytest.skip(f"no model at {STORIES}: set AUTOLITE_WEIGHTS to the folder that has stories260K")
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    return candidate(tmp_path_factory.mktemp("stories"), model, tokenizer)


def expected(folder: Path, text: Any, **how: Any) -> Any:
    """What transformers' pipeline answers; it samples unless it is told not to."""
    return transformers.pipeline("text-generation", model=str(folder))(text, **{"do_sample": False, **how})


# What is generated


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_the_answer_is_that_of_the_transformers_pipeline(family: str, cache: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, family, cache)
    run = autolite.pipeline("text-generation", folder)
    assert isinstance(run.runner, Decoder) == cache
    for more in ({}, {"return_full_text": False}):
        assert run("Once", max_new_tokens=40, **more) == expected(folder, "Once", max_new_tokens=40, **more)
    assert run(["Once", "Ab"], max_new_tokens=5) == [run("Once", max_new_tokens=5), run("Ab", max_new_tokens=5)]


def test_a_trained_model_tells_the_story_that_torch_tells(stories: Path) -> None:
    run = autolite.pipeline(stories)
    text = "Once upon a time"
    found = run(text, max_new_tokens=200)
    assert found == expected(stories, text, max_new_tokens=200)
    assert found[0]["generated_text"].startswith("Once upon a time, there was a little girl named Lily.")
    assert "".join(run.stream(text, max_new_tokens=200)) == found[0]["generated_text"][len(text) :]


def test_other_architectures_generate_by_whole_calls(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": 257, "max_position_embeddings": 128, "ffn_dim": 64, "word_embed_proj_dim": 32}
    ends = {"eos_token_id": 256, "pad_token_id": 256, "bos_token_id": None}
    folder = candidate(tmp_path, tiny_model("opt", "language-modeling", **sizes, **ends), tokenizer)
    assert autolite.pipeline(folder)("Once", max_new_tokens=10) == expected(folder, "Once", max_new_tokens=10)


def test_a_text_ends_where_the_model_says(folder: Path, tmp_path: Path) -> None:
    runner = OnnxRuntime().load(folder / "model.onnx")
    greedy = Sampling(temperature=0).chooser()
    whole = list(tokens(runner, [50, 51], 30, greedy))
    assert len(whole) == 30
    ends = {whole[9], 999}
    assert list(tokens(runner, [50, 51], 30, greedy, ends)) == whole[: whole.index(whole[9])]
    for settings in ({"eos_token_id": whole[9]}, {"eos_token_id": [999, whole[9]]}):
        GenerationConfig(**settings).save_pretrained(folder)
        assert autolite.pipeline(folder).ends == {
            whole[9],
            *([999] if isinstance(settings["eos_token_id"], list) else []),
        }
    (folder / "generation_config.json").unlink()
    assert autolite.pipeline(folder).ends == {256}


def test_chats_are_written_out_by_the_template(chatty: Path) -> None:
    run = autolite.pipeline(chatty)
    chat = [{"role": "user", "content": "Hi"}]
    written = "user: Hi\nassistant:"
    (plain,) = run(written, max_new_tokens=12, return_full_text=False)
    (found,) = run(chat, max_new_tokens=12)
    assert found["generated_text"] == [*chat, {"role": "assistant", "content": plain["generated_text"]}]
    assert run([chat, chat], max_new_tokens=12) == [[found], [found]]
    assert run(chat, max_new_tokens=12, return_full_text=False) == [plain]


def test_the_most_probable_next_tokens(folder: Path) -> None:
    run = autolite.pipeline(folder)
    found = run.next_tokens("Once")
    assert [token["token"] for token in found] == np.argsort(-run.logits("Once")[-1], kind="stable")[:5].tolist()


# Sampling


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 6, "top_p": 0.8}],
    ids=str,
)
def test_tokens_are_drawn_as_transformers_would(settings: dict[str, Any]) -> None:
    """Its filters leave the same tokens, and each is drawn as often as its probability says."""
    from transformers.generation import logits_process as lp

    logits = np.random.default_rng(0).normal(size=20).astype(np.float32) * 2
    made = {"temperature": lp.TemperatureLogitsWarper, "top_k": lp.TopKLogitsWarper, "top_p": lp.TopPLogitsWarper}
    scores = torch.from_numpy(logits)[None]
    filters = LogitsProcessorList([made[name](value) for name, value in settings.items()])
    wanted = filters(torch.zeros(1, 1, dtype=torch.int64), scores).softmax(-1)[0].numpy()
    choose = Sampling(**settings, seed=0).chooser()
    count = 4000
    drawn = Counter(choose(logits) for _ in range(count))
    shares = np.array([drawn[i] / count for i in range(20)])
    assert set(drawn) <= set(np.flatnonzero(wanted))
    assert np.abs(shares - wanted).max() < 5 * np.sqrt(0.25 / count)


def test_equal_seeds_draw_equal_texts(folder: Path) -> None:
    run = autolite.pipeline(folder)
    how = {"max_new_tokens": 20, "temperature": 1.2, "top_k": 50}
    first, again, other = (run("Once", seed=seed, **how) for seed in (1, 1, 2))
    assert first == again != other
    assert len({run("Once", **how)[0]["generated_text"] for _ in range(4)}) > 1
    greedy = run("Once", max_new_tokens=20)
    assert run("Once", max_new_tokens=20, temperature=0, seed=3) == greedy == run("Once", do_sample=False, **how)
    assert run("Once", max_new_tokens=20, do_sample=True) != greedy


# Text


def test_a_text_ends_behind_the_first_stop_string(stories: Path) -> None:
    run = autolite.pipeline(stories)

    def told(*stops: str) -> str:
        found = list(run.stream("Once upon a time", max_new_tokens=60, stop_strings=stops))
        whole: str = run("Once upon a time", max_new_tokens=60, stop_strings=list(stops), return_full_text=False)[0][
            "generated_text"
        ]
        assert "".join(found) == whole
        return whole

    assert told("nowhere", "little girl", "Lily") == ", there was a little girl"  # of four tokens
    assert told("a li") == ", there was a li"  # a token goes on
    assert told("e w", "was") == ", there w"
    assert run("Once", max_new_tokens=9, stop_strings="c") == run("Once", max_new_tokens=9, stop_strings=["c"])


def test_pieces_are_whole_characters_and_join_to_the_text() -> None:
    tokenizer = byte_tokenizer()
    text = "aé漢🎉 b"
    ids = tokenizer("Say: " + text)["input_ids"]
    prompt = tokenizer("Say: ")["input_ids"]
    found = list(pieces(tokenizer, prompt, ids[len(prompt) :]))
    assert found == ["a", "é", "漢", "🎉", " ", "b"]
    half = list(pieces(tokenizer, prompt, ids[len(prompt) : len(prompt) + 2]))  # the first of two bytes of é
    assert half == ["a", "�"]
    assert "".join(pieces(tokenizer, prompt, ids[len(prompt) :], stops=["🎉"])) == "aé漢🎉"


def test_spaces_between_words_are_kept(stories: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("Tim and Lily went to the park. Émile, too!")["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for start in range(1, len(ids)):
        before = tokenizer.decode(ids[:start], skip_special_tokens=True)
        if not before.endswith("�"):  # no prompt ends within a character
            assert before + "".join(pieces(tokenizer, ids[:start], ids[start:])) == whole


def test_pieces_come_as_they_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = autolite.pipeline(folder)
    reads: list[int] = []
    reading = type(run.runner).reading

    def counted(self: Any, limit: int) -> Any:
        made = reading(self, limit)
        read = made.read
        made.read = lambda ids: reads.append(ids.shape[1]) or read(ids)
        return made

    monkeypatch.setattr(type(run.runner), "reading", counted)
    stream = run.stream("Once", max_new_tokens=30)
    assert reads == []
    next(stream)
    assert reads[0] == 4
    assert set(reads[1:]) <= {1}
    assert len(reads) < 12


# What is refused


@pytest.mark.parametrize(
    ("inputs", "how", "message"),
    [
        ("", {}, "'' has no tokens; give a text that is not empty"),
        ("a" * 128, {}, "the text has 128 tokens, but the model takes 128 at most.*give a shorter one"),
        ("a" * 100, {"max_new_tokens": 29}, r"100 tokens and max_new_tokens=29 .* 128 at most.* max_new_tokens=28"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0 is too few; give 1 at least"),
        ("a", {"max_new_tokens": -5}, "max_new_tokens=-5 is too few"),
        ("a", {"temperature": -0.5}, r"temperature=-0.5 is below 0"),
        ("a", {"temperature": float("nan")}, r"temperature=nan is below 0"),
        ("a", {"top_k": -1}, "top_k=-1 is below 0"),
        ("a", {"top_p": 0}, "top_p=0 is outside 0 to 1"),
        ("a", {"top_p": 1.5}, "top_p=1.5 is outside 0 to 1"),
        ("a", {"stop_strings": ["x", ""]}, "an empty stop string"),
        (3, {}, "give a text, or a chat as a list of"),
        ([3], {}, "give a text, or a chat as a list of"),
        ([{"role": "user"}], {}, "give a text, or a chat as a list of"),
        ([{"role": "user", "content": "Hi"}], {}, "the tokenizer has no chat template.*give a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused(inputs: Any, how: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        autolite.pipeline(folder)(inputs, **how)


def test_a_text_that_leaves_room_is_continued_to_the_end_of_it(folder: Path) -> None:
    run = autolite.pipeline(folder)
    assert len(run.tokenizer(run("a" * 120)[0]["generated_text"])["input_ids"]) >= 121
    assert run("a" * 120) == run("a" * 120, max_new_tokens=8)


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    folder = write(tmp_path, template="{{ raise_exception('only users may speak') }}")
    with pytest.raises(InputError, match="the chat template refuses these messages: only users may speak"):
        autolite.pipeline(folder)([{"role": "system", "content": "Hi"}])


# The command


def chat(*words: object, said: str | None = None) -> Any:
    return CliRunner().invoke(main, ["chat", *map(str, words)], input=said)


def test_the_command_answers_one_prompt(folder: Path) -> None:
    done = chat(folder, "--prompt", "Once", "--max-new-tokens", 9)
    assert done.exit_code == 0
    assert done.stdout == "".join(autolite.pipeline(folder).stream("Once", max_new_tokens=9)) + "\n"
    drawn = [chat(folder, "--prompt", "Once", "--temperature", 1, "--top-k", 40, "--seed", s).stdout for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_command_remembers_a_conversation(chatty: Path) -> None:
    run = autolite.pipeline(chatty)
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    (first,) = run(said, max_new_tokens=6)
    said = [*first["generated_text"], {"role": "user", "content": "So?"}]
    (second,) = run(said, max_new_tokens=6)
    done = chat(chatty, "--system", "S", "--max-new-tokens", 6, said="Hi\n\nSo?\n")
    assert done.exit_code == 0
    answers = [message["content"] for message in second["generated_text"] if message["role"] == "assistant"]
    assert len(answers) == 2
    for answer in answers:
        assert answer + "\n" in done.stdout


def test_a_conversation_that_is_too_long_begins_anew(chatty: Path) -> None:
    done = chat(chatty, "--max-new-tokens", 20, said="a" * 150 + "\nHi\n")
    assert done.exit_code == 0
    assert "but the model takes 128 at most" in done.stderr
    assert "The conversation begins anew" in done.stderr
    assert (
        "".join(autolite.pipeline(chatty).stream([{"role": "user", "content": "Hi"}], max_new_tokens=20)) in done.stdout
    )


def test_an_answer_can_be_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, which does not end the conversation."""

    def interrupted(*args: Any, **how: Any) -> Iterator[str]:
        yield "so f"
        yield "ar"
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModelingPipeline, "stream", interrupted)
    done = chat(folder, said="Once\nTwice\n")
    assert (done.exit_code, done.stdout.count("so far\n")) == (0, 2)


def test_the_command_refuses_what_is_no_language_model(folder: Path, tmp_path: Path) -> None:
    assert "there is no autolite.json" in chat(tmp_path).stderr
    classifier = candidate(tmp_path, tiny_model("bert", vocab_size=257), byte_tokenizer())
    manifest = json.loads((classifier / "autolite.json").read_text())
    (classifier / "autolite.json").write_text(json.dumps({**manifest, "task": "text-classification"}))
    done = chat(classifier)
    assert done.exit_code == 2
    assert "was made for the task 'text-classification'; give the folder of a language model" in done.stderr
    assert "--system needs a chat template" in chat(folder, "--system", "S", "--prompt", "a").stderr
    with pytest.raises(ModelError, match="not 'text-generation'"):
        autolite.pipeline("text-generation", classifier)
