"""Embedding compression: fewer tokens, and a table that is a product of two thin factors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from autolite import plan
from autolite.architecture import ModelShape
from autolite.errors import PlanError
from autolite.families import FAMILIES, family_of
from autolite.parts import embeddings_of
from autolite.surgery import clone, factor_embedding, keep_tokens
from autolite.tasks.encoding import fingerprint
from autolite.techniques.base import Context, Student, require_float32, require_map
from autolite.vocabulary import choose, content_of, special_ids, vocabulary_of


class EmbeddingConfig(plan.Config):
    """Settings of embedding compression.

    Attributes:
        rank: width of the table that is stored, as a fraction of the width it has, or above 1 as a number; rounded to
            the nearest number, at least 1. With 1 the table stays whole.
        vocabulary: tokens that stay, as a fraction of those there are, or above 1 as a number; 1 is all. "used" are
            those that occur in the training split `min_count` times. Special tokens, single characters and what the
            tokenizer makes others from stay in any case; the rest goes by its frequency in the training split.
        min_count: how often a token must occur there to be "used".
        weighting: what an error in a token's row counts in the factors: its "frequency", or in all rows the same
            ("none").
    """

    rank: float = Field(1.0, gt=0)
    vocabulary: float | Literal["used"] = 1.0
    min_count: int = Field(1, ge=1)
    weighting: Literal["frequency", "none"] = "frequency"

    @field_validator("vocabulary")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not value > 0:
            raise ValueError('is no number of tokens; give a fraction, a number above 1, or "used"')
        return value


def factors(table: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [tokens, rank] and P [rank, width] with the least sum over tokens of weight * |row - (A P) row|^2.

    With S the diagonal of the weights, that is by Eckart & Young 1936 the truncated SVD of S^(1/2) table = U D V^T: P
    is the first rows of V^T. They are orthonormal, so that each row's best coefficients are its products with them:
    A = table P^T, whatever its weight. V are the eigenvectors of table^T S table [width, width], in float64.
    """
    rows = table.double()
    _, vectors = torch.linalg.eigh(rows.T @ (weights.double()[:, None] * rows))
    basis = vectors.flip(1)[:, :rank]
    return (rows @ basis).to(table.dtype), basis.T.contiguous().to(table.dtype)


