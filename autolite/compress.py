"""Apply a Plan to a teacher; trained students are kept on disk and serve every number format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save

from autolite import registry
from autolite.architecture import ModelShape
from autolite.errors import ModelError
from autolite.files import write_atomically
from autolite.plan import Plan, Step
from autolite.surgery import clone, reshape
from autolite.techniques.base import Context, Student, weights_digest


def shape_after(plan: Plan, shape: ModelShape) -> ModelShape:
    """Return the shape that `plan` makes of `shape`, without weights.

    Raises:
        PlanError: if a step cannot be applied.
    """
    for step in plan.steps:
        shape = registry.get("technique", step.technique).shape(shape, step.config)
    return shape


def resolve(plan: Plan, context: Context) -> Plan:
    """Return the plan with every setting that depends on the teacher's weights or data replaced by what it comes to;
    a resolved plan is returned as it is.

    Raises:
        PlanError: if a step cannot be applied.
    """
    steps, shape = [], context.teacher.shape
    for step in plan.steps:
        technique = registry.get("technique", step.technique)
        config = technique.resolve(shape, step.config, context)
        shape = technique.shape(shape, config)
        steps.append(Step(step.technique, config))
    return replace(plan, steps=tuple(steps))


def training(plan: Plan) -> int:
    """Return the training steps of the whole plan."""
    efforts = ((registry.get("technique", step.technique).effort, step.config) for step in plan.steps)
    return sum(int(getattr(config, effort)) for effort, config in efforts if effort)


def canonical(plan: Plan, shape: ModelShape) -> Plan:
    """Return the plan without the steps that change nothing, so that equal students have equal digests.

    Training is left out while the student still is the teacher: it has nothing to learn from itself.

    Raises:
        PlanError: if a step cannot be applied to `shape`.
    """
    kept, teacher = [], shape
    for step in plan.steps:
        after = shape_after(Plan((step,)), shape)
        if after != shape or (shape != teacher and training(Plan((step,)))):
            kept.append(step)
        shape = after
    return replace(plan, steps=tuple(kept))


def student_plan(plan: Plan) -> Plan:
    """Return the plan without the steps that only change number formats: what has to be trained."""
    return plan.only(lambda name: not registry.get("technique", name).numeric)


def compress(plan: Plan, context: Context, students: Path | None = None) -> Student:
    """Return the student that `plan` makes of `context.teacher`; the plan's seed replaces the context's.

    With a folder `students`, one trained before is read from there, and one trained now is written there: the key is
    the teacher, the training data and the plan without its number formats.

    Raises:
        PlanError: if a step cannot be applied; before any work, unless only the training shows it.
        StorageError: if the student cannot be written.
    """
    context = replace(context, seed=plan.seed)
    plan = canonical(resolve(plan, context), context.teacher.shape)
    trained = student_plan(plan)
    first = len(trained.steps)
    if students is None or not training(trained) or plan.steps[:first] != trained.steps:
        return _apply(plan, context.teacher, context)
    file = students / f"{trained.digest}-{_provenance(context)}.safetensors"
    student = read_weights(file, trained, context.teacher)
    if student is None:
        student = _apply(trained, context.teacher, context)
        write_weights(student, file, context.teacher)
    return _apply(replace(plan, steps=plan.steps[first:]), student, context)


def _apply(plan: Plan, student: Student, context: Context) -> Student:
    for step in plan.steps:
        student = registry.get("technique", step.technique).apply(student, step.config, context)
    return student


def _provenance(context: Context) -> str:
    """Name the teacher and the data by their content."""
    if "provenance" not in context.memory:
        teacher, data = weights_digest(context.teacher.model), context.training_data()
        context.memory["provenance"] = f"{teacher[:8]}-{data[:8]}"
    return str(context.memory["provenance"])


def _frame(shape: ModelShape, teacher: Student) -> Student:
    """The teacher cut to `shape` by position: where a student's weights are stored against."""
    model = clone(teacher.model)
    reshape(model, shape)
    return Student(model, shape)


def write_weights(student: Student, file: Path, teacher: Student) -> None:
    """Write the weights in which `student` differs from the teacher cut to its shape; whole or not at all.

    Raises:
        StorageError: if the file cannot be written.
    """
    frame = dict(_frame(student.shape, teacher).model.named_parameters())
    changed = {
        name: parameter.detach().contiguous()
        for name, parameter in student.model.named_parameters()
        if not torch.equal(parameter, frame[name])
    }
    write_atomically(file, save(changed, {"shape": json.dumps(student.shape.to_json())}))


def read_weights(file: Path, plan: Plan, teacher: Student) -> Student | None:
    """Return the student that `write_weights` wrote, bit for bit; None if there is none or the file is damaged."""
    shape = shape_after(plan, teacher.shape)
    try:
        tensors = load(file.read_bytes())
        with safetensors.safe_open(file, "pt") as stream:
            if ModelShape.from_json(json.loads(stream.metadata()["shape"])) != shape:
                return None
        student = _frame(shape, teacher)
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameter = student.model.get_parameter(name)
                if parameter.shape != tensor.shape:
                    return None
                parameter.copy_(tensor)
    except (OSError, safetensors.SafetensorError, ModelError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return student
