from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolite import contracts
from autolite.architecture import LayerShape, ModelShape, Stack, shape_of
from autolite.errors import PlanError
from autolite.families import FAMILIES
from autolite.parts import LayerParts, Matrix, layers_of
from autolite.plan import make_step
from autolite.surgery import clone, keep_neurons
from autolite.techniques.base import Student
from autolite.techniques.share import Share, ShareConfig
from autolite.techniques.teacher import to_tensors
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


def test_the_last_cycle_may_run_backwards() -> None:
    """Cycle (rev) of Takase & Kiyono 2021: M (ceil(N / M) - 1) layers in cycles, the rest from the last set down."""
    assert identities(6, groups=3, pattern="cycle-reversed") == [0, 1, 2, 2, 1, 0]
    assert identities(6, groups=2, pattern="cycle-reversed") == [0, 1, 0, 1, 1, 0]
    assert identities(7, groups=3, pattern="cycle-reversed") == [0, 1, 2, 0, 1, 2, 2]
    assert identities(4, groups=3, pattern="cycle-reversed") == [0, 1, 2, 2]


def test_layers_at_the_ends_keep_their_own() -> None:
    assert identities(6, groups=1, unshared_first=1) == [0, 1, 1, 1, 1, 1]
    assert identities(6, groups=1, unshared_first=1, unshared_last=2) == [0, 1, 1, 1, 4, 5]
    assert identities(6, groups=2, pattern="cycle", unshared_last=1) == [0, 1, 0, 1, 0, 5]
    assert identities(4, groups=1, unshared_first=3, unshared_last=9) == [0, 1, 2, 3]


@given(
    st.integers(1, 12),
    st.integers(1, 14),
    st.sampled_from(["sequence", "cycle", "cycle-reversed"]),
    st.integers(0, 13),
    st.integers(0, 13),
)
def test_every_pattern_leaves_as_many_sets_as_asked_for_between_the_ends(
    count: int, groups: int, pattern: str, first: int, last: int
) -> None:
    found = identities(count, groups=groups, pattern=pattern, unshared_first=first, unshared_last=last)
    inner = max(0, count - first - last)
    assert len(set(found)) == count - inner + min(inner, groups)
    assert all(found.count(i) == 1 for i in [*found[:first], *found[count - min(last, count) :]])


