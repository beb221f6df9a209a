"""Run a candidate's folder the way a transformers pipeline runs a model: text in, labels, probabilities or text out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite import registry
from autolite.errors import AutoliteError, InputError, ModelError, first_line
from autolite.generation import Sampling, pieces, tokens
from autolite.machine import processors
from autolite.measure import Runner, Workload
from autolite.tasks.base import DataSpec
from autolite.tasks.encoding import max_tokens
from autolite.tasks.prompts import Chat, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "autolite.json"
SCHEMA = 1  # of the manifest
FALLBACK = {"runtime": "onnxruntime", "files": ["model.onnx"]}

Text = str | Mapping[str, str]

NEW_TOKENS = 256  # that follow a prompt, if nobody says how many


@dataclass(frozen=True)
class Pipeline:
    """A loaded candidate. Texts run one at a time: nothing is padded, and activations that a format quantizes on the
    fly do not depend on the texts beside them."""

    task: str
    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    config: Any
    limit: int  # tokens the model can take; longer texts are cut there
    ends: frozenset[int]  # tokens that end a text which is generated

    def run(self, text: Text) -> np.ndarray:
        """Return the logits of one text, or of a pair as {"text", "text_pair"}: float32 [labels] or [tokens, vocab].

        Raises:
            InputError: if it is not a text or such a pair, or has no tokens.
        """
        given: Any = {"text": text} if isinstance(text, str) else text
        if not isinstance(given, Mapping) or "text" not in given or not set(given) <= {"text", "text_pair"}:
            raise InputError(f'give a text, or a pair as {{"text": ..., "text_pair": ...}}, not {text!r:.80}')
        arrays = self.tokenizer(**given, truncation=True, max_length=self.limit, return_tensors="np")
        if arrays["input_ids"].size == 0:
            raise InputError(f"{text!r:.80} has no tokens; give a text that is not empty")
        outputs = self.runner.run({name: np.asarray(a, np.int64) for name, a in arrays.items()})
        return np.asarray(outputs["logits"][0])

    def __call__(self, inputs: Text | list[Text] | tuple[Text, ...]) -> Any:
        """Return what the task makes of the logits of each input, a list for a list."""
        if isinstance(inputs, list | tuple):
            return [self(text) for text in inputs]
        return registry.get("task", self.task).pipeline_outputs(self.run(inputs), self.config.to_dict())


class TextClassificationPipeline(Pipeline):
    """Returns what `transformers.pipeline("text-classification")` returns."""

    def __call__(self, inputs: Text | list[Text] | tuple[Text, ...], top_k: int | None = 0) -> Any:
        """Classify a text, a pair as {"text", "text_pair"}, or a list of them.

        A text gives `[{"label", "score"}]` and a list one dict each. With `top_k` each input gives the list of its
        `top_k` most probable labels (None: all of them).
        """
        legacy = top_k == 0  # transformers: without top_k, a list wraps a single text and nothing else
        if isinstance(inputs, list | tuple):
            return [self._best(text, 1)[0] if legacy else self._best(text, top_k) for text in inputs]
        found = self._best(inputs, 1 if legacy else top_k)
        return found[0] if legacy and not isinstance(inputs, str) else found

    def _best(self, text: Text, top_k: int | None) -> list[dict[str, Any]]:
        scores = self._scores(self.run(text).astype(np.float64))
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [{"label": self.config.id2label[int(i)], "score": float(scores[i])} for i in order]

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        """Apply softmax, a sigmoid for one label or several at once, nothing for a regression."""
        kind = self.config.problem_type
        if kind == "regression":
            return logits
        if kind == "multi_label_classification" or len(logits) == 1:
            return np.asarray(1 / (1 + np.exp(-logits)))
        shifted = np.exp(logits - logits.max())
        return np.asarray(shifted / shifted.sum())


class LanguageModelingPipeline(Pipeline):
    """Continues texts as `transformers.pipeline("text-generation")` does, but draws nothing unless it is asked to."""

    def __call__(self, inputs: Any, *, return_full_text: bool = True, **how: Any) -> Any:
        """Continue a text, or a chat as a list of {"role", "content"}; a list of them gives a list of answers.

        Args:
            inputs: text, chat, or a list of either.
            return_full_text: whether the text, or the chat, stands before what was generated.
            how: as in `stream`.

        Returns:
            `[{"generated_text": ...}]`: a text, or for a chat its messages with the answer behind them.

        Raises:
            InputError: as `stream`.
        """
        if isinstance(inputs, list | tuple) and inputs and not isinstance(inputs[0], Mapping):
            return [self(each, return_full_text=return_full_text, **how) for each in inputs]
        found = "".join(self.stream(inputs, **how))
        if not return_full_text:
            return [{"generated_text": found}]
        whole = inputs + found if isinstance(inputs, str) else [*inputs, {"role": "assistant", "content": found}]
        return [{"generated_text": whole}]

    def stream(
        self,
        inputs: str | Chat,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_strings: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Return the pieces of what follows a text or a chat, each as soon as it is found.

        Args:
            inputs: the text, or the chat as a list of {"role", "content"}, which the tokenizer's template writes out.
            max_new_tokens: how many tokens at most; by default 256, or what the model has room for.
            do_sample: draw tokens by their probability, instead of taking the most probable; by default, if anything
                of what follows is given.
            temperature: divides the logits before tokens are drawn; 0 takes the most probable one.
            top_k: draw from so many of the most probable tokens; 0 for all.
            top_p: draw from the most probable tokens that have this probability together.
            seed: equal seeds draw equal texts.
            stop_strings: the text ends behind the first of these.

        Raises:
            InputError: if there is nothing to continue, it is too long for the model, a number is out of its range, or
                there is a chat and no template.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        draws = sampling != Sampling() if do_sample is None else do_sample
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if "" in stops:
            raise InputError("an empty stop string would end every text at once; leave it out")
        prompt = prompt_ids(self.tokenizer, inputs)
        count = self._count(len(prompt), max_new_tokens)
        choose = (sampling if draws else Sampling(temperature=0)).chooser()
        return pieces(self.tokenizer, prompt, tokens(self.runner, prompt, count, choose, self.ends), stops)

    def _count(self, prompt: int, asked: int | None) -> int:
        """Return how many tokens can follow a prompt of so many."""
        room = self.limit - prompt
        if asked is not None and asked < 1:
            raise InputError(f"max_new_tokens={asked} is too few; give 1 at least")
        if room < 1:
            raise InputError(
                f"the text has {prompt} tokens, but the model takes {self.limit} at most, those that follow included; "
                "give a shorter one"
            )
        if asked is not None and asked > room:
            raise InputError(
                f"the text has {prompt} tokens and max_new_tokens={asked} are to follow, but the model takes "
                f"{self.limit} at most; give a shorter text, or max_new_tokens={room}"
            )
        return min(room, NEW_TOKENS) if asked is None else asked

    def next_tokens(self, text: str) -> list[dict[str, Any]]:
        """Return the five most probable next tokens, `[{"token", "score"}]`."""
        found: list[dict[str, Any]] = super().__call__(text)
        return found

    def logits(self, text: str) -> np.ndarray:
        """Return float32 [tokens, vocab]; row t predicts token t + 1."""
        return self.run(text)

    def perplexity(self, text: str) -> float:
        """Return exp of the mean loss (nats) of each token given those before it, in blocks of the model's length.

        Raises:
            InputError: if the text has fewer than two tokens, so that nothing is predicted.
        """
        task = registry.get("task", self.task)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        total = np.zeros(2)
        for block in (ids[i : i + self.limit] for i in range(0, len(ids), self.limit)):
            if len(block) > 1:
                logits = self.runner.run({"input_ids": block[None], "attention_mask": np.ones_like(block[None])})
                total += task.score_examples(logits["logits"], np.append(block[1:], -100)[None])[0]
        if not total[1]:
            raise InputError(f"{text!r:.80} has {len(ids)} tokens; perplexity takes two at least")
        return float(task.summary(total[0] / total[1]))


_KINDS: dict[str, type[Pipeline]] = {  # by the task's `pipeline_tag`
    "text-classification": TextClassificationPipeline,
    "text-generation": LanguageModelingPipeline,
}


def pipeline(task: str | Path, folder: str | Path | None = None, threads: int | None = None) -> Any:
    """Load a candidate's folder: `pipeline(folder)`, or `pipeline(task, folder)` to insist on its task.

    Args:
        task: the folder, or if the folder follows, the name of a task, or of transformers' pipeline for it.
        folder: what `autolite search` or `export` wrote.
        threads: processor threads one call uses; by default those of the workload that the candidate was made for, as
            far as this machine has them.

    Raises:
        ModelError: if the folder is no candidate, is of another task, or something in it is missing or corrupt.
    """
    wanted, place = (None, Path(task)) if folder is None else (str(task), Path(folder))
    manifest = read_manifest(place)
    name = str(manifest["task"])
    known = registry.names("task")
    if name not in known:
        raise ModelError(f"{place} is for the task '{name}', which is not installed; known are {', '.join(known)}")
    tag = registry.get("task", name).pipeline_tag
    if wanted not in (None, name, tag):
        raise ModelError(f"{place} was made for the task '{name}', not '{wanted}'; leave the task out or ask for that")
    artifact = (manifest.get("artifacts") or [FALLBACK])[0]
    try:
        runtime, file = registry.get("runtime", artifact["runtime"]), place / artifact["files"][0]
    except (AutoliteError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{place / MANIFEST} names no artifact that can be run: {artifact!r}") from error
    runner = runtime.load(file, threads or _threads(place, manifest))
    tokenizer, config, ends = _load_rest(place)
    limit = max_tokens(DataSpec(None), tokenizer, config, 10**9)
    return _KINDS.get(tag, Pipeline)(name, runner, tokenizer, config, limit, ends)


def _threads(folder: Path, manifest: Mapping[str, Any]) -> int:
    try:
        wanted = Workload.parse(str(manifest["workload"])).threads if "workload" in manifest else 1
    except InputError as error:
        raise ModelError(f"{folder / MANIFEST} is damaged: {error}") from error
    return min(wanted, processors())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's autolite.json.

    Raises:
        ModelError: if it is missing, corrupt, or not one that this version reads.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ModelError(f"there is no {MANIFEST} in {folder}; give a folder that AutoLite exported")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); export the candidate again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("task"), str) or "schema" not in manifest:
        raise ModelError(f"{file} is not a candidate's manifest: it needs 'schema' and 'task'; export it again")
    if manifest["schema"] != SCHEMA:
        raise ModelError(
            f"{file} has schema {manifest['schema']!r:.40}, but this version reads {SCHEMA}; "
            "use the version of AutoLite that wrote it"
        )
    return manifest


def _load_rest(folder: Path) -> tuple[PreTrainedTokenizerBase, Any, frozenset[int]]:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if not (folder / "config.json").is_file():
        raise ModelError(f"there is no config.json in {folder}; export the candidate again")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        settings = config
        if (folder / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a configuration or tokenizer file can do wrong
        raise ModelError(f"the configuration or tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    end = getattr(settings, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    return tokenizer, config, frozenset(end if isinstance(end, list | tuple) else [] if end is None else [end])
