"""What trials remember of their training: a longer one pays for its own steps, and other number formats for none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from autolite.plan import Plan, make_step
from autolite.search.record import Times, a_step, of_training
from autolite.techniques.teacher import Teaching


def plan(steps: int, form: str = "int8", temperature: float = 4.0) -> Plan:
    return Plan(
        (
            make_step("prune", {"heads": 0.5}),
            make_step("distill", {"steps": steps, "temperature": temperature}),
            make_step("quantize", {"ffn": form}),
        )
    )


def told(attributes: dict[str, Any]) -> Any:
    return SimpleNamespace(user_attrs=attributes)


def test_a_longer_training_goes_on_from_the_longest_shorter_one_of_the_same_plan() -> None:
    first = of_training("recover", plan(30), 30, Times(3.0, 3.0), [], [])
    assert (first["trained_steps"], first["resumable_steps"]) == (30, 18)
    other = of_training("recover", plan(60, temperature=2.0), 60, Times(6.0, 6.0), [told(first)], [])
    assert other["trained_steps"] == 60
    longer = of_training("recover", plan(90, "int4"), 90, Times(7.2, 7.2), [told(first), told(other)], [])
    assert longer["trained_steps"] == 90 - 18


def test_other_number_formats_remember_what_their_student_cost() -> None:
    first = of_training("confirm", plan(90), 90, Times(9.0, 9.0, step=0.08), [], [])
    again = of_training("confirm", plan(90, "int4"), 90, Times(0.01, 0.01), [], [told(first)])
    assert again["student"] == first["student"]
    assert (again["own_train_seconds"], again["train_seconds"], again["trained_steps"]) == (0.01, 9.0, 90)
    assert again["step_seconds"] == 0.08


def test_waiting_for_the_teacher_is_no_part_of_a_step_nor_of_what_is_done_once() -> None:
    found = of_training("recover", plan(30), 30, Times(9.0, 8.0, Teaching(20, 5.0, 100)), [], [])
    assert (found["step_seconds"], found["train_seconds"], found["own_train_seconds"]) == (0.1, 3.0, 8.0)
    assert found["taught"] == [20, 5.0, 100]


def test_what_the_screen_trains_is_not_gone_on_from() -> None:
    assert of_training("screen", plan(40), 40, Times(1.0, 1.0), [], [])["resumable_steps"] == 0


def test_a_step_takes_what_lies_between_two_looks_of_one_training() -> None:
    assert a_step([(100.0, 10), (101.0, 20), (103.0, 40)]) == 0.1
    assert a_step([(0.0, 10), (1.0, 20), (50.0, 10), (53.0, 40)]) == 0.1, "the second training began at 10 again"
    assert a_step([(0.0, 10)]) is a_step([]) is None
