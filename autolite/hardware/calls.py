"""Calls of models as sums of microseconds, by what governs them: passes, each in the way that makes it fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autolite.architecture import ModelShape
from autolite.hardware.blocks import Call, Role, block_of
from autolite.hardware.pieces import Around, FeedForward, Pieces, is_pooled
from autolite.hardware.roofline import Speeds, Table
from autolite.hardware.segments import Array, Bools, Ints, distinct, sums_by
from autolite.hardware.ways import Ways, ways_of
from autolite.measure import Workload


class Course(NamedTuple):
    """What a call of a model consists of.

    Attributes:
        passes: over the prompt, and for language models for one token more: by the second stack, if there are two; over
            all before it once more, without a cache.
        counts: how often each is made.
        shortened: whether only the first position is read, so that the last layer computes all but keys and values
            there alone.
    """

    passes: tuple[Call, ...]
    counts: tuple[int, ...]
    shortened: bool = False

    @property
    def has_two_stacks(self) -> bool:
        """Whether a second stack makes the steps."""
        return self.passes[-1].source > 0


def generates(shape: ModelShape) -> bool:
    """Whether calls of a model can go on with further tokens, one a step."""
    return len(shape.stacks) > 1 or (shape.stacks[-1].causal and shape.outputs == shape.vocab)


def course_of(shape: ModelShape, workload: Workload) -> Course:
    """Return what a call consists of."""
    batch, tokens, generated = workload.batch, workload.tokens, workload.generated
    prompt, last = Call(batch, tokens, tokens), shape.stacks[-1]
    if len(shape.stacks) > 1:
        return Course((prompt, Call(batch, 1, 1 + generated // 2, source=tokens)), (1, generated))
    if generates(shape) and shape.unmapped is not None:  # without a cache: everything is read again for each token
        again = tokens + generated // 2
        return Course((prompt, Call(batch, again, again)), (1, generated))
    if generates(shape):
        return Course((prompt, Call(batch, 1, tokens + generated // 2)), (1, generated))
    once = last.causal or tokens == 1 or not last.layers
    return Course((prompt,), (1,), not once and is_pooled(shape))


@dataclass(frozen=True, eq=False, slots=True)
class Calls:
    """Calls of one course.

    Attributes:
        parts: microseconds of each pass, by the keys of `Speeds` [passes, models, keys].
        counts: how often each is made [passes].
        read: bytes of all matrices that the runtime reads [models].
    """

    parts: Array
    counts: Array
    read: Array

    @property
    def totals(self) -> Array:
        """Microseconds of the whole calls [models, keys]."""
        found: Array = (self.counts[:, None, None] * self.parts).sum(0)
        return found


def calls_of(pieces: Pieces, course: Course, speeds: Speeds) -> Calls:
    """Price calls; each pass takes the kernels that make it fastest.

    A pass of a way is a line: all ways of the first pass, then all of the second.

    Args:
        pieces: of models with this course.
        course: of their calls.
        speeds: of the target.

    Raises:
        TargetError: if the target cannot run one of their number formats.
    """
    ways = ways_of(pieces, speeds)
    jobs = jobs_of(pieces, ways, course)
    passes, count = len(course.passes), len(ways.models)
    lines = jobs.passes * count + ways.owners[jobs.uses]
    missing = _missing(pieces, ways, course, speeds)[lines]
    table, blocks = _table_of(ways, jobs, course, speeds)
    models = len(pieces.counts)
    if count == models and not jobs.either.size:  # there is nothing to choose
        made = np.arange(passes * count)
    else:
        times = table.totals(blocks, missing)
        kept = _without_slower(times, jobs)
        made = _fastest(sums_by(lines[kept], times[kept], passes * count).reshape(passes, count), ways)
        kept &= made[lines] >= 0
        lines, missing, blocks = lines[kept], missing[kept], blocks[kept]
    parts = table.parts(blocks, missing, made[lines], passes * models)
    first, last = (ways.computed[(each >= 0)[ways.owners]] for each in made.reshape(passes, count)[[0, -1]])
    counts = np.array(course.counts, np.float64)
    return Calls(parts.reshape(passes, models, -1), counts, _kept_in_memory(pieces, ways, first, last))


class Jobs(NamedTuple):
    """What is computed in a call, for each way to make it.

    Attributes:
        passes: the pass of the course that each job is in [jobs].
        uses: of which use in the `Ways` it is [jobs].
        roles: what of the piece is needed [jobs].
        either: pairs of jobs of which one will do [2, pairs].
    """

    passes: Ints
    uses: Ints
    roles: Ints
    either: Ints


def jobs_of(pieces: Pieces, ways: Ways, course: Course) -> Jobs:
    """Return what is computed in calls of models with this course."""
    uses, none = np.arange(len(ways.owners)), np.zeros((2, 0), np.int64)
    if course.has_two_stacks:
        written = pieces.written[ways.places]
        ffn = np.array([isinstance(piece, FeedForward) for piece in pieces.distinct])[pieces.used][ways.places]
        reading, writing = np.flatnonzero(~(written & ffn)), np.flatnonzero(written)
        roles = np.full(len(reading) + len(writing), Role.WHOLE)
        roles[: len(reading)][written[reading]] = Role.PREPARED
        passes = (np.arange(len(roles)) >= len(reading)).astype(np.int64)
        return Jobs(passes, np.concatenate([reading, writing]), roles, none)
    if course.shortened:
        ends = pieces.counts[ways.models].cumsum()
        roles = np.full(len(uses) + len(ends), Role.WHOLE)
        roles[ends - 1] = roles[ends - 2] = Role.LAST
        roles[len(uses) :] = Role.ABSORBED
        either = np.array([ends - 2, np.arange(len(uses), len(roles))])
        return Jobs(np.zeros_like(roles), np.concatenate([uses, ends - 2]), roles, either)
    count = len(course.passes)
    passes = np.repeat(np.arange(count), len(uses))
    roles = np.full(len(passes), Role.WHOLE)
    # Who generates with a cache needs the logits after the prompt, not those of all its tokens.
    if course.counts[-1] and course.passes[-1].tokens == 1 and count > 1:
        around = np.array([isinstance(piece, Around) for piece in pieces.distinct])[pieces.used][ways.places]
        roles[: len(uses)][around] = Role.LAST
    return Jobs(passes, np.tile(uses, count), roles, none)


def _missing(pieces: Pieces, ways: Ways, course: Course, speeds: Speeds) -> Array:
    """The part of the weights that is not in the cache when they are needed again [lines]. They are used in the same
    order in every call, so that a cache too small for all of them keeps few."""
    own, shared = np.array([(each.reads.own, each.reads.shared) for each in ways.distinct], np.float64).T
    nbytes = own[ways.computed] + pieces.first[ways.places] * shared[ways.computed]
    weights = [sums_by(ways.owners, nbytes, len(ways.models))] * len(course.passes)
    if course.has_two_stacks:
        nbytes = nbytes * pieces.written[ways.places]
        weights[1] = sums_by(ways.owners, nbytes, len(ways.models))
    return np.clip(np.concatenate(weights) / speeds.cache_size - 1.0, 0.0, 1.0)


def _table_of(ways: Ways, jobs: Jobs, course: Course, speeds: Speeds) -> tuple[Table, Ints]:
    """The distinct blocks of jobs, and which one each job is [jobs]."""
    size = len(ways.distinct)
    numbers = (jobs.passes * len(Role) + jobs.roles) * size + ways.computed[jobs.uses]
    some, which = distinct(numbers)
    blocks = []
    for number in numbers[some].tolist():
        kind, place = divmod(number, size)
        passed, role = divmod(kind, len(Role))
        blocks.append(block_of(ways.distinct[place], course.passes[passed], role))
    return Table.of(speeds, blocks), which


def _without_slower(times: Array, jobs: Jobs) -> Bools:
    """All jobs but the slower ones of pairs of which one will do [jobs]."""
    kept = np.ones(len(times), np.bool_)
    plain, other = jobs.either
    kept[np.where(times[other] < times[plain], plain, other)] = False
    return kept


def _fastest(times: Array, ways: Ways) -> Ints:
    """Number the fastest way of each pass of each model, by their times [passes, ways]; others are -1 [lines]."""
    best = np.array([np.lexsort((each, ways.models))[ways.starts] for each in times])
    found = np.full(times.size, -1)
    found[(best + times.shape[1] * np.arange(len(times))[:, None]).ravel()] = np.arange(best.size)
    return found


def _kept_in_memory(pieces: Pieces, ways: Ways, first: Ints, last: Ints) -> Array:
    """Bytes of all matrices that the runtime reads [models], if the first and the last pass compute pieces as these of
    the `Ways` [uses] each. A matrix that they read in two forms is kept in both, and for each of its uses: a shared one
    takes less of the file, but ONNX Runtime packs it for every product."""
    some, pairs = distinct(first * len(ways.distinct) + last)
    nbytes = []
    for pair in zip(first[some].tolist(), last[some].tolist(), strict=True):
        forms = zip(*(ways.distinct[place].reads.each for place in pair), strict=True)
        nbytes.append(sum(sum(set(each)) for each in forms))
    found: Array = np.add.reduceat(np.array(nbytes, np.float64)[pairs], pieces.starts)
    return found
