"""The tabular benchmark: its table is what the ordinary path gives, and its methods play by its rules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autolite.compress import compress
from autolite.export import decoded
from autolite.files import sha256
from autolite.pareto import nondominated

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # whose files import each other by name
import tabular
import tabular_data


@pytest.fixture(scope="module")
def table() -> Any:
    return tabular.Table.load()


def test_the_table_belongs_to_the_model_beside_it(table: Any) -> None:
    assert table.note["model"] == sha256(tabular_data.FOLDER / "model.safetensors")
    assert [tuple(level) for level in table.note["levels"]] == list(tabular_data.LEVELS)
    assert table.loss.shape == table.correct.shape == (len(tabular_data.LEVELS),) * 6


def test_stored_losses_are_those_of_models_compressed_by_the_plan(table: Any) -> None:
    context, split = tabular_data.load_context()
    teacher = tabular_data.evaluate(context.teacher.model, split)
    assert teacher[0] == pytest.approx(table.note["teacher"]["loss"], abs=1e-4)
    for index in np.random.default_rng(0).choice(table.loss.size, 3, replace=False):
        choice = table.choices[index]
        student = compress(tabular_data.plan_of(choice, context.teacher.shape), context)
        loss, correct = tabular_data.evaluate(decoded(student), split)
        assert loss == pytest.approx(table.loss[tuple(choice)], abs=3e-4)  # half a unit, and another order of sums
        assert abs(correct - int(table.correct[tuple(choice)])) <= 2


def test_a_plan_costs_what_its_blocks_cost(table: Any) -> None:
    choice = np.array([0, 1, 2, 3, 4, 5])
    latency = table.note["latency_base"] + sum(table.latency[block, level] for block, level in enumerate(choice))
    size = table.note["bytes_base"] + sum(table.bytes[block, level] for block, level in enumerate(choice))
    assert table.objectives[table.index(choice), 1:] == pytest.approx([np.log(latency), np.log(size)])


@pytest.mark.parametrize("name", list(tabular.METHODS))
def test_a_method_evaluates_distinct_plans_within_its_budget_and_by_its_seed(name: str, table: Any) -> None:
    method = tabular.METHODS[name].method
    plans = method(table, np.random.default_rng(3), 20)
    assert plans == method(table, np.random.default_rng(3), 20)
    assert 0 < len(plans) == len(set(plans)) <= 20
    assert all(0 <= plan < table.loss.size for plan in plans)


def test_fifty_evaluations_of_the_corrected_sweep_find_more_than_a_thousand_at_random(table: Any) -> None:
    rng = np.random.default_rng
    assert table.volume(tabular.corrected_sweep(table, rng(0), 50)) > table.volume(tabular.random(table, rng(0), 1000))


def test_the_front_in_parts_is_the_front() -> None:
    points = np.random.default_rng(0).integers(0, 30, (1500, 3)).astype(float)
    np.testing.assert_array_equal(tabular.front(points), nondominated(points))
