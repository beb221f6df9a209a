"""Quantization: a number format for each group of matrices. Rounding is to nearest; masters stay in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import field_validator

from autolite import formats, plan
from autolite.architecture import ModelShape
from autolite.errors import PlanError
from autolite.formats import FORMATS
from autolite.parts import matrices_of
from autolite.techniques.base import Context, Student
from autolite.techniques.calibrate import input_ranges


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
    """Sets number formats; the student's weights themselves stay as they are. Static formats are calibrated."""

    name: ClassVar[str] = "quantize"
    Config: ClassVar[type[plan.Config]] = QuantizeConfig
    numeric: ClassVar[bool] = True
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = False

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` itself: nothing in it depends on the teacher."""
        return config

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape with these formats.

        Raises:
            PlanError: if a head that is tied to the embedding asks for another format, or a format would lose the
                zeros of a sparse model.
        """
        assert isinstance(config, QuantizeConfig)
        for name in (config.attention, config.ffn):
            if shape.sparsity and not FORMATS[name].linear:
                raise PlanError(
                    f"quantize: {name} has no exact zero, which the {', '.join(sorted(shape.sparsity))} zeros of this "
                    "model must stay; use a linear format"
                )
        return shape.with_formats(config.attention, config.ffn, config.embedding, _head_format(config, shape.tied))

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the student with its matrices encoded; each stored matrix once, biases and norms not at all."""
        assert isinstance(config, QuantizeConfig)
        shape = self.shape(student.shape, config)
        wanted = {
            "attention": config.attention,
            "ffn": config.ffn,
            "embedding": shape.embedding_format,
            "head": shape.head_format,
        }
        encoded = dict(student.encoded)
        for group, matrices in matrices_of(student.model).items():
            for key, matrix in matrices.items():
                encoded.pop(key, None)  # a later step replaces an earlier one
                if wanted[group] != "fp32":
                    encoded[key] = formats.encode(matrix.weight, wanted[group])
        static = [key for key, found in encoded.items() if FORMATS[found.format].activations == "static"]
        ranges = {key: span for key, span in student.ranges.items() if key in static}
        missing = [key for key in static if key not in ranges]
        if missing:
            ranges |= input_ranges(student.model, missing, context)
        return replace(student, shape=shape, encoded=encoded, ranges=ranges)


def _head_format(config: QuantizeConfig, tied: bool) -> str:
    if tied and config.head not in ("fp32", config.embedding):
        raise PlanError(
            f"quantize: this model's head is its embedding (tied weights), so head={config.head} and "
            f"embedding={config.embedding} contradict each other; leave the head out or make them equal"
        )
    return config.embedding if tied else config.head
