"""Run a candidate's folder the way a transformers pipeline runs a model: text in, labels or probabilities out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite import registry
from autolite.errors import AutoliteError, InputError, ModelError, first_line
from autolite.machine import processors
from autolite.measure import Runner, Workload
from autolite.tasks.base import DataSpec
from autolite.tasks.encoding import max_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "autolite.json"
SCHEMA = 1  # of the manifest
FALLBACK = {"runtime": "onnxruntime", "files": ["model.onnx"]}

Text = str | Mapping[str, str]


@dataclass(frozen=True)
class Pipeline:
    """A loaded candidate. Texts run one at a time: nothing is padded, and activations that a format quantizes on the
    fly do not depend on the texts beside them."""

    task: str
    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    config: Any
    limit: int  # tokens the model can take; longer texts are cut there

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
    """Called with a text, it returns the most probable next tokens."""

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
        task: the folder, or the name of a task if the folder follows.
        folder: what `autolite search` or `export` wrote.
        threads: processor threads one call uses; by default those of the workload that the candidate was made for, as
            far as this machine has them.

    Raises:
        ModelError: if the folder is no candidate, is of another task, or something in it is missing or corrupt.
    """
    wanted, place = (None, Path(task)) if folder is None else (str(task), Path(folder))
    manifest = read_manifest(place)
    name = str(manifest["task"])
    if wanted is not None and wanted != name:
        raise ModelError(f"{place} was made for the task '{name}', not '{wanted}'; leave the task out or ask for that")
    known = registry.names("task")
    if name not in known:
        raise ModelError(f"{place} is for the task '{name}', which is not installed; known are {', '.join(known)}")
    artifact = (manifest.get("artifacts") or [FALLBACK])[0]
    try:
        runtime, file = registry.get("runtime", artifact["runtime"]), place / artifact["files"][0]
    except (AutoliteError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{place / MANIFEST} names no artifact that can be run: {artifact!r}") from error
    runner = runtime.load(file, threads or _threads(place, manifest))
    tokenizer, config = _load_rest(place)
    limit = max_tokens(DataSpec(None), tokenizer, config, 10**9)
    return _KINDS.get(registry.get("task", name).pipeline_tag, Pipeline)(name, runner, tokenizer, config, limit)


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


def _load_rest(folder: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ModelError(f"there is no config.json in {folder}; export the candidate again")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a configuration or tokenizer file can do wrong
        raise ModelError(f"the configuration or tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    return tokenizer, config
