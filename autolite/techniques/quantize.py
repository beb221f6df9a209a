"""Quantization: a number format for each group of matrices. Rounding is to nearest; masters stay in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import field_validator

from autolite import formats, plan
from autolite.architecture import ModelShape
from autolite.errors import PlanError
from autolite.formats import FORMATS, Encoded
from autolite.surgery import embeddings_of, head_of, layers_of
from autolite.techniques.base import Context, Student


class QuantizeConfig(plan.Config):
    """A format name for each group: attention projections, feed-forward matrices, the token embedding (with ALBERT's
    projection), and the head with the pooler before it. A head tied to the embedding follows the embedding."""

    attention: str = "fp32"
    ffn: str = "fp32"
    embedding: str = "fp32"
    head: str = "fp32"

    @field_validator("attention", "ffn", "head")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FORMATS:
            raise ValueError(f"is no number format; use one of {', '.join(FORMATS)}")
        return name

    @field_validator("embedding")
    @classmethod
    def _looked_up(cls, name: str) -> str:
        fit = [f.name for f in FORMATS.values() if f.embedding]
        if name not in fit:
            raise ValueError(f"is no number format that rows can be looked up in; use one of {', '.join(fit)}")
        return name


class Quantize:
    """Sets number formats; the student's weights themselves stay as they are."""

    name: ClassVar[str] = "quantize"
    Config: ClassVar[type[plan.Config]] = QuantizeConfig
    numeric: ClassVar[bool] = True
    effort: ClassVar[str | None] = None

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape with these formats.

        Raises:
            PlanError: if a head that is tied to the embedding asks for another format.
        """
        assert isinstance(config, QuantizeConfig)
        head = _head_format(config, shape.tied)
        for index, stack in enumerate(shape.stacks):
            layers = (replace(x, attention_format=config.attention, ffn_format=config.ffn) for x in stack.layers)
            shape = shape.with_layers(index, tuple(layers))
        return replace(shape, embedding_format=config.embedding, head_format=head)

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the student with its matrices encoded; each stored matrix once, biases and norms not at all."""
        assert isinstance(config, QuantizeConfig)
        wanted: dict[str, tuple[torch.Tensor, str]] = {}
        head, embeddings = head_of(student.model), embeddings_of(student.model)
        for layer in layers_of(student.model):
            wanted |= {m.key: (m.weight, config.attention) for m in layer.attention_matrices}
            wanted |= {m.key: (m.weight, config.ffn) for m in layer.ffn_matrices}
        wanted |= {m.key: (m.weight, _head_format(config, head.tied)) for m, _ in head.dense}
        for table in (embeddings.word, embeddings.projection):
            if table is not None:
                wanted[table.key] = (table.weight, config.embedding)
        encoded: dict[str, Encoded] = {
            key: formats.encode(weight, form) for key, (weight, form) in wanted.items() if form != "fp32"
        }
        kept = {key: value for key, value in student.encoded.items() if key not in wanted}
        return replace(student, shape=self.shape(student.shape, config), encoded={**kept, **encoded})


def _head_format(config: QuantizeConfig, tied: bool) -> str:
    if tied and config.head not in ("fp32", config.embedding):
        raise PlanError(
            f"quantize: this model's head is its embedding (tied weights), so head={config.head} and "
            f"embedding={config.embedding} contradict each other; leave the head out or make them equal"
        )
    return config.embedding if tied else config.head
