"""What is expected of plans that recovery has not trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.search import outlook, stages
from autolite.space import Setting, Space, StageLimits

SPACE = Space(
    name="small",
    description="",
    steps=(
        {"embedding": {"vocabulary": Setting(choices=(1.0, "used"))}},
        {"prune": {"ffn": Setting(choices=(1.0, 0.5))}},
        {"distill": {"temperature": Setting(low=1.0, high=8.0, stage="recover", default=4.0)}},
    ),
    stages={stage: StageLimits(trials=20, effort=1) for stage in ("screen", "recover", "confirm")},
)
TRIMMED = 0.04  # what a trimmed vocabulary costs for good


def trial(stage: str, number: int, kept: float, *, used: bool = False, latency: float = 1.0) -> Any:
    attributes = {
        "stage": stage,
        "recipe": f"recipe {number}",
        "trunk": f"trunk {number}",
        "student": f"{stage} {number}",
        "kept": kept,
        "kept_low": kept - 0.01,
        "latency_ms": latency,
    }
    params = {"embedding.vocabulary": "used" if used else 1.0}
    return SimpleNamespace(params=params, user_attrs=attributes, values=[kept, latency, 5e5 if used else 1e6])


def plans(count: int, seed: int = 0) -> list[tuple[Any, Any]]:
    """Plans as the screen and recovery find them: training wins back all but an eighth of what was lost, but not what a
    trimmed vocabulary costs, which hardly shows at first."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        lost, used = float(rng.uniform(0.08, 0.5)), bool(number % 2)
        latency = 1 / lost
        after = lost / 8 + (TRIMMED if used else 0)
        found.append(
            (
                trial("screen", number, 1 - lost, used=used, latency=latency),
                trial("recover", number, 1 - after, used=used, latency=latency),
            )
        )
    return found


@given(st.integers(0, 100))
def test_what_training_does_not_win_back_is_learned_from_what_was_trained(seed: int) -> None:
    known, asked = plans(16, seed), plans(6, seed + 1000)
    screened, wanted = [a for a, _ in known], [b for _, b in asked]
    others = [a for a, _ in asked]
    for number, each in enumerate(others):
        each.user_attrs |= {"recipe": f"other {number}", "trunk": f"other {number}"}
    found: Any = outlook.expected(SPACE, [*screened, *others], [b for _, b in known])
    kept = np.array([t.user_attrs["kept"] for t in found])
    exact = np.array([t.user_attrs["kept"] for t in wanted])
    assert np.abs(kept - exact).mean() < 0.015
    # The screen alone says that a trimmed vocabulary is as good as a whole one.
    assert np.abs((1 - np.array([t.user_attrs["kept"] for t in others])) / 8 - (1 - exact)).max() > TRIMMED - 1e-9


def test_what_was_trained_is_not_expected_again_nor_what_the_screen_ruined() -> None:
    known = plans(12)
    same_student = trial("screen", 0, 0.9)
    same_student.user_attrs["recipe"] = "another format of plan 0"
    ruined, fine = trial("screen", 100, 0.01), trial("screen", 101, 0.8)
    screened: Any = [*(a for a, _ in known), same_student, ruined, fine]
    (found,) = outlook.expected(SPACE, screened, [b for _, b in known])
    assert found.user_attrs["recipe"] == "recipe 101"
    assert fine.user_attrs["kept"] == 0.8  # the trial itself stays as it was


def test_nobody_is_expected_to_be_better_than_all_or_worse_than_before() -> None:
    known: Any = plans(12)
    others: Any = [trial("screen", 100 + i, kept, latency=1e-6) for i, kept in enumerate((0.999, 0.6, 0.45))]
    recovered = [b for _, b in known]
    best = max(t.user_attrs["kept"] for t in recovered)
    for before, after in zip(
        others, outlook.expected(SPACE, [*(a for a, _ in known), *others], recovered), strict=True
    ):
        assert after.user_attrs["kept"] <= best
        assert after.user_attrs["kept"] >= min(best, before.user_attrs["kept"]) - 1e-9


def test_few_plans_say_nothing_of_others() -> None:
    known: Any = plans(outlook.PAIRS - 1)
    screened = [*(a for a, _ in known), trial("screen", 100, 0.9)]
    assert outlook.expected(SPACE, screened, [b for _, b in known]) == []


def test_a_prediction_puts_nothing_behind_itself() -> None:
    known: Any = plans(12)
    other: Any = trial("screen", 100, 0.9)
    (hoped,) = outlook.expected(SPACE, [*(a for a, _ in known), other], [b for _, b in known])
    for each in (hoped, known[0][1]):
        each.user_attrs["prices"] = [1.0, 1.0]
    assert not stages.behind(known[0][1], hoped)


def test_newcomers_have_at_most_half_of_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    problem: Any = None  # nothing is asked of it where the order is given
    monkeypatch.setattr(stages, "promote", lambda problem, source, count, *, keep_floor: list(source)[:count])
    hoped: Any = [trial("screen", 100 + i, 0.99) for i in range(6)]
    recovered: Any = [trial("recover", i, 0.9) for i in range(6)]
    chosen: Any = stages._promoted("recover", [recovered[0], *hoped, *recovered[1:]], 6, problem)
    assert [t.user_attrs["stage"] for t in chosen].count("screen") == 3
    assert len(chosen) == 6
    # Where few were recovered, all of them go on.
    assert len(stages._promoted("recover", [*recovered[:2], *hoped], 6, problem)) == 5


def test_the_regression_is_the_penalised_least_squares_problem() -> None:
    rng = np.random.default_rng(0)
    known, values, asked = rng.normal(size=(20, 4)), rng.normal(size=20), rng.normal(size=(5, 4))
    known[:, 2] = np.log(0.02)  # says nothing, though its computed spread may not be zero
    columns = [0, 1, 3]
    scaled = (known[:, columns] - known[:, columns].mean(0)) / known[:, columns].std(0)
    stacked = np.vstack([scaled, np.sqrt(outlook.SHRINKAGE) * np.eye(3)])
    weights, *_ = np.linalg.lstsq(stacked, np.append(values - values.mean(), np.zeros(3)), rcond=None)
    wanted = (asked[:, columns] - known[:, columns].mean(0)) / known[:, columns].std(0) @ weights + values.mean()
    assert np.allclose(outlook.ridge(known, values, asked), wanted)
