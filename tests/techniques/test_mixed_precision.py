"""Mixed precision: the allocation is exact, and sensitivities are what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolite import contracts, formats
from autolite.architecture import shape_of
from autolite.errors import PlanError
from autolite.parts import layers_of
from autolite.products import matmuls
from autolite.surgery import clone, keep_layers
from autolite.techniques.base import Context, Student
from autolite.techniques.mixed_precision import UNITS, allocate, blocks_of, knapsack, origins, sensitivities
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.techniques.share import Share, ShareConfig
from autolite.techniques.teacher import to_tensors
from autolite.testing import tiny_model

LEVELS = ("kmeans4", "int4", "int8", "bf16")
ROWS = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=width, max_size=width),
        min_size=1,
        max_size=5,
    )
)


def context_of(family: str = "bert") -> Context:
    return contracts.tiny_context(family, contracts.tiny_task(family))


@given(ROWS, st.floats(0, 1))
def test_no_choice_within_the_budget_is_better(rows: list[list[tuple[int, float]]], part: float) -> None:
    costs = [[cost for cost, _ in row] for row in rows]
    errors = [[error for _, error in row] for row in rows]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = round(least + part * (most - least))
    chosen = knapsack(costs, errors, budget)
    every = [
        list(zip(*row, strict=True))
        for row in itertools.product(*(zip(c, e, strict=True) for c, e in zip(costs, errors, strict=True)))
    ]
    best = min(sum(e) for c, e in every if sum(c) <= budget)
    assert sum(row[i] for row, i in zip(costs, chosen, strict=True)) <= budget
    assert sum(row[i] for row, i in zip(errors, chosen, strict=True)) == pytest.approx(best, abs=1e-9)


def test_a_large_budget_is_kept_and_used() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(10**5, 10**7, (48, 6), generator=generator).tolist()
    errors = torch.rand(48, 6, generator=generator).sort(1, descending=True).values.tolist()
    costs = [sorted(row) for row in costs]
    budget = sum(row[2] for row in costs)
    chosen = knapsack(costs, errors, budget)
    spent = sum(row[i] for row, i in zip(costs, chosen, strict=True))
    assert budget * (1 - 60 / UNITS) < spent <= budget


@pytest.mark.parametrize("family", contracts.FAMILIES)
@pytest.mark.parametrize("bits", [6.0, 9.5])
def test_the_bytes_stored_are_within_the_average(family: str, bits: float) -> None:
    context = context_of(family)
    config = Quantize().resolve(context.teacher.shape, QuantizeConfig(average_bits=bits, levels=LEVELS), context)
    shape = Quantize().shape(context.teacher.shape, config)
    student = Quantize().apply(context.teacher, config, context)
    found = [(e.nbytes, e.shape[0] * e.shape[1]) for e in student.encoded.values()]
    assert 8 * sum(size for size, _ in found) / sum(weights for _, weights in found) <= bits
    products = {p.weights: p for p in matmuls(shape) if p.part in ("attention", "ffn")}.values()
    assert sum(size for size, _ in found) == sum(formats.nbytes(p.format, p.n, p.k) for p in products)
    more = allocate(context.teacher.shape, 16.5, LEVELS, context)
    assert {form for part in more.values() for form in part} == {"bf16"}, "with room for all, the finest everywhere"


def test_sensitivity_is_the_mean_of_fisher_times_squared_error() -> None:
    context = context_of()
    found = sensitivities(context, ["int4"])
    model = context.teacher.model
    matrices = layers_of(model)[1].ffn_matrices
    squares = [torch.zeros_like(m.weight) for m in matrices]
    for batch in context.task.batches(context.train, 1, context.pad_id):
        model.zero_grad()
        inputs, labels = to_tensors(batch, "cpu")
        context.task.loss(model(**inputs).logits, labels).backward()  # type: ignore[no-untyped-call]
        for total, matrix in zip(squares, matrices, strict=True):
            gradient = model.get_parameter(matrix.key).grad
            assert gradient is not None
            total += gradient.square() / len(context.train)
    expected = sum(
        float((s * (formats.decode(formats.encode(m.weight, "int4")) - m.weight.detach()).square()).sum())
        for s, m in zip(squares, matrices, strict=True)
    ) / sum(m.weight.numel() for m in matrices)
    assert found["ffn", "int4"][1] == pytest.approx(expected, rel=1e-3)


def test_layers_that_matter_more_get_more_bits() -> None:
    context = context_of()
    with torch.no_grad():  # what the last layers say hardly reaches the output
        for layer in layers_of(context.teacher.model)[1:]:
            layer.attention_norm.weight.fill_(1)
            layer.ffn_norm.weight.fill_(1)
            for matrix in (layer.out, layer.ffn_out):
                matrix.weight.mul_(0.01)
    found = allocate(context.teacher.shape, 6.4, ("int4", "int8"), context)
    assert found["attention"][0] == found["ffn"][0] == "int8"
    assert found["attention"][2] == found["ffn"][2] == "int4"


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_it_works_after_sharing_and_pruning(family: str) -> None:
    context = context_of(family)
    shape = context.teacher.shape
    shape = Share().shape(shape, ShareConfig(part="attention", groups=2))
    shape = Prune().shape(shape, PruneConfig(depth=0.7, ffn=0.5, round_to=8))
    config = Quantize().resolve(shape, QuantizeConfig(average_bits=6.5), context)
    after = Quantize().shape(shape, config)
    weights = sum(block.weights for block in blocks_of(shape))
    products = {p.weights: p for p in matmuls(after) if p.part in ("attention", "ffn")}.values()
    assert sum(formats.nbytes(p.format, p.n, p.k) for p in products) * 8 <= 6.5 * weights
    assert weights == sum(p.n * p.k for p in products)


def test_the_sweep_is_made_once() -> None:
    context = context_of()
    allocate(context.teacher.shape, 6.5, ("int4", "int8"), context)
    known = dict(context.memory)
    broken = replace(context, task=None)  # type: ignore[arg-type]
    assert allocate(context.teacher.shape, 6.0, ("int4", "int8"), broken)
    assert set(context.memory) == set(known)


def test_what_cannot_be_kept_is_refused() -> None:
    context = context_of()
    with pytest.raises(PlanError, match=r"4 bits a weight are asked for, but the smallest of levels int4, int8 need 5"):
        Quantize().resolve(context.teacher.shape, QuantizeConfig(average_bits=4), context)
    shape = shape_of(tiny_model("electra", embedding_size=32, intermediate_size=64))
    with pytest.raises(PlanError, match="average_bits needs the architecture map"):
        Quantize().resolve(shape, QuantizeConfig(average_bits=6), context)


def test_a_teacher_that_lost_layers_is_allocated_over_those_it_has() -> None:
    context = context_of()
    model = clone(context.teacher.model)
    keep_layers(model, [0, 2])
    shorter = replace(context, teacher=Student(model, shape_of(model)), memory={})
    found = allocate(shorter.teacher.shape, 6.5, LEVELS, shorter)
    assert {part: len(formats) for part, formats in found.items()} == {"attention": 2, "ffn": 2}


def test_a_level_that_is_named_twice_counts_once() -> None:
    context = context_of()
    twice = sensitivities(context, ("int4", "int4", "int8"))
    assert {len(found) for found in twice.values()} == {3}
    assert Quantize().damage("ffn", ("int4", "int4"), context)[0] == Quantize().damage("ffn", ("int4",), context)[0]


def test_what_a_teacher_shares_counts_once() -> None:
    context = context_of()
    tied = Share().apply(context.teacher, ShareConfig(part="ffn", groups=2), context)
    (first, second) = sorted({layer.feed_forward for layer in tied.shape.stacks[0].layers})
    blocks = [block for block in blocks_of(tied.shape) if block.part == "ffn"]
    assert [origins(block, tied.shape) for block in blocks] == [[first], [second]]
    assert [origins(block, context.teacher.shape) for block in blocks] == [list(block.layers) for block in blocks]
