"""What a technique is, what it works on (Student) and what it may use (Context)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from autolite import plan
from autolite.architecture import ModelShape
from autolite.errors import PlanError
from autolite.tasks.base import Augment, Split, Task
from autolite.tasks.custom import identity_of
from autolite.tasks.encoding import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from autolite.formats import Encoded
    from autolite.vocabulary import Vocabulary


CACHE_LIMIT = 2**31  # bytes of a teacher's outputs kept on disk, unless the user says otherwise


@dataclass(frozen=True)
class Student:
    """A model on its way: a transformers model whose modules have `shape`'s sizes, in float32.

    `encoded` holds the matrices that a number format has replaced, by parameter name (the key in
    `model.state_dict()`); the module keeps the float32 master. `ranges` are the calibrated ranges (low, high) of the
    inputs of those that quantize them statically, by the same names. `vocabulary` says which of the teacher's tokens
    the model has, None for all. The teacher is a Student too.
    """

    model: PreTrainedModel
    shape: ModelShape
    encoded: Mapping[str, Encoded] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None


@dataclass(frozen=True)
class Context:
    """What a technique may use besides the student. `memory` keeps what is computed once and reused by every
    trial of this process (the teacher's outputs, importances), by a name of the technique's own; `cache` is a folder
    that keeps such things across processes (it belongs to one teacher and one data set), the teacher's outputs up to
    `cache_limit` bytes. In a folder `trunks` is kept what longer runs of the same plan can go on from: what training
    begins with, and its checkpoints, unless this is the `last` one.

    `train` has labels throughout. Distillation trains on it and on `unlabelled`, as `augment` changes them for each
    epoch; what needs labels, or calibrates, looks at `train` alone. `tokenizer` made the ids of all of them, if there
    is one."""

    teacher: Student
    task: Task
    train: Split
    pad_id: int
    seed: int = 0
    device: str = "cpu"
    memory: dict[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    unlabelled: Split | None = None
    augment: Augment | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    cache_limit: int = CACHE_LIMIT
    trunks: Path | None = None
    last: bool = False

    def training_data(self) -> str:
        """Return the SHA-256 of what training is made of: the examples, and the user's own loss and augmentation."""
        digest = fingerprint([split for split in (self.train, self.unlabelled) if split is not None])
        task = getattr(self.task, "identity", "")
        if not task and not type(self.task).__module__.startswith("autolite."):  # a plug-in's may change
            task = identity_of(type(self.task))
        own = [task, identity_of(self.augment)]
        return hashlib.sha256(" ".join((digest, *own)).encode()).hexdigest() if any(own) else digest

    def read_by(self, student: Student) -> Context:
        """Return the context with the training split in the student's own ids: for what runs only the student on it.
        The teacher cannot read that one."""
        vocabulary = student.vocabulary
        if vocabulary is None:
            return self
        train = replace(self.train, input_ids=[vocabulary.translate(ids) for ids in self.train.input_ids])
        return replace(self, train=train, pad_id=vocabulary.new_ids[self.pad_id])


class Technique(Protocol):
    """One file, one registry line. Instances are stateless.

    `numeric` techniques change number formats only: a student made without them serves all their settings.
    `effort` names the integer field of the config that says how much training is done (None: no training).
    One that trains after a numeric one trains for its formats: what comes of it serves these formats alone and is kept
    by the whole plan up to there, while the student before the formats is kept and serves them all as ever. Such a
    technique is not numeric (its weights change), must carry `Student.encoded` over to its new weights, and resolves
    to a config without training where the formats leave nothing to recover.
    `needs_map` techniques change parts that only the architecture map knows; models that it does not have can be
    compressed by the others.
    """

    name: ClassVar[str]
    Config: ClassVar[type[plan.Config]]
    numeric: ClassVar[bool]
    effort: ClassVar[str | None]
    needs_map: ClassVar[bool]

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` with what depends on the teacher's weights or data (a global budget, an average number of
        bits) replaced by what it comes to for a model of `shape`; a resolved one is returned as it is."""
        ...

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape after this step, without weights, for a resolved config. Raises PlanError where it cannot
        be applied."""
        ...

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the compressed student; the one given and the teacher stay untouched."""
        ...


Part = Literal["attention", "ffn"]
PARTS: tuple[Part, ...] = ("attention", "ffn")


@runtime_checkable
class Layered(Protocol):
    """A technique of which some settings can have another level in each layer: `layered` maps these to the part of the
    layers that they change."""

    layered: ClassVar[Mapping[str, Part]]

    def damage(self, setting: str, levels: Sequence[Any], context: Context) -> list[list[float]]:
        """Return by how many nats the loss is estimated to rise, nothing trained, if one layer of the teacher has this
        setting at one of `levels`: for each level, one number a layer."""
        ...


def require_map(technique: str, shape: ModelShape) -> None:
    """Refuse a model whose parts `technique` cannot find.

    Raises:
        PlanError: if the architecture map does not have the model.
    """
    if shape.unmapped is not None:
        raise PlanError(
            f"{technique} needs the architecture map, which does not have this '{shape.family}' model: leave it out; "
            "number formats and distillation work without"
        )


def require_float32(technique: str, shape: ModelShape) -> None:
    """Refuse a model whose matrices are in a number format already, which `technique` would leave behind.

    Raises:
        PlanError: naming the formats.
    """
    strange = sorted(shape.formats - {"fp32"})
    if strange:
        raise PlanError(
            f"{technique} works on fp32 weights, but some are {', '.join(strange)} already; put it before quantize"
        )


def weights_digest(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of every parameter's name, shape and bytes, and of the depth, which
    repeated layers (ALBERT) have none of."""
    digest = hashlib.sha256(str(getattr(model.config, "num_hidden_layers", "")).encode())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
