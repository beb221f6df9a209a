"""Models in all ways that a target can compute them: each choice of a kernel class for each of their number formats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autolite.errors import TargetError
from autolite.hardware.footprint import Computed, computed_by
from autolite.hardware.pieces import Pieces
from autolite.hardware.roofline import Speeds
from autolite.hardware.segments import Bools, Ints, distinct, segments, starts_of


@dataclass(frozen=True, eq=False, slots=True)
class Ways:
    """Ways to compute models, all of one model one after the other.

    Attributes:
        models: which model each is of [ways].
        starts: the first of each model [models].
        owners: the way that each use of a piece is in [uses]; a way has the uses that its model has, in order.
        places: of each use in the model's `Pieces` [uses].
        distinct: pieces and how they are computed.
        computed: which of `distinct` each use is [uses].
    """

    models: Ints
    starts: Ints
    owners: Ints
    places: Ints
    distinct: list[Computed]
    computed: Ints


def ways_of(pieces: Pieces, speeds: Speeds) -> Ways:
    """Find all ways to compute models.

    Raises:
        TargetError: if the target cannot run one of their number formats.
    """
    forms = [piece.forms for piece in pieces.distinct]
    used = {form for each in forms for form in each}
    for form in sorted(used - speeds.formats.keys()):
        known = ", ".join(speeds.formats)
        raise TargetError(f"the target cannot run the number format '{form}'; it runs {known}")
    several = [form for form in speeds.formats if form in used and len(speeds.formats[form]) > 1]
    kernels = [len(speeds.formats[form]) for form in several]
    bases, size = _bases([[form in each for form in several] for each in forms], kernels)
    choices, first, counts = _choices(np.maximum.reduceat(bases[pieces.used], pieces.starts) > 0, kernels)
    models, chosen = segments(first, counts)
    owners, places = segments(pieces.starts[models], pieces.counts[models])
    piece, choice = pieces.used[places], chosen[owners]
    some, computed = distinct(piece * size + (bases[piece] * choices[choice]).sum(1))
    columns = {form: column for column, form in enumerate(several)}
    found = []
    for place, picks in zip(piece[some].tolist(), choices[choice[some]].tolist(), strict=True):
        taken = [speeds.formats[form][picks[columns[form]] if form in columns else 0] for form in forms[place]]
        one = pieces.distinct[place]
        found.append(computed_by(one, tuple(taken), speeds.sparsity.get(one.sparsity, 1.0)))
    return Ways(models, starts_of(counts), owners, places, found, computed)


def _bases(has: Sequence[Sequence[bool]], kernels: Sequence[int]) -> tuple[Ints, int]:
    """Of a piece only the kernels for the formats that it has itself make a difference: they are the digits of a number
    of mixed bases. Returns what each digit is multiplied by, 0 for the others [pieces, formats], and what all these
    numbers are below."""
    found, size = [], 1
    for each in has:
        base, row = 1, []
        for mine, count in zip(each, kernels, strict=True):
            row.append(base if mine else 0)
            base *= count if mine else 1
        found.append(row)
        size = max(size, base)
    return np.array(found, np.int64), size


def _choices(has: Bools, kernels: Sequence[int]) -> tuple[Ints, Ints, Ints]:
    """Every choice of one of so many kernels of formats [formats], for models that have some of them [models, formats].

    Returns which kernel of each format a choice takes [choices, formats], and of each model its first choice and how
    many it has [models] each.
    """
    index: dict[tuple[bool, ...], int] = {}
    which = np.array([index.setdefault(tuple(each), len(index)) for each in has.tolist()], np.int64)
    every = [
        list(itertools.product(*(range(count if mine else 1) for mine, count in zip(each, kernels, strict=True))))
        for each in index
    ]
    counts = np.array([len(each) for each in every], np.int64)
    choices = np.array([choice for each in every for choice in each], np.int64)
    return choices.reshape(counts.sum(), len(kernels)), starts_of(counts)[which], counts[which]