@pytest.mark.parametrize("part", ["attention", "ffn", "all"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_the_best_layer_is_the_one_that_changes_the_logits_least(family: str, part: str) -> None:
    """Against every layer tried in copies that share nothing, over all the examples there are."""
    context = contracts.tiny_context(family, contracts.tiny_task(family), layers=4)
    teacher = context.teacher
    batches = list(context.task.batches(context.train, len(context.train), context.pad_id))
    inputs, labels = to_tensors(batches[0], "cpu")

    @torch.no_grad()
    def probabilities(model: Any) -> torch.Tensor:
        return context.task.soft_targets(model(**inputs).logits, labels).softmax(-1).double()

    def stored(layer: LayerParts) -> list[Matrix]:
        both = {"attention": layer.attention_matrices, "ffn": layer.ffn_matrices}
        return [m for name, matrices in both.items() if part in (name, "all") for m in matrices]

    expected, damage = probabilities(teacher.model), []
    for source in range(4):
        copy = clone(teacher.model)
        layers = layers_of(copy)
        members = [0, 1] if source < 2 else [2, 3]
        with torch.no_grad():
            for target in members:
                for ours, theirs in zip(stored(layers[target]), stored(layers[source]), strict=True):
                    ours.weight.copy_(theirs.weight)
                    if ours.bias is not None and theirs.bias is not None:
                        ours.bias.copy_(theirs.bias)
        damage.append(float((expected * (expected / probabilities(copy)).log()).sum()))
    student = share.apply(teacher, config(part=part, groups=2, init="best"), context)
    originals, found = layers_of(teacher.model), layers_of(student.model)
    for first in (0, 2):
        best = min((first, first + 1), key=lambda i: damage[i])
        for ours, theirs in zip(stored(found[first + 1]), stored(originals[best]), strict=True):
            assert torch.equal(ours.weight, theirs.weight)
    assert sum(key.startswith("share-") for key in context.memory) == 1  # computed once for both blocks


@pytest.mark.parametrize("init", ["first", "mean", "best"])
@pytest.mark.parametrize("family", contracts.FAMILIES)
@torch.no_grad()
def test_a_difference_of_higher_rank_gives_back_more_of_what_sharing_took(family: str, init: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family), layers=4)
    errors = []
    for rank in (0, 4, 15):
        settings = config(part="all", groups=2, init=init, rank=rank)
        student = share.apply(context.teacher, settings, context)
        assert shape_of(student.model) == student.shape == share.shape(context.teacher.shape, settings)
        error = 0.0
        for ours, theirs in zip(layers_of(student.model), layers_of(context.teacher.model), strict=True):
            for one, other in zip(
                (*ours.attention_matrices, *ours.ffn_matrices),
                (*theirs.attention_matrices, *theirs.ffn_matrices),
                strict=True,
            ):
                weight = one.weight if one.delta is None else one.weight + one.delta[1].weight @ one.delta[0].weight
                error += float((weight - other.weight).square().sum())
                if one.delta is not None and one.bias is not None:
                    torch.testing.assert_close(one.bias + one.delta[1].bias, other.bias)
        errors.append(error)
    if family == "albert":
        assert errors == [0.0] * 3  # its layers are one: nothing is taken, and no layer has anything of its own
    else:
        assert errors[0] > errors[1] > errors[2] > 0


def test_the_last_rank_that_pays_is_below_the_matrices() -> None:
    shape = shape_of(tiny_model("llama"))  # its keys and values are 16 wide
    assert share.shape(shape, config(part="all", rank=15)).stacks[0].layers[0].attention_rank == 15
    with pytest.raises(PlanError, match=r"share.rank: 16 is no less than 16"):
        share.shape(shape, config(part="all", rank=16))
    assert share.shape(shape, config(part="ffn", rank=16)).stacks[0].layers[0].ffn_rank == 16


def test_only_layers_that_share_have_a_difference() -> None:
    shape = shape_of(tiny_model("bert", layers=5))
    found = share.shape(shape, config(part="ffn", groups=2, unshared_first=1, unshared_last=1, rank=3))
    assert [x.ffn_rank for x in found.stacks[0].layers] == [0, 3, 3, 0, 0]
    assert {x.attention_rank for x in found.stacks[0].layers} == {0}
    with pytest.raises(PlanError, match="layer 1 has a low-rank difference of rank 3 in the feed-forward block"):
        share.shape(found, config(part="all"))
    assert [x.ffn_rank for x in share.shape(found, config(part="attention")).stacks[0].layers] == [0, 3, 3, 0, 0]


@torch.no_grad()
def test_sharing_other_layers_leaves_those_that_shared_before() -> None:
    model = tiny_model("bert", layers=4)
    teacher = Student(model, shape_of(model))
    once = share.apply(teacher, config(part="all", unshared_last=2, rank=3), None)  # type: ignore[arg-type]
    twice = share.apply(once, config(part="all", unshared_first=2, init="mean", rank=2), None)  # type: ignore[arg-type]
    assert [x.ffn_rank for x in twice.shape.stacks[0].layers] == [3, 3, 2, 2]
    assert shape_of(twice.model) == twice.shape
    for before, after in zip(layers_of(once.model)[:2], layers_of(twice.model)[:2], strict=True):
        assert before.out.delta is not None
        assert after.out.delta is not None
        assert torch.equal(before.out.weight, after.out.weight)
        assert all(torch.equal(b.weight, a.weight) for b, a in zip(before.out.delta, after.out.delta, strict=True))
