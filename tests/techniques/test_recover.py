"""Recovery trains the masters from inside their formats."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autolite import contracts, formats
from autolite.architecture import shape_of
from autolite.errors import DataError, PlanError
from autolite.export import decoded
from autolite.parts import matrices_of
from autolite.surgery import share_layers
from autolite.techniques.base import Context, Student
from autolite.techniques.losses import soft_loss
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.techniques.recover import Recover, RecoverConfig
from autolite.techniques.teacher import to_tensors

SHORT = RecoverConfig(steps=3, batch_size=8, learning_rate=2e-3)


def prepared(family: str, **config: Any) -> tuple[Context, Student]:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    return context, Quantize().apply(context.teacher, QuantizeConfig(**config), context)


def distance(student: Student, context: Context) -> float:
    """KL from the teacher, over the training examples, of the student as its formats represent it."""
    model, teacher, losses = decoded(student), context.teacher.model, []
    for batch in context.task.batches(context.train, 8, context.pad_id):
        inputs, labels = to_tensors(batch, "cpu")
        with torch.no_grad():
            rows = [context.task.soft_targets(m(**inputs).logits, labels) for m in (model, teacher)]
        losses.append(float(soft_loss(rows[0], rows[1], 1.0)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_every_family_is_trained_in_its_formats(family: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    model = context.teacher.model
    if family != "albert":
        share_layers(model, attention=[0, 1, 0], feed_forward=[0, 0, 2])
    student = Student(model, shape_of(model))
    embedding = "fp32" if family == "vit" else "int4"
    config = QuantizeConfig(attention="int3", ffn="kmeans2", embedding=embedding, rounding="gptq")
    student = Quantize().apply(student, config, context)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    found = Recover().apply(student, SHORT, context)
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())
    assert found.shape == student.shape
    assert set(found.encoded) == set(student.encoded)
    masters = {key: m for group in matrices_of(found.model).values() for key, m in group.items()}
    for key, encoded in found.encoded.items():
        assert encoded.format == student.encoded[key].format
        grid, codes = formats.get(encoded.format).layout.read(encoded.tensors, encoded.shape[1])
        assert torch.equal(grid.quantize(masters[key].weight.detach()), codes), "the trained masters, to nearest"
    pairs = zip(found.model.parameters(), student.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim == 1 or a.requires_grad is False), "biases learn too"
    changed = [
        key
        for key, e in found.encoded.items()
        if not torch.equal(formats.decode(e), formats.decode(student.encoded[key]))
    ]
    assert changed, "and so do matrices, so far that codes change"
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    again = Recover().apply(student, SHORT, context)
    ours, theirs = found.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "equal seeds give equal students"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_student_comes_nearer_to_the_teacher(family: str) -> None:
    context, student = prepared(family, attention="int3", ffn="int2")
    settings = RecoverConfig(steps=30, batch_size=8, learning_rate=3e-3, alpha=0)
    found = Recover().apply(student, settings, context)
    assert distance(found, context) < 0.5 * distance(student, context)


def test_it_starts_from_what_the_rounding_chose() -> None:
    """With no learning rate to speak of, GPTQ's codes are still there afterwards."""
    context, student = prepared("bert", attention="int4", ffn="int4", rounding="gptq")
    found = Recover().apply(student, RecoverConfig(steps=1, learning_rate=1e-12, batch_size=8), context)
    for key, encoded in found.encoded.items():
        assert torch.equal(formats.decode(encoded), formats.decode(student.encoded[key]))
    nearest = Quantize().apply(context.teacher, QuantizeConfig(attention="int4", ffn="int4"), context)
    assert not any(
        torch.equal(formats.decode(e), formats.decode(nearest.encoded[key])) for key, e in found.encoded.items()
    )


def test_what_lost_little_is_left_as_it_is() -> None:
    context, student = prepared("bert", attention="int8", ffn="bf16")
    assert Recover().apply(student, SHORT, context) is student
    assert Recover().resolve(student.shape, SHORT, context) == RecoverConfig(steps=0)
    assert Recover().resolve(student.shape, SHORT.model_copy(update={"bits": 8}), context) != RecoverConfig(steps=0)
    few = prepared("bert", attention="int8", ffn="int4")[1]
    assert Recover().resolve(few.shape, SHORT, context) == SHORT
    assert Recover().apply(few, RecoverConfig(steps=0), context) is few


def test_large_tables_are_only_trained_in_few_bits() -> None:
    for embedding, moves in (("int8", False), ("int4", True)):
        context, student = prepared("bert", ffn="int4", embedding=embedding)
        found = Recover().apply(student, SHORT, context)
        name = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(found.model.get_parameter(name), student.model.get_parameter(name)) is not moves


class Whole(nn.Embedding):
    """A table that is rounded as any other matrix is, all of it in each step."""


@pytest.mark.parametrize("form", ["int3", "int2-asym", "kmeans4"])
@pytest.mark.parametrize("family", ["bert", "llama"])  # a table of its own, and one that is the head too
def test_tables_are_rounded_where_they_are_read_and_that_is_all_the_same(family: str, form: str) -> None:
    context, student = prepared(family, attention="int4", ffn="int4", embedding=form)
    other = deepcopy(student.model)
    for module in other.modules():
        if type(module) is nn.Embedding:
            module.__class__ = Whole
    config = RecoverConfig(steps=25, batch_size=4, learning_rate=2e-3)  # scales are fitted again on the way
    found, whole = (Recover().apply(replace(student, model=m), config, context) for m in (student.model, other))
    before = student.encoded
    for key, encoded in found.encoded.items():
        for name, tensor in encoded.tensors.items():
            assert torch.equal(tensor, whole.encoded[key].tensors[name])
    (table,) = (key for key in before if key.endswith(("word_embeddings.weight", "embed_tokens.weight")))
    assert not torch.equal(found.encoded[table].tensors["codes"], before[table].tensors["codes"]), "it is trained"


def test_it_fails_in_words() -> None:
    context, student = prepared("bert", ffn="int4")

    class Infinite(type(context.task)):  # type: ignore[misc]
        def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return logits.sum() * torch.inf

    with pytest.raises(PlanError, match=r"recover\.learning_rate: 0\.002 made the loss .* at step 1 of 3; try 0\.0002"):
        Recover().apply(student, SHORT, replace(context, task=Infinite()))
    with pytest.raises(DataError, match="the training split is empty"):
        Recover().apply(student, SHORT, replace(context, train=context.train.take([])))
