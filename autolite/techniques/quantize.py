"""Quantization: a number format for each part of the model, and how its matrices are brought into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, field_validator

from autolite import plan
from autolite.architecture import ModelShape, factor_format
from autolite.errors import PlanError
from autolite.formats import FORMATS
from autolite.parts import layers_of, matrices_of, with_factors
from autolite.techniques.base import PARTS, Context, Part, Student
from autolite.techniques.calibrate import Method, input_ranges
from autolite.techniques.mixed_precision import allocate, blocks_of, sensitivities
from autolite.techniques.rounding import Rounding, rounded
from autolite.techniques.scaling import Scaling, scaled

ByLayer = str | tuple[str, ...]


class QuantizeConfig(plan.Config):
    """Which number formats, and how matrices are brought into them. Thin factors beside a matrix are in its format's
    `factor_format`.

    Attributes:
        attention: of the layers' attention projections: one format, or one for each layer.
        ffn: of the layers' feed-forward matrices: one format, or one for each layer.
        embedding: of the tables that are looked up, of tokens and of learned positions, and of ALBERT's projection. Of
            a model without an architecture map, of the tokens' alone.
        head: of the head, with the pooler before it; one tied to the embedding follows the embedding.
        average_bits: stored bits a weight, scales included, that the layers may have on average; 0: `attention` and
            `ffn` say which. Else each layer's are chosen among `levels` (`autolite.techniques.mixed_precision`).
        levels: format names; in a search space's choices one text ("int4,int8").
        rounding: "nearest", "weighted", "gptq" or "hqq" (`autolite.techniques.rounding`).
        order: whether "gptq" starts with the columns of the largest inputs.
        scaling: "none", "awq" or "smooth" (`autolite.techniques.scaling`), of channels before rounding.
        calibration: what static ranges of activations are fitted by: "minmax", "percentile", "mse" or "entropy"
            (`autolite.techniques.calibrate`).
    """

    attention: ByLayer = "fp32"
    ffn: ByLayer = "fp32"
    embedding: str = "fp32"
    head: str = "fp32"
    average_bits: float = Field(0.0, ge=0, le=32)
    levels: tuple[str, ...] = ("int4", "int8")
    rounding: Rounding = "nearest"
    order: bool = True
    scaling: Scaling = "none"
    calibration: Method = "mse"

    @field_validator("levels", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        return tuple(part.strip() for part in names.split(",")) if isinstance(names, str) else names

    @field_validator("attention", "ffn", "head", "levels")
    @classmethod
    def _known(cls, names: ByLayer) -> ByLayer:
        for name in [names] if isinstance(names, str) else names:
            if name not in FORMATS:
                raise ValueError(f"is no number format; use one of {', '.join(FORMATS)}")
        if not names:
            raise ValueError("is empty; give at least one number format")
        return names

    @field_validator("embedding")
    @classmethod
    def _looked_up(cls, name: str) -> str:
        fit = [f.name for f in FORMATS.values() if f.embedding]
        if name not in fit:
            raise ValueError(f"is no number format that rows can be looked up in; use one of {', '.join(fit)}")
        return name


class Quantize:
    """Sets number formats. The float32 masters of the student stay as they are, but for scaling of channels, which
    leaves its function. Static formats are calibrated."""

    name: ClassVar[str] = "quantize"
    Config: ClassVar[type[plan.Config]] = QuantizeConfig
    numeric: ClassVar[bool] = True
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = False
    layered: ClassVar[Mapping[str, Part]] = {part: part for part in PARTS}

    def damage(self, setting: str, levels: Sequence[Any], context: Context) -> list[list[float]]:
        """Return half of the Fisher information times the squared rounding error, in nats: for each format, one number
        a layer (`autolite.techniques.mixed_precision.sensitivities`)."""
        part = self.layered[setting]
        found = sensitivities(context, levels)
        weights = {
            layer: block.weights
            for block in blocks_of(context.teacher.shape)
            if block.part == part
            for layer in block.layers
        }
        return [[0.5 * each * weights[i] for i, each in enumerate(found[part, level])] for level in levels]

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` with formats in the place of `average_bits`, and without what has no effect on them.

        Raises:
            PlanError: if they cannot be kept, or the architecture map does not have the model.
        """
        assert isinstance(config, QuantizeConfig)
        settings: dict[str, Any] = config.model_dump()
        if config.average_bits:
            if shape.unmapped is not None:
                raise PlanError(
                    "quantize.average_bits needs the architecture map, which does not have this "
                    f"'{shape.family}' model: set attention and ffn instead"
                )
            found = allocate(shape, config.average_bits, config.levels, context)
            settings |= {part: by_layer[0] if len(set(by_layer)) == 1 else by_layer for part, by_layer in found.items()}
        settings |= {"average_bits": 0.0, "levels": QuantizeConfig().levels}
        activations = {FORMATS[name].activations for name in self.shape(shape, QuantizeConfig(**settings)).formats}
        if "static" not in activations:
            settings["calibration"] = "mse"
        if config.scaling == "smooth" and activations == {"float"}:
            settings["scaling"] = "none"
        if config.rounding != "gptq":
            settings["order"] = True
        return QuantizeConfig(**settings)

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape with these formats.

        Raises:
            PlanError: if a head that is tied to the embedding asks for another format, there are not as many formats as
                layers, layers that share weights disagree, scaling is asked for without an architecture map, hqq for a
                format with a codebook, or a format would lose the zeros of a sparse model.
        """
        assert isinstance(config, QuantizeConfig)
        if shape.unmapped is not None and config.scaling != "none":
            raise PlanError(
                f"quantize.scaling needs the architecture map, which does not have this '{shape.family}' model: "
                f"set it to none instead of {config.scaling}"
            )
        head = _head_format(config, shape.tied)
        try:
            shape = shape.with_formats(config.attention, config.ffn, config.embedding, head)
        except ValueError as error:
            raise PlanError(f"quantize.{error}") from None
        uneven = sorted(name for name in shape.formats if not FORMATS[name].linear)
        if config.rounding == "hqq" and uneven:
            raise PlanError(
                f"quantize.rounding: hqq fits scales of evenly spaced levels, which {', '.join(uneven)} has not; use "
                "gptq, weighted or nearest"
            )
        zeros = ", ".join(sorted(shape.sparsity))
        layers = [layer for stack in shape.stacks for layer in stack.layers]
        for name in {form for layer in layers for form in (layer.attention_format, layer.ffn_format)}:
            if shape.sparsity and not FORMATS[name].linear:
                raise PlanError(
                    f"quantize: {name} may have no exact zero, which the zeros of this model ({zeros}) must stay; use "
                    "a linear format"
                )
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the student with its matrices encoded; each stored matrix once, biases and norms not at all. Ranges of
        activations that the student has already stay, unless channels are scaled."""
        assert isinstance(config, QuantizeConfig)
        shape = self.shape(student.shape, config)
        matrices = matrices_of(student.model)
        wanted = {key: form for key, form in _formats_of(student, shape).items() if form != "fp32"}
        model = student.model
        if student.vocabulary is not None:
            context = context.read_by(student)
        if config.scaling != "none":
            model = scaled(model, wanted, config.scaling, context)
        replaced = {key for group in matrices.values() for key in group}  # a later step replaces an earlier one
        encoded = {key: found for key, found in student.encoded.items() if key not in replaced}
        encoded |= rounded(model, wanted, config.rounding, config.order, context)
        static = [key for key, found in encoded.items() if FORMATS[found.format].activations == "static"]
        ranges = {key: span for key, span in student.ranges.items() if key in static and model is student.model}
        if missing := [key for key in static if key not in ranges]:
            ranges |= input_ranges(model, missing, context, config.calibration)
        return replace(student, model=model, shape=shape, encoded=encoded, ranges=ranges)


