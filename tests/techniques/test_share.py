from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolite.architecture import LayerShape, ModelShape, Stack, shape_of
from autolite.errors import PlanError
from autolite.families import FAMILIES
from autolite.parts import layers_of
from autolite.plan import make_step
from autolite.surgery import keep_neurons
from autolite.techniques.base import Student
from autolite.techniques.share import Share, ShareConfig
from autolite.testing import tiny_inputs, tiny_model

share = Share()


def config(**settings: Any) -> ShareConfig:
    return ShareConfig(**settings)


def identities(count: int, **settings: Any) -> list[int]:
    layers = tuple(LayerShape(4, 4, 8, 64, i, i) for i in range(count))
    shape = ModelShape("bert", (Stack("encoder", 32, layers),), 9, 32, 9, 2)
    return [x.feed_forward for x in share.shape(shape, config(part="ffn", **settings)).stacks[0].layers]


def test_neighbours_share_in_a_sequence_and_the_stack_repeats_in_a_cycle() -> None:
    assert identities(6, groups=3) == [0, 0, 2, 2, 4, 4]
    assert identities(6, groups=3, pattern="cycle") == [0, 1, 2, 0, 1, 2]
    assert identities(5, groups=2) == [0, 0, 0, 3, 3]  # floor(i * 2 / 5)
    assert identities(6, groups=1) == [0] * 6


@given(st.integers(1, 12), st.integers(1, 14), st.sampled_from(["sequence", "cycle"]))
def test_as_many_sets_of_weights_are_left_as_asked_for(count: int, groups: int, pattern: str) -> None:
    found = identities(count, groups=groups, pattern=pattern)
    assert len(set(found)) == min(count, groups)
    assert groups < count or found == list(range(count))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["none", "attention", "ffn", "all"])
@pytest.mark.parametrize("init", ["first", "mean"])
def test_the_shape_told_is_the_shape_made(family: str, part: str, init: str) -> None:
    model = tiny_model(family, layers=4)
    teacher = Student(model, shape_of(model))
    inputs, before = tiny_inputs(model), model(**tiny_inputs(model)).logits
    settings = config(part=part, groups=2, pattern="cycle", init=init)
    student = share.apply(teacher, settings, None)  # type: ignore[arg-type]
    assert shape_of(student.model) == student.shape == share.shape(teacher.shape, settings)
    assert torch.equal(model(**inputs).logits, before)
    alike = torch.equal(student.model(**inputs).logits, before)
    assert alike == (part == "none" or family == "albert")


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_a_set_starts_from_its_first_layer_or_from_the_mean(family: str) -> None:
    model = tiny_model(family, layers=4)
    teacher = Student(model, shape_of(model))
    original = [x.ffn_out.weight for x in layers_of(model)]
    for init, expected in (("first", original[2]), ("mean", (original[2] + original[3]) / 2)):
        student = share.apply(teacher, config(part="all", groups=2, init=init), None)  # type: ignore[arg-type]
        found = layers_of(student.model)
        torch.testing.assert_close(found[3].ffn_out.weight, expected)
        assert found[3].ffn_out.key == found[2].ffn_out.key
        assert found[3].ffn_norm.key != found[2].ffn_norm.key


def test_sharing_what_is_shared_takes_every_member_along() -> None:
    model = tiny_model("bert", layers=4)
    teacher = Student(model, shape_of(model))
    half = share.apply(teacher, config(part="ffn", groups=2), None)  # type: ignore[arg-type]
    settings = config(part="ffn", groups=2, pattern="cycle")
    whole = share.apply(half, settings, None)  # type: ignore[arg-type]
    assert [x.feed_forward for x in whole.shape.stacks[0].layers] == [0, 0, 0, 0]
    assert shape_of(whole.model) == whole.shape


def test_layers_of_different_widths_cannot_share_and_the_error_says_what_to_do() -> None:
    model = tiny_model("bert")
    keep_neurons(model, 1, range(10))
    shape = shape_of(model)
    with pytest.raises(PlanError, match=r"layers 0 and 1 .* 64 and 10 wide.* share 'attention' only"):
        share.shape(shape, config(part="all"))
    assert share.shape(shape, config(part="attention")).stacks[0].layers[2].attention == 0


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(PlanError, match=r"share.groups.*0"):
        make_step("share", {"part": "all", "groups": 0})
    with pytest.raises(PlanError, match=r"share.pattern"):
        make_step("share", {"pattern": "spiral"})
