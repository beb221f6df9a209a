"""Distillation: the student learns the labels, and what its teachers say and how they arrive at it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from autolite import plan
from autolite.architecture import ModelShape
from autolite.errors import PlanError
from autolite.surgery import clone
from autolite.techniques.base import Context, Student, require_float32, weights_digest
from autolite.techniques.checkpoint import Checkpoint, Trunk
from autolite.techniques.ensemble import further_teacher
from autolite.techniques.objective import Item, LayerMap, Objective
from autolite.techniques.schedules import Schedule
from autolite.techniques.sparsity import hold
from autolite.techniques.teacher import outputs_of, teacher_outputs
from autolite.techniques.training import Optimization, train

AHEAD = 8  # batches that processes which train on the same ones can share out among them
RELATIONS = ("query", "key", "value")


class DistillConfig(plan.Config):
    """Settings of distillation; `Distill` has the loss they are part of.

    The defaults are what recovered a six-layer encoder of width 384, pruned to a quarter, best within 40 to 600 steps;
    learning rates of 1e-4 to 3e-4 were equal within the noise there, 1e-3 cost 3 points of accuracy.

    Attributes:
        steps: optimiser steps, each on `accumulate` batches; 0 leaves the student as it is.
        temperature: T of the softened distributions.
        alpha: weight of the hard loss; 1 - alpha is that of the soft one. With 0, no label is looked at.
        hidden: weight of the hidden-state loss.
        hidden_kind: "mse" (normalised) or "cosine". States of other widths are compared after a linear map of their
            own, which is learned with the student and then thrown away.
        attention: weight of the loss between attention maps.
        attention_kind: "kl" of the probabilities, or normalised "mse" of the scores.
        queries: weight of the relation loss between the last layer's queries.
        keys: the same of its keys.
        values: the same of its values.
        relation_heads: parts that their channels are dealt out to; a divisor of both models' numbers of channels.
        layers: which teacher's layer each of the student's imitates: "source", the one it came from (uniform where
            that is not known); "uniform", evenly spaced ones; "last", the teacher's last ones in order; or their
            numbers from 0, one for each of the student's layers ("1,3,5" in a search space).
        teachers: folders or hub names of further teachers of the same labels and tokenizer, whose logits are learned
            too ("a,b" in a search space).
        combine: "mean" of the teachers' probabilities, or the "best" teacher of each example.
        digests: content of each of `teachers`, filled in when a plan is resolved.
        schedule: how temperature and weights go to their ends over the run: "constant" (not at all), "linear" or
            "cosine".
        temperature_end: T at the last step; None for `temperature`.
        alpha_end: alpha at the last step; None for `alpha`.
        matching_end: factor of the weights `hidden`, `attention`, `queries`, `keys` and `values` at the last step.
        learning_rate: peak of AdamW's learning rate.
        batch_size: examples in a batch.
        accumulate: batches whose mean gradient makes a step.
        embeddings: train the embedding tables too. They are most of a small model's weights and so of the optimiser's
            time, and the student starts from the teacher's.
    """

    steps: int = Field(300, ge=0)
    temperature: float = Field(4.0, ge=1, le=20)
    alpha: float = Field(0.2, ge=0, le=1)
    hidden: float = Field(1.0, ge=0, le=100)
    hidden_kind: Literal["mse", "cosine"] = "mse"
    attention: float = Field(0.0, ge=0, le=100)
    attention_kind: Literal["kl", "mse"] = "kl"
    queries: float = Field(0.0, ge=0, le=100)
    keys: float = Field(0.0, ge=0, le=100)
    values: float = Field(0.0, ge=0, le=100)
    relation_heads: int = Field(8, ge=1)
    layers: LayerMap = "source"
    teachers: tuple[str, ...] = ()
    combine: Literal["mean", "best"] = "mean"
    digests: tuple[str, ...] = ()
    schedule: Schedule = "constant"
    temperature_end: float | None = Field(None, ge=1, le=20)
    alpha_end: float | None = Field(None, ge=0, le=1)
    matching_end: float = Field(1.0, ge=0, le=100)
    learning_rate: float = Field(2e-4, gt=0, le=1)
    batch_size: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    embeddings: bool = False

    @field_validator("layers", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """A search space's choices are scalars, so that layers are written in a text."""
        if isinstance(value, str) and value.replace(",", "").replace(" ", "").isdigit():
            return tuple(int(part) for part in value.split(",") if part.strip())
        return value

    @field_validator("teachers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def relations(self) -> dict[str, float]:
        """The weights of the relation losses that are on, by what they compare."""
        weights = dict(zip(RELATIONS, (self.queries, self.keys, self.values), strict=True))
        return {name: weight for name, weight in weights.items() if weight}


def stream(config: DistillConfig, context: Context) -> Iterator[Item]:
    """Yield batches for ever: each epoch is a new permutation of all of them. Examples of similar length stay in one
    batch."""
    rng = np.random.default_rng(context.seed)
    others = [(source, further_teacher(source, context)) for source in config.teachers]
    for epoch in count():
        first = teacher_outputs(context, config.batch_size, epoch)
        further = (outputs_of(model, source, context, config.batch_size, epoch) for source, model in others)
        teachers = (first, *further)
        order: list[int] = rng.permutation(len(first.batches)).tolist()
        yield from (Item(teachers, index, order[i + 1 : i + 1 + AHEAD]) for i, index in enumerate(order))


class Distill:
    """L = alpha * L_hard + (1 - alpha) * T^2 * KL(teacher_T || student_T) + hidden * L_hidden + attention * L_attention
    + queries * L_relation(Q) + keys * L_relation(K) + values * L_relation(V).

    L_hard is the task's loss over the examples with a label, the others are those of `autolite.techniques.losses`, each
    the mean over the layers it compares (relations: the last layer alone). Dropout stays off: the student is smaller
    than the teacher and the runs are short.
    """

    name: ClassVar[str] = "distill"
    Config: ClassVar[type[plan.Config]] = DistillConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = "steps"
    needs_map: ClassVar[bool] = False

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` with the content of its further teachers, and without what has no effect.

        Raises:
            PlanError: if the student and the teacher cannot be compared in the way asked for, or a further teacher has
                changed since the plan was resolved.
            ModelError: if a further teacher cannot be used.
        """
        assert isinstance(config, DistillConfig)
        if config.steps == 0:
            return config
        self.shape(shape, config)
        _require_comparable(shape, config, context.teacher.shape)
        digests = tuple(weights_digest(further_teacher(source, context)) for source in config.teachers)
        if config.digests and config.digests != digests:
            raise PlanError(
                f"distill.digests: this plan was made with teachers of the content {', '.join(config.digests)}, but "
                f"{', '.join(config.teachers)} now have {', '.join(digests)}"
            )
        idle: set[str] = set() if config.teachers else {"combine"}
        if config.schedule == "constant":
            idle |= {"temperature_end", "alpha_end", "matching_end"}
        idle |= {f"{what}_kind" for what in ("hidden", "attention") if not getattr(config, what)}
        if not config.relations:
            idle.add("relation_heads")
            if not (config.hidden or config.attention):
                idle.add("layers")
        settled = {key: value for key, value in config.model_dump().items() if key not in idle}
        return DistillConfig(**{**settled, "digests": digests})

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return `shape` itself.

        Raises:
            PlanError: if matrices are already in a number format, or the student has not what is to be compared.
        """
        assert isinstance(config, DistillConfig)
        require_float32(self.name, shape)
        if config.steps:
            _require_parts("student", shape, config)
            layers = len(shape.stacks[-1].layers)
            if isinstance(config.layers, tuple) and len(config.layers) != layers:
                raise PlanError(f"distill.layers: {config.layers} names {len(config.layers)} layers for {layers}")
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the student after `config.steps` steps.

        With `context.cache`, a run that was killed goes on where its last checkpoint was.

        Raises:
            PlanError: if the loss stops being finite, or student and teacher cannot be compared.
            DataError: if there is nothing to train on.
            StorageError: if the teacher's outputs or a checkpoint cannot be written.
        """
        assert isinstance(config, DistillConfig)
        if config.steps == 0:
            self.shape(student.shape, config)
            return student
        settled = self.resolve(student.shape, config, context)
        assert isinstance(settled, DistillConfig)
        model: Any = clone(student.model)
        model.to(context.device)
        model.train(False)
        objective = Objective.of(replace(student, model=model), settled, context)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not settled.embeddings:
            for table in (module for module in model.modules() if isinstance(module, nn.Embedding)):
                table.requires_grad_(False)
        trained = [parameter for parameter in trainable if parameter.requires_grad]
        train(
            trained + list(objective.projections.parameters()),
            objective,
            stream(settled, context),
            Optimization(self.name, settled.steps, settled.learning_rate, settled.accumulate),
            seed=context.seed,
            checkpoint=_checkpoint(student, settled, context),
            trunk=_trunk(student, settled, context),
            after_step=hold(model, student.shape),
            progress=context.progress,
        )
        for parameter in trainable:
            parameter.requires_grad_(True)
            parameter.grad = None
        return replace(student, model=model.cpu())


def _require_parts(whose: str, shape: ModelShape, config: DistillConfig) -> None:
    """Refuse to look into a model for what it has not."""
    wanted = [name for name in ("attention", "queries", "keys", "values") if getattr(config, name)]
    if config.layers not in ("source", "uniform"):
        wanted.append("layers")
    if not wanted or (shape.unmapped is None and not config.relations):
        return
    if shape.unmapped is not None:
        raise PlanError(
            f"distill.{wanted[0]} needs the architecture map, which does not have this '{shape.family}' model: leave "
            "it out; logits and hidden states work without"
        )
    last = shape.stacks[-1].layers[-1]
    for name in config.relations:
        channels = (last.heads if name == "query" else last.kv_heads) * last.head_dim
        if channels % config.relation_heads:
            raise PlanError(
                f"distill.relation_heads: {config.relation_heads} does not divide the {channels} {name} channels of "
                f"the {whose}'s last layer; take {math.gcd(channels, config.relation_heads)}"
            )


def _require_comparable(shape: ModelShape, config: DistillConfig, teacher: ModelShape) -> None:
    _require_parts("teacher", teacher, config)
    if shape.unmapped is not None:
        return
    own, total = len(shape.stacks[-1].layers), len(teacher.stacks[-1].layers)
    if own > total:
        raise PlanError(f"distill.layers: the student has {own} layers, the teacher only {total}")
    if isinstance(config.layers, tuple) and not all(0 <= layer < total for layer in config.layers):
        raise PlanError(f"distill.layers: {config.layers} must lie in 0 to {total - 1}, the teacher's layers")


def _checkpoint(student: Student, config: DistillConfig, context: Context) -> Checkpoint | None:
    if context.cache is None:
        return None
    return Checkpoint(context.cache / "checkpoints" / f"{_name(student, config, context)}.safetensors")


def begins_alike(config: DistillConfig) -> bool:
    """Whether runs of other lengths begin as this one; not so if a weight goes to its end over the run."""
    return config.schedule == "constant"


def _trunk(student: Student, config: DistillConfig, context: Context) -> Trunk | None:
    if context.trunks is None or not begins_alike(config):
        return None
    return Trunk(context.trunks, _name(student, config.model_copy(update={"steps": 0}), context), context.last)


def _name(student: Student, config: DistillConfig, context: Context) -> str:
    """Name the run by all that it depends on."""
    models = [weights_digest(each.model) for each in (student, context.teacher)]
    key = " ".join((config.model_dump_json(), *models, context.training_data(), str(context.seed), context.device))
    return hashlib.sha256(key.encode()).hexdigest()[:32]