def _formats_of(student: Student, shape: ModelShape) -> dict[str, str]:
    """Return the format that `shape` has for each of the student's matrices."""
    groups = matrices_of(student.model)
    by_group = {"embedding": shape.embedding_format, "head": shape.head_format}
    if shape.unmapped is not None:
        by_group |= {product.part: product.format for product in shape.unmapped.products}
    found = {key: by_group[group] for group, matrices in groups.items() if group in by_group for key in matrices}
    if shape.unmapped is None:
        layers = [layer for stack in shape.stacks for layer in stack.layers]
        for parts, layer in zip(layers_of(student.model), layers, strict=True):
            found |= {matrix.key: layer.attention_format for matrix in with_factors(parts.attention_matrices)}
            found |= {matrix.key: layer.ffn_format for matrix in with_factors(parts.ffn_matrices)}
    factors = {key for matrices in groups.values() for key, matrix in matrices.items() if matrix.factor}
    return {key: factor_format(form) if key in factors else form for key, form in found.items()}


def _head_format(config: QuantizeConfig, tied: bool) -> str:
    if tied and config.head not in ("fp32", config.embedding):
        raise PlanError(
            f"quantize: this model's head is its embedding (tied weights), so head={config.head} and "
            f"embedding={config.embedding} contradict each other; leave the head out or make them equal"
        )
    return config.embedding if tied else config.head
