"""Apply a Plan to a teacher; trained students are kept on disk and serve every number format."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

from autolite import registry
from autolite.architecture import ModelShape
from autolite.errors import ModelError, StorageError
from autolite.files import write_atomically
from autolite.formats import Encoded
from autolite.plan import Plan, Step
from autolite.reshaping import reshape
from autolite.surgery import clone, keep_tokens
from autolite.techniques.base import Context, Student, weights_digest
from autolite.vocabulary import Vocabulary

LAYOUT = 2  # of students that are kept: another is not looked for. Tables of positions have number formats since 2
ENCODED = "encoded/"  # before the names of what is stored of encoded matrices: encoded/scales/<the parameter's name>


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
    """Return the plan without the last steps that only change number formats: what has to be trained.

    Formats that a later step trains for stay: students that were trained for other formats are other students.
    """
    ends = _ends_of_training(plan)
    return replace(plan, steps=plan.steps[: ends[-1] if ends else 0])


def untrained(plan: Plan) -> Plan:
    """Return the plan with no training in its steps: what plans have in common that only differ in how much they
    train."""
    steps = []
    for step in plan.steps:
        effort = registry.get("technique", step.technique).effort
        config = step.config.model_copy(update={effort: 0}) if effort else step.config
        steps.append(Step(step.technique, config))
    return replace(plan, steps=tuple(steps))


def _ends_of_training(plan: Plan) -> list[int]:
    """Return after which numbers of steps, ascending, number formats follow that are not trained for there: after the
    last of each run of steps that are not numeric."""
    numeric = [registry.get("technique", step.technique).numeric for step in plan.steps] + [True]
    return [i + 1 for i in range(len(plan.steps)) if not numeric[i] and numeric[i + 1]]


def _begin_of_training(plan: Plan) -> int:
    """Return the number of steps before the first that trains."""
    trains = (training(replace(plan, steps=plan.steps[: i + 1])) > 0 for i in range(len(plan.steps)))
    return next((i for i, each in enumerate(trains) if each), 0)


def compress(plan: Plan, context: Context, students: Path | None = None) -> Student:
    """Return the student that `plan` makes of `context.teacher`; the plan's seed replaces the context's.

    With a folder `students`, one trained before is read from there, and one trained now is written there: the key is
    the teacher, the training data and the plan up to there. That is without its number formats, so that one student
    serves them all; what is trained for its formats after that is kept too, each with its own. With `context.trunks`,
    so is what training begins with, which runs of every length have in common.

    Raises:
        PlanError: if a step cannot be applied; before any work, unless only the training shows it.
        StorageError: if the student cannot be written.
    """
    context = replace(context, seed=plan.seed)
    plan = canonical(resolve(plan, context), context.teacher.shape)
    kept: list[tuple[int, Plan, Path]] = []
    for end in sorted({_begin_of_training(plan), *_ends_of_training(plan)} - {0}):
        part = replace(plan, steps=plan.steps[:end])
        folder = students if training(part) else context.trunks
        if folder is not None:
            kept.append((end, part, _kept(part, context, folder)))
    done, student = 0, context.teacher
    for end, part, file in reversed(kept):
        found = read_weights(file, part, context.teacher)
        if found is not None:
            done, student = end, found
            break
    for end, _, file in kept:
        if end > done:
            student = _apply(plan.steps[done:end], student, context)
            done = end
            if file.parent != context.trunks:
                write_weights(student, file, context.teacher)
            elif not context.last:
                with suppress(StorageError):  # it only costs time later
                    write_weights(student, file, context.teacher)
    return _apply(plan.steps[done:], student, context)


def is_trained(plan: Plan, context: Context, students: Path) -> bool:
    """Whether `compress` finds nothing to train: the student of a resolved, canonical plan is kept there, or none is
    trained."""
    part = student_plan(plan)
    return not training(part) or _kept(part, context, students).is_file()


def _kept(part: Plan, context: Context, students: Path) -> Path:
    return students / f"{part.digest}-{_provenance(context)}-{LAYOUT}.safetensors"


def _apply(steps: tuple[Step, ...], student: Student, context: Context) -> Student:
    for step in steps:
        student = registry.get("technique", step.technique).apply(student, step.config, context)
    return student


def _provenance(context: Context) -> str:
    """Name the teacher and the data by their content."""
    if "provenance" not in context.memory:
        teacher, data = weights_digest(context.teacher.model), context.training_data()
        context.memory["provenance"] = f"{teacher[:8]}-{data[:8]}"
    return str(context.memory["provenance"])


def _frame(shape: ModelShape, teacher: Student, vocabulary: Vocabulary | None) -> Student:
    """The teacher cut to `shape` by position: where a student's weights are stored against."""
    model = clone(teacher.model)
    if vocabulary is not None:
        keep_tokens(model, vocabulary.kept)
    reshape(model, shape)
    return Student(model, shape, vocabulary=vocabulary)


def write_weights(student: Student, file: Path, teacher: Student) -> None:
    """Write the weights in which `student` differs from the teacher cut to its shape, and its encoded matrices; whole
    or not at all.

    Raises:
        StorageError: if the file cannot be written.
    """
    frame = dict(_frame(student.shape, teacher, student.vocabulary).model.named_parameters())
    changed = {
        name: parameter.detach().contiguous()
        for name, parameter in student.model.named_parameters()
        if not torch.equal(parameter, frame[name])
    }
    encoded = {
        f"{ENCODED}{name}/{key}": tensor.contiguous()
        for key, matrix in student.encoded.items()
        for name, tensor in matrix.tensors.items()
    }
    vocabulary = student.vocabulary
    notes: dict[str, Any] = {
        "shape": student.shape.to_json(),
        "encoded": {key: (matrix.format, matrix.shape) for key, matrix in student.encoded.items()},
        "ranges": dict(student.ranges),
        "vocabulary": None if vocabulary is None else [vocabulary.kept, vocabulary.new_ids],
    }
    write_atomically(file, save(changed | encoded, {"student": json.dumps(notes)}))


def read_weights(file: Path, plan: Plan, teacher: Student) -> Student | None:
    """Return the student that `write_weights` wrote, bit for bit; None if there is none or the file is damaged."""
    shape = shape_after(plan, teacher.shape)
    try:
        tensors = load(file.read_bytes())
        with safetensors.safe_open(file, "pt") as stream:
            notes = json.loads(stream.metadata()["student"])
        if ModelShape.from_json(notes["shape"]) != shape:
            return None
        lists = notes["vocabulary"]
        vocabulary = None if lists is None else Vocabulary(*map(tuple, lists))
        student = _frame(shape, teacher, vocabulary)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith(ENCODED):
                    continue
                parameter = student.model.get_parameter(name)
                if parameter.shape != tensor.shape:
                    return None
                parameter.copy_(tensor)
        encoded = {
            key: Encoded(form, (rows, columns), _named(tensors, key))
            for key, (form, (rows, columns)) in notes["encoded"].items()
        }
        ranges = {key: (low, high) for key, (low, high) in notes["ranges"].items()}
    except (OSError, safetensors.SafetensorError, ModelError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return replace(student, encoded=encoded, ranges=ranges)


def _named(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one encoded matrix by their names."""
    split = {name: name.removeprefix(ENCODED).split("/", 1) for name in tensors if name.startswith(ENCODED)}
    return {part: tensors[name] for name, (part, owner) in split.items() if owner == key}
