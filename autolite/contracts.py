"""What every technique, task, runtime and target promises, as checks that plug-in authors run on theirs.

Each function raises AssertionError with the promise that is broken:

    import pytest
    from autolite import contracts

    @pytest.mark.parametrize("family", contracts.FAMILIES)
    def test_my_technique(family):
        contracts.check_technique(MyTechnique(), family, {"strength": 0.5})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autolite import registry
from autolite.architecture import shape_of
from autolite.errors import ModelError
from autolite.hardware.predict import predict
from autolite.hardware.profile import Profile
from autolite.measure import Workload
from autolite.runtime.base import Runtime
from autolite.tasks.base import DataSpec, Further, Split, Task
from autolite.techniques.base import Context, Student, Technique
from autolite.testing import PAD, VOCAB, TinyImages, tiny_model, tiny_tokenizer

TEXT_FAMILIES = ("bert", "distilbert", "roberta", "albert")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")
FAMILIES = (*TEXT_FAMILIES, *DECODERS, "vit")


def tiny_task(family: str) -> Task:
    """Return a task that tiny models of `family` can learn."""
    if family == "vit":
        return TinyImages()
    task: Task = registry.get("task", "language-modeling" if family in DECODERS else "text-classification")
    return task


def tiny_context(family: str, task: Task, seed: int = 0, **config: Any) -> Context:
    """Return a tiny random teacher (`autolite.testing.tiny_model`) with 24 sentences of 3 to 9 tokens (or images) to
    train on."""
    rng = np.random.default_rng(7)
    if family == "vit":
        model = tiny_model(family, seed=seed, **config)
        images = [rng.standard_normal((3, 16, 16), np.float32) for _ in range(24)]
        return Context(Student(model, shape_of(model)), task, Split("train", images, None, rng.integers(0, 3, 24)), PAD)
    ids = [rng.integers(4, VOCAB, rng.integers(3, 10)) for _ in range(24)]
    causal = task.auto_class == "AutoModelForCausalLM"
    model = tiny_model(family, "language-modeling" if causal else "text-classification", seed=seed, **config)
    labels = np.zeros(0, np.int64) if causal else rng.integers(0, 3, 24)
    teacher, train = Student(model, shape_of(model)), Split("train", ids, None, labels)
    return Context(teacher, task, train, PAD, tokenizer=tiny_tokenizer())


def check_technique(technique: Technique, context: Context, settings: Mapping[str, Any]) -> None:
    """Check a technique with `settings` that change something, on one teacher."""
    teacher, config = context.teacher, technique.Config(**settings)
    config = technique.resolve(teacher.shape, config, context)
    assert technique.resolve(teacher.shape, config, context) == config, "what is resolved stays as it is"
    assert technique.Config.model_validate_json(config.model_dump_json()) == config, "settings survive JSON"
    assert hash(config) == hash(config.model_copy()), "equal settings are equal"
    idle = {technique.effort: 0} if technique.effort else {}
    assert technique.shape(teacher.shape, technique.Config(**idle)) == teacher.shape, "the defaults change no shape"
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = technique.apply(teacher, config, context)
    after = teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the teacher stays untouched"
    assert student.shape == technique.shape(teacher.shape, config), "the shape announced is the shape made"
    assert shape_of(student.model).without_formats() == student.shape.without_formats(), "and that of the weights"
    if technique.numeric:
        assert student.shape.without_formats() == teacher.shape.without_formats(), "numeric: formats change, shapes not"
        assert student.encoded, "numeric: matrices are encoded"
    again = technique.apply(teacher, config, context)
    ours, theirs = student.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "equal seeds give equal students"


def check_task(task: Task, data: Path, family: str) -> None:
    """Check a task on a data file that its users would give it, with a tiny model of `family`."""
    context = tiny_context(family, task)
    model = context.teacher.model
    found = task.load(DataSpec(str(data)), tiny_tokenizer(), model.config)
    splits = (found.train, found.search, found.selection, found.test)
    assert all(len(split) for split in splits), "no split is empty"
    again = task.load(DataSpec(str(data)), tiny_tokenizer(), model.config)
    assert again.fingerprint == found.fingerprint, "equal data and seeds give equal splits"
    assert found.p90_tokens >= 1
    batches = list(task.batches(found.search, 4, PAD))
    seen = np.sort(np.concatenate([batch.indices for batch in batches]))
    assert (seen == np.arange(len(found.search))).all(), "the batches hold every example once"
    batch = batches[0]
    logits = model(**{name: torch.from_numpy(array) for name, array in batch.inputs.items()}).logits
    labels = torch.from_numpy(batch.labels)
    loss = task.loss(logits, labels)
    assert loss.ndim == 0, "the loss is a scalar"
    assert torch.isfinite(loss), "the loss is finite"
    assert task.soft_targets(logits, labels).shape[-1] == logits.shape[-1], "soft targets are rows of the logits"
    scores = task.score_examples(logits.detach().numpy(), batch.labels)
    assert scores.shape == (len(batch.indices), 2), "two sums an example"
    if isinstance(task, Further):
        said = task.further(logits.detach().numpy(), logits.detach().numpy(), batch.labels)
        assert all(sums.shape == scores.shape for sums in said.values()), "two sums an example of each further number"
    ratio = float(scores[:, 0].sum() / scores[:, 1].sum())
    assert np.isfinite(task.summary(ratio)), "the metric is finite"
    assert task.kept(ratio, ratio) == 1.0, "the teacher keeps all of its own quality"
    better = ratio + 0.1 if task.direction == "maximize" else ratio - 0.1
    assert task.kept(better, ratio) > 1.0, "better than the teacher is more than all"


def check_runtime(runtime: Runtime, folder: Path) -> None:
    """Check that a runtime writes the same files twice, runs them, and refuses what is no artifact of its own."""
    model = tiny_model("bert")
    student = Student(model, shape_of(model))
    for name in ("one", "two"):
        (folder / name).mkdir()
    one, two = (runtime.emit(student, folder / name) for name in ("one", "two"))
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two], "equal students give equal bytes"
    assert not any(str(folder).encode() in f.read_bytes() for f in one), "no path of this machine is in the files"
    ids = np.array([[5, 6, 7], [8, PAD, PAD]], np.int64)
    logits = runtime.load(one[0]).run({"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)})["logits"]
    assert logits.shape == (2, 3), "a row of logits an example"
    assert logits.dtype == np.float32, "in float32"
    assert runtime.version, "the version is known"
    one[0].write_bytes(one[0].read_bytes()[:100])
    for file in (one[0], folder / "missing"):
        try:
            runtime.load(file)
        except ModelError:
            continue
        raise AssertionError(f"{file.name}: a truncated or missing artifact raises ModelError")


def check_target(profile: Profile) -> None:
    """Check that a target prices models of both kinds, with intervals, and says where its numbers come from."""
    assert all(number.source for number in profile.numbers().values()), "every number has a source"
    for family, task in (("bert", "text-classification"), ("llama", "language-modeling")):
        shape = shape_of(tiny_model(family, task))
        found = predict(shape, profile, Workload(tokens=16, threads=profile.threads))
        assert {"latency_ms", "size_bytes", "memory_bytes", "energy_mj"} <= set(found), "all prices are there"
        for number in found.values():
            assert 0 < number.low <= number.value <= number.high, f"{number.metric} lies in its interval"
            assert number.source == "predicted", "and says that it is predicted"
        assert found["memory_bytes"].value < profile.memory.limit, "a tiny model fits"
