"""Structured pruning cuts whole units, the least important ones, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolite.architecture import LayerShape, ModelShape, Stack, shape_of
from autolite.errors import PlanError
from autolite.families import FAMILIES, family_of
from autolite.parts import layer_modules
from autolite.plan import make_step
from autolite.surgery import share_layers
from autolite.techniques.base import Context, Student
from autolite.techniques.channels import channel_importance
from autolite.techniques.depth import spaced_layers
from autolite.techniques.importance import importance
from autolite.techniques.prune import Prune, PruneConfig, kept_heads, kept_neurons
from autolite.testing import tiny_inputs

MakeContext = Callable[..., Context]
PRUNE = Prune()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def masked_logits(student: Student, config: PruneConfig, context: Context, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits with the least important units multiplied by zero instead of cut; the layers stay whole."""
    scores = importance(student, config.importance, context)
    model: Any = copy.deepcopy(student.model)
    family = family_of(model.config)
    for index, (layer, shape) in enumerate(zip(layer_modules(model), student.shape.stacks[0].layers, strict=True)):
        for path, units, count, width in (
            (family.out, scores.heads[index], kept_heads(shape.kv_heads, config.heads), None),
            (family.ffn_out, scores.neurons[index], kept_neurons(shape.ffn, config.ffn, config.round_to), 1),
        ):
            mask = torch.zeros(len(units))
            mask[np.argsort(-units.numpy(), kind="stable")[:count].copy()] = 1
            channels = mask.repeat_interleave(width or shape.heads * shape.head_dim // len(units))
            layer.get_submodule(path).register_forward_pre_hook(lambda _, args, c=channels: (args[0] * c,))
    return torch.as_tensor(model(**inputs).logits)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "magnitude") for family in sorted(FAMILIES)]
    + [(family, "taylor") for family in sorted(FAMILIES) if not FAMILIES[family].patch],  # no task on images yet
)
def test_the_pruned_model_computes_what_the_masked_model_does(
    family: str, kind: str, make_context: MakeContext
) -> None:
    context = make_context(family)
    before = weights(context.teacher.model)
    config = PruneConfig(heads=0.5, ffn=0.5, round_to=8, importance=kind)
    student = PRUNE.apply(context.teacher, config, context)
    inputs = tiny_inputs(context.teacher.model)
    with torch.no_grad():
        logits = student.model(**inputs).logits
    torch.testing.assert_close(logits, masked_logits(context.teacher, config, context, inputs), atol=2e-5, rtol=1e-4)
    assert student.shape == shape_of(student.model)
    assert equal(before, weights(context.teacher.model))
    assert student.shape.stacks[0].layers[0].ffn == 32


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("setting", [{"depth": 0.5}, {"depth": 0.4, "heads": 0.3, "ffn": 0.2}, {"ffn": 0.6}])
def test_the_shape_is_known_without_weights(family: str, setting: dict[str, float], make_context: MakeContext) -> None:
    context = make_context(family, layers=5)
    config = PruneConfig(**setting, importance="magnitude")
    student = PRUNE.apply(context.teacher, config, context)
    assert shape_of(student.model) == PRUNE.shape(context.teacher.shape, config) == student.shape
    with torch.no_grad():
        assert student.model(**tiny_inputs(student.model)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_shared_blocks_are_cut_once_and_stay_shared(family: str, make_context: MakeContext) -> None:
    context = make_context(family)
    share_layers(context.teacher.model, attention=[0, 1, 0], feed_forward=[0, 0, 0])
    student = Student(context.teacher.model, shape_of(context.teacher.model))
    config = PruneConfig(heads=0.5, ffn=0.25, round_to=4)
    pruned = PRUNE.apply(student, config, context)
    assert [(x.attention, x.feed_forward) for x in pruned.shape.stacks[0].layers] == [(0, 0), (1, 0), (0, 0)]
    assert pruned.shape == shape_of(pruned.model)
    inputs = tiny_inputs(student.model)
    with torch.no_grad():
        logits = pruned.model(**inputs).logits
    # Hooks on a shared module run once for each layer, and a mask is idempotent.
    torch.testing.assert_close(logits, masked_logits(student, config, context, inputs), atol=2e-5, rtol=1e-4)


def test_dropping_layers_equals_skipping_them(make_context: MakeContext) -> None:
    context = make_context("gpt2", layers=5)
    student = PRUNE.apply(context.teacher, PruneConfig(depth=0.6), context)
    assert student.shape.source_layers == ((0, 2, 4),)
    inputs = tiny_inputs(context.teacher.model)
    whole: Any = copy.deepcopy(context.teacher.model)
    for index in (1, 3):
        layer_modules(whole)[index].forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        torch.testing.assert_close(student.model(**inputs).logits, whole(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_importance_is_of_the_student_as_it_is(make_context: MakeContext) -> None:
    """After layers are dropped, heads are ranked by what they do in the shallow model."""
    context = make_context("bert", layers=4)
    both = PRUNE.apply(context.teacher, PruneConfig(depth=0.5, heads=0.5), context)
    shallow = PRUNE.apply(context.teacher, PruneConfig(depth=0.5), context)
    then = PRUNE.apply(shallow, PruneConfig(heads=0.5), context)
    assert equal(weights(both.model), weights(then.model))
    assert both.shape == then.shape


def test_fractions_of_one_return_the_student_itself(make_context: MakeContext) -> None:
    context = make_context()
    assert PRUNE.apply(context.teacher, PruneConfig(), context) is context.teacher


@given(st.integers(1, 64), st.floats(0.01, 1))
def test_at_least_one_head_stays_and_the_count_is_the_nearest(groups: int, fraction: float) -> None:
    kept = kept_heads(groups, fraction)
    assert 1 <= kept <= groups
    assert kept == 1 or abs(kept - fraction * groups) <= 0.5


@given(st.integers(1, 4096), st.floats(0.01, 1), st.integers(1, 128))
def test_widths_are_multiples_and_never_above_the_original(width: int, fraction: float, multiple: int) -> None:
    kept = kept_neurons(width, fraction, multiple)
    assert 1 <= kept <= width
    assert kept == width or kept % multiple == 0
    assert kept_neurons(width, 1.0, multiple) == width


@given(st.integers(1, 48), st.floats(0.01, 1))
def test_layers_kept_are_evenly_spaced_with_both_ends(layers: int, fraction: float) -> None:
    kept = spaced_layers(layers, fraction)
    assert len(kept) == max(1, int(fraction * layers + 0.5))
    assert kept[0] == 0
    assert len(kept) == 1 or kept[-1] == layers - 1
    gaps = np.diff(kept)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_grouped_query_attention_loses_whole_groups() -> None:
    layers = tuple(LayerShape(32, 8, 64, 8192, i, i) for i in range(2))
    shape = ModelShape("llama", (Stack("decoder", 2048, layers, True, True),), 128256, 2048, 131072, 128256, True)
    layer = PRUNE.shape(shape, PruneConfig(heads=0.3)).stacks[0].layers[0]
    assert (layer.heads, layer.kv_heads) == (8, 2)


def test_a_quantized_model_is_refused() -> None:
    layers = (LayerShape(2, 2, 8, 32, 0, 0, ffn_format="int8"),)
    shape = ModelShape("bert", (Stack("encoder", 16, layers),), 10, 16, 8, 2)
    with pytest.raises(PlanError, match="int8 already; put it before quantize"):
        PRUNE.shape(shape, PruneConfig(heads=0.5))


@pytest.mark.parametrize(
    "setting",
    [
        {"heads": 0},
        {"heads": [1, 0.5]},
        {"heads": []},
        {"ffn": 1.5},
        {"ffn": [0, 4]},
        {"hidden": 0},
        {"round_to": 0},
        {"depth": -1},
        {"depth": [1, 0]},
        {"importance": "luck"},
        {"sparsity": "4:2"},
        {"sparsity": "0%"},
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"prune.{next(iter(setting))}"):
        make_step("prune", setting)


def test_layers_may_be_given_their_own_counts_or_fractions(make_tiny: MakeContext) -> None:
    shape = make_tiny("bert").teacher.shape
    counts = PRUNE.shape(shape, PruneConfig(heads=(4, 1, 2), ffn=(64, 5, 32)))
    assert [(x.heads, x.ffn) for x in counts.stacks[0].layers] == [(4, 64), (1, 5), (2, 32)]
    fractions = PRUNE.shape(shape, PruneConfig(heads=(1.0, 0.25, 0.5), ffn=(1.0, 0.25, 0.5), round_to=8))
    assert [(x.heads, x.ffn) for x in fractions.stacks[0].layers] == [(4, 64), (1, 16), (2, 32)]
    chosen = PRUNE.shape(shape, PruneConfig(depth=(0, 2), heads=(1, 2)))
    assert (chosen.source_layers, [x.heads for x in chosen.stacks[0].layers]) == (((0, 2),), [1, 2])


def test_whole_numbers_and_fractions_survive_json() -> None:
    for config in (PruneConfig(heads=(1, 2), ffn=(1.0, 0.5), depth=(0, 3)), PruneConfig(heads=1.0, depth=0.5)):
        again = PruneConfig.model_validate_json(config.model_dump_json())
        assert again == config
        assert repr(again) == repr(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"heads": (1, 2)}, "prune.heads: 2 values for 3 layers"),
        ({"heads": (1, 2, 5)}, "layer 2 cannot keep 5 of 4"),
        ({"ffn": (8, 8, 16)}, "layers 0 and 2 share weights"),
        ({"depth": (0, 3)}, "no layer 3 to keep; the layers are 0 to 2"),
        ({"depth": 0.5, "layers": "damage"}, "resolve the plan"),
        ({"heads": 0.5, "allocation": "global"}, "resolve the plan"),
        ({"sparsity": "2:4", "ffn": (6, 6, 6)}, "2:4 does not divide inputs that are 6 wide"),
    ],
)
def test_what_does_not_fit_the_layers_is_refused(setting: dict[str, Any], message: str, make_tiny: MakeContext) -> None:
    model = make_tiny("bert").teacher.model
    share_layers(model, feed_forward=[0, 0, 0])
    with pytest.raises(PlanError, match=message):
        PRUNE.shape(shape_of(model), PruneConfig(**setting))


def test_cuts_after_zeros_are_refused(make_tiny: MakeContext) -> None:
    shape = make_tiny("bert").teacher.shape.with_sparsity("2:4")
    with pytest.raises(PlanError, match="2:4 zeros already"):
        PRUNE.shape(shape, PruneConfig(heads=0.5))


@pytest.mark.parametrize("kind", ["taylor", "magnitude", "activation", "wanda", "fisher", "second-order"])
def test_hidden_channels_go_by_any_importance(kind: str, make_tiny: MakeContext) -> None:
    context = make_tiny("llama")
    student = PRUNE.apply(context.teacher, PruneConfig(hidden=0.5, round_to=8, importance=kind), context)
    assert student.shape.stacks[0].hidden == 16
    assert shape_of(student.model) == student.shape


def test_a_channel_that_nothing_uses_goes_first(make_tiny: MakeContext) -> None:
    """It is zero in every table and no matrix reads or writes it: every importance must see that."""
    context = make_tiny("gpt2")
    model: Any = context.teacher.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            axis = {"wte.weight": 1, "wpe.weight": 1, "c_attn.weight": 0, "c_fc.weight": 0}
            last = ".".join(name.split(".")[-2:])
            if last in axis:
                parameter.select(axis[last], 5).zero_()
            if "c_proj" in name or ".ln_" in name:
                parameter.select(-1, 5).zero_()
    for kind in ("taylor", "magnitude", "activation", "wanda", "fisher", "second-order"):
        scores = channel_importance(context.teacher, kind, replace(context, memory={}))  # type: ignore[arg-type]
        assert int(scores.argmin()) == 5, kind


@pytest.mark.parametrize("allocation", ["global", "isomorphic"])
@pytest.mark.parametrize("kind", ["taylor", "magnitude", "wanda", "second-order"])
def test_allocation_keeps_the_budget_and_a_floor(allocation: str, kind: str, make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    asked = PruneConfig(heads=0.5, ffn=0.5, round_to=8, allocation=allocation, importance=kind)
    found = PRUNE.resolve(context.teacher.shape, asked, context)
    assert isinstance(found, PruneConfig)
    uniform = PRUNE.shape(context.teacher.shape, PruneConfig(heads=0.5, ffn=0.5, round_to=8))
    layers = PRUNE.shape(context.teacher.shape, found).stacks[0].layers
    largest = 4 * 32 * 8  # weights of a head, which is the coarsest step
    weights = [sum(4 * 32 * 8 * x.heads + 2 * 32 * x.ffn for x in s) for s in (layers, uniform.stacks[0].layers)]
    assert abs(weights[0] - weights[1]) <= largest
    assert all(x.heads >= 1 and x.ffn >= 8 and x.ffn % 8 == 0 for x in layers)
    if allocation == "isomorphic":
        assert sum(x.heads for x in layers) == 6
        assert sum(x.ffn for x in layers) == 96
    assert PRUNE.resolve(context.teacher.shape, found, context) == found


def test_an_important_layer_is_allocated_more(make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    with torch.no_grad():
        for name, parameter in context.teacher.model.named_parameters():
            if ".layer.1.output.dense" in name:
                parameter.mul_(0.01)  # what this block's neurons do hardly arrives
    asked = PruneConfig(ffn=0.5, round_to=8, allocation="isomorphic", importance="taylor")
    found: Any = PRUNE.resolve(context.teacher.shape, asked, context)
    assert found.ffn[1] == min(found.ffn) < 32 < max(found.ffn)


def test_layers_and_allocation_of_a_shared_student_come_from_the_teacher(make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    model = copy.deepcopy(context.teacher.model)
    share_layers(model, attention=[0, 0, 2], feed_forward=[0, 1, 0])
    asked = PruneConfig(depth=0.67, layers="similarity", heads=0.5, ffn=0.5, round_to=8, allocation="isomorphic")
    found: Any = PRUNE.resolve(shape_of(model), asked, context)
    assert len(found.depth) == len(found.heads) == len(found.ffn) == 2
    student = PRUNE.apply(Student(model, shape_of(model)), found, context)
    assert student.shape.source_layers == (found.depth,)
    with pytest.raises(PlanError, match="an earlier step removed some"):
        PRUNE.resolve(student.shape, PruneConfig(depth=0.5, layers="damage"), context)
    with pytest.raises(PlanError, match="units left of the teacher's"):
        PRUNE.resolve(student.shape, PruneConfig(heads=0.5, allocation="global"), context)


def test_a_fraction_that_removes_no_layer_is_no_depth_and_fits_nothing(make_context: MakeContext) -> None:
    context = make_context("bert")
    asked = PruneConfig(depth=0.99, layers="second-order", heads=0.5)
    assert Prune().resolve(context.teacher.shape, asked, context) == PruneConfig(heads=0.5)
