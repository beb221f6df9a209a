"""Candidate -> folder: weights that transformers reloads, the artifact's manifest, and a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autolite import unmapped
from autolite.files import sha256
from autolite.formats import decode
from autolite.front import Candidate, write_json
from autolite.inference import MANIFEST, SCHEMA
from autolite.parts import embeddings_of, matrices_of
from autolite.reload import save_student
from autolite.runtime import genai
from autolite.runtime.modelfile import read_inputs
from autolite.runtime.requirements import CODES, SIGNED, metadata_of, required
from autolite.runtime.sequences import BEFORE
from autolite.surgery import clone
from autolite.tasks.base import Task
from autolite.techniques.base import Student
from autolite.vocabulary import trimmed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Provenance:
    """What a candidate came from: enough to make it again."""

    model: str
    task: Task
    target: str
    workload: str
    data_fingerprint: str
    versions: dict[str, str]
    tokenizer: PreTrainedTokenizerBase


def decoded(student: Student) -> PreTrainedModel:
    """Return a copy of the model whose matrices hold what their number formats can represent, in float32."""
    model = clone(student.model)
    with torch.no_grad():
        for group in matrices_of(model).values():
            for key, matrix in group.items():
                if key in student.encoded:
                    matrix.weight.copy_(decode(student.encoded[key]))
    return model


def inputs_of(student: Student) -> list[str]:
    """Return the names of the artifact's inputs that are not a cache, each int64 [batch, tokens]."""
    if student.shape.unmapped is not None:
        return unmapped.inputs_of(student.model)
    types = embeddings_of(student.model).token_type
    typed = types is not None and types.weight.shape[0] > 1  # a single type is part of the embedding
    return ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]


def write_candidate(folder: Path, student: Student, candidate: Candidate, made: Provenance) -> None:
    """Write everything of a candidate but its artifact, which is in `folder` already.

    Leaves config.json, model.safetensors and the tokenizer (transformers), autolite.json (plan, shape, provenance,
    versions, SHA-256 of every file) and README.md (the model card); of decoders genai_config.json (onnxruntime-genai).
    """
    vocabulary = student.vocabulary
    tokenizer = made.tokenizer if vocabulary is None else trimmed(made.tokenizer, vocabulary)
    save_student(decoded(student), student.shape, folder, tokenizer)
    artifact = folder / candidate.artifacts[0]["files"][0]
    caches = _caches(artifact)
    if caches:
        write_json(folder / genai.FILE, genai.genai_config(student.model, student.shape, artifact.name))
    inputs = [*inputs_of(student), *caches]
    (folder / "README.md").write_text(_card(folder, candidate, made, inputs), encoding="utf-8")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "id": candidate.id,
        "task": made.task.name,
        "plan": candidate.plan.to_json(),
        "plan_digest": candidate.plan.digest,
        "shape": student.shape.to_json(),
        "model": made.model,
        "target": made.target,
        "workload": made.workload,
        "data": made.data_fingerprint,
        "artifacts": [{**one, **_needs(folder / one["files"][0])} for one in candidate.artifacts],
        "inputs": inputs,
        "quality": candidate.to_json()["quality"],
        "versions": made.versions,
        "sha256": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
    }
    write_json(folder / MANIFEST, manifest)


def rewrite_card(folder: Path, candidate: Candidate, made: Provenance) -> None:
    """Write the model card of a folder anew, for a candidate whose numbers have changed."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    card = folder / "README.md"
    card.write_text(_card(folder, candidate, made, manifest["inputs"]), encoding="utf-8")
    manifest["sha256"][card.name] = sha256(card)
    write_json(folder / MANIFEST, manifest)


def _needs(file: Path) -> dict[str, Any]:
    """Return what an ONNX model says it needs of its runtime, as an entry of the manifest."""
    return {"requires": required(file)} if file.suffix == ".onnx" else {}


def _caches(file: Path) -> list[str]:
    """Return the names of the inputs that take keys and values of earlier calls."""
    return [name for name in read_inputs(file) if name.startswith(BEFORE)] if file.suffix == ".onnx" else []


def _session(file: Path, inputs: list[str]) -> str:
    """Return the lines that load an artifact in its plain runtime."""
    takes = f"  # int64 {', '.join(name for name in inputs if not name.startswith(BEFORE))} -> float32 logits"
    if any(name.startswith(BEFORE) for name in inputs):
        takes += "\n# and float32 past_key_values.*, [batch, heads, 0, width] at first -> present.*, for the next call"
    if file.suffix == ".xml":
        return f'import openvino\n\nmodel = openvino.compile_model("{file.name}", "CPU"){takes}'
    if file.suffix != ".onnx" or metadata_of(file).get(CODES) != SIGNED:
        return f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file.name}"){takes}'
    return f"""import onnxruntime

options = onnxruntime.SessionOptions()
# On x86 processors without VNNI, whose 8-bit products would overflow, and only there, since it slows down the others:
# options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession("{file.name}", options){takes}"""


def _card(folder: Path, candidate: Candidate, made: Provenance, inputs: list[str]) -> str:
    quality, kept = candidate.quality, candidate.kept
    latency, faster = candidate.latency_ms, candidate.faster
    file, runtime = candidate.artifacts[0]["files"][0], candidate.artifacts[0]["runtime"]
    return f"""---
base_model: {made.model}
library_name: autolite
pipeline_tag: {made.task.pipeline_tag}
---
# {candidate.id}: {Path(made.model).name}, compressed by AutoLite for {made.target}

{candidate.plan.describe()}

| | value (95 % interval) |
|---|---|
| {quality.metric}, {quality.split} split | {quality.value:.4g} ({quality.low:.4g} to {quality.high:.4g}) |
| of the teacher's quality kept | {kept.value:.2%} ({kept.low:.2%} to {kept.high:.2%}) |
| latency, {latency.source}, {made.workload} | {latency.value:.3g} ms ({latency.low:.3g} to {latency.high:.3g}) |
| faster than the fp32 baseline, {faster.source} | {faster.value:.2f}x ({faster.low:.2f}x to {faster.high:.2f}x) |
| size of the artifact | {int(candidate.size_bytes.value):,} bytes |

The quality is that of `{file}`, scored with {runtime} on the machine that made it. The safetensors hold the same
weights, decoded to float32: transformers computes with float32 activations, so its numbers differ slightly from the
artifact's where a format quantizes activations.

```python
import autolite

autolite.pipeline(".")("some text")  # {runtime} underneath

{_session(folder / file, inputs)}

from transformers import AutoTokenizer, {made.task.auto_class}

model = {made.task.auto_class}.from_pretrained(".")  # works once autolite is imported
```

Plan {candidate.plan.digest}, seed {candidate.plan.seed}; autolite.json has the whole plan, versions and checksums.
"""