class Embedding:
    """Tokens go first; then what is left of the table is factored."""

    name: ClassVar[str] = "embedding"
    Config: ClassVar[type[plan.Config]] = EmbeddingConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = True

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` with the number of tokens that stay, and without what then has no effect.

        Raises:
            PlanError: if they are fewer than the tokenizer needs, or it cannot be rewritten.
        """
        assert isinstance(config, EmbeddingConfig)
        if config.rank == 1:
            config = config.model_copy(update={"weighting": "frequency"})
        if config.vocabulary != "used":
            config = config.model_copy(update={"min_count": 1})
        if config.vocabulary == 1:
            return config
        _check_words(shape)
        _check_tokens(shape)
        if config.vocabulary == "used":
            kept = _kept(context, shape, None, config.min_count)
            config = config.model_copy(update={"min_count": 1})
        elif (count := _nearest(config.vocabulary, shape.vocab)) < shape.vocab:
            kept = _kept(context, shape, count, 1)
        else:
            return config.model_copy(update={"vocabulary": 1.0})
        return config.model_copy(update={"vocabulary": float(len(kept)) if len(kept) < shape.vocab else 1.0})

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape with a smaller table.

        Raises:
            PlanError: if matrices are already in a number format, the model has no words, its vocabulary is what it
                predicts, or its table is in factors already.
        """
        assert isinstance(config, EmbeddingConfig)
        require_float32(self.name, shape)
        if config.rank == 1 and config.vocabulary == 1:
            return shape
        require_map(self.name, shape)
        _check_words(shape)
        if config.vocabulary != 1:
            if config.vocabulary == "used":
                raise PlanError("embedding.vocabulary: which tokens are used shows the data; resolve the plan first")
            _check_tokens(shape)
            shape = replace(shape, vocab=min(shape.vocab, _nearest(config.vocabulary, shape.vocab)))
        if config.rank != 1 and (rank := _nearest(config.rank, shape.embedding)) < shape.embedding:
            if shape.embedding_rank:
                raise PlanError(
                    f"embedding.rank: the table is a product of factors of rank {shape.embedding_rank} already; set it "
                    "to 1, or the first to what the second should be"
                )
            shape = replace(shape, embedding_rank=rank)
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return a copy of the student with the smaller table.

        Raises:
            PlanError: as `shape`, or if the student's vocabulary was cut before.
        """
        assert isinstance(config, EmbeddingConfig)
        shape = self.shape(student.shape, config)
        if shape == student.shape:
            return student
        model, vocabulary = clone(student.model), student.vocabulary
        counts = _counts(context, student.shape.vocab) if vocabulary is None else None
        if shape.vocab < student.shape.vocab:
            if counts is None:
                raise PlanError("embedding.vocabulary: this student's vocabulary is cut already; cut it once")
            kept = _kept(context, student.shape, shape.vocab, 1)
            vocabulary = vocabulary_of(content_of(context.tokenizer), kept, student.shape.vocab)
            keep_tokens(model, kept)
            counts = counts[list(kept)]
        if shape.embedding_rank > student.shape.embedding_rank:
            if counts is None:
                counts = _counts(context.read_by(student), shape.vocab)
            word = embeddings_of(model).word
            assert word is not None
            table = word.weight.detach()
            weights = _weights(counts) if config.weighting == "frequency" else torch.ones(len(table))
            factor_embedding(model, *factors(table, weights, shape.embedding_rank), tied=shape.tied)
        return replace(student, model=model, shape=shape, vocabulary=vocabulary)


def _nearest(value: float, size: int) -> int:
    """A fraction of `size`, or above 1 the number itself."""
    return max(1, math.floor((value * size if value <= 1 else value) + 0.5))


def _counts(context: Context, tokens: int) -> np.ndarray:
    """How often each id occurs in the training split."""
    rows = [np.zeros(0, np.int64), *context.train.input_ids]
    return np.bincount(np.concatenate(rows), minlength=tokens)


def _weights(counts: np.ndarray) -> torch.Tensor:
    """Frequencies plus a hundredth of their mean, which is what a token counts that never occurs: rows of words that
    the corpus lacks keep some sense."""
    return torch.from_numpy(counts + max(1.0, float(counts.mean())) / 100)


def _kept(context: Context, shape: ModelShape, count: int | None, least: int) -> list[int]:
    key = f"vocabulary-{fingerprint([context.train])}-{shape.vocab}-{count}-{least}"
    if key not in context.memory:
        context.memory[key] = _chosen(context, shape, count, least)
    found: list[int] = context.memory[key]
    return found


def _chosen(context: Context, shape: ModelShape, count: int | None, least: int) -> list[int]:
    config = context.teacher.model.config
    always = {context.pad_id, *special_ids(config.to_dict())}
    if family_of(config).positions_after_padding:  # positions count from the id of padding, which must stay
        always |= set(range(context.pad_id + 1))
    return choose(content_of(context.tokenizer), _counts(context, shape.vocab), count, least, always)


def _check_words(shape: ModelShape) -> None:
    if not shape.vocab:
        raise PlanError(f"embedding: a {shape.family} model has no table of words to compress; leave it out")


def _check_tokens(shape: ModelShape) -> None:
    if shape.unmapped is None and FAMILIES[shape.family].causal and shape.outputs == shape.vocab:
        raise PlanError(
            "embedding.vocabulary: a language model's perplexity with fewer tokens is of other tokens, which does not "
            "compare with the teacher's; set it to 1. The rank can be reduced"
        )
