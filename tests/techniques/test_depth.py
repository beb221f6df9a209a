"""Which layers stay, against hidden states compared by hand and losses with layers skipped by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from autolite.parts import layer_modules
from autolite.surgery import keep_layers
from autolite.techniques import depth, walk
from autolite.techniques.base import Context, weights_digest
from autolite.techniques.depth import block_influence, chosen_layers
from autolite.techniques.observe import sample
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.reconstruct import bridge_gaps

MakeContext = Callable[..., Context]
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2"])
def test_influence_is_how_much_a_layer_turns_the_states(family: str, make_tiny: MakeContext) -> None:
    context = make_tiny(family)
    model: Any = context.teacher.model
    total, tokens = torch.zeros(3), 0
    for ids in context.train.input_ids:
        with torch.no_grad():
            states = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
        if family == "gpt2":  # its last state is told after the final norm, which is no part of the layer
            with torch.no_grad():
                last = layer_modules(model)[-1](states[-2])
            states = (*states[:-1], last if isinstance(last, torch.Tensor) else last[0])
        pairs = itertools.pairwise(states)
        total += torch.stack([(1 - F.cosine_similarity(a, b, dim=-1)).sum() for a, b in pairs])
        tokens += len(ids)
    torch.testing.assert_close(block_influence(model, context), total / tokens, atol=1e-4, rtol=1e-4)


def test_the_layers_of_least_influence_go(make_tiny: MakeContext) -> None:
    context = make_tiny("bert", layers=4)
    influence = block_influence(context.teacher.model, context)
    kept = chosen_layers(context.teacher, "similarity", 2, context)
    assert set(kept) == set(influence.argsort()[2:].tolist())


def test_layers_go_whose_absence_hurts_least(make_tiny: MakeContext) -> None:
    context = make_tiny("gpt2", layers=4)

    @torch.no_grad()
    def loss(skipped: set[int]) -> float:
        model: Any = copy.deepcopy(context.teacher.model)
        for index in skipped:
            layer_modules(model)[index].forward = lambda hidden, *_, **__: hidden
        losses = []
        for batch in context.task.batches(context.train, 32, context.pad_id):
            inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
            losses.append(context.task.loss(model(**inputs).logits, torch.from_numpy(batch.labels)))
        return float(torch.stack(losses).mean())

    first = min(range(4), key=lambda index: loss({index}))
    second = min(set(range(4)) - {first}, key=lambda index: loss({first, index}))
    assert chosen_layers(context.teacher, "damage", 3, context) == tuple(sorted(set(range(4)) - {first}))
    assert chosen_layers(context.teacher, "damage", 2, context) == tuple(sorted(set(range(4)) - {first, second}))
    assert chosen_layers(context.teacher, "damage", 3, context) == tuple(sorted(set(range(4)) - {first}))


def test_layers_go_that_the_rest_makes_up_for(make_tiny: MakeContext) -> None:
    """The resolved plan names those that stay, and says that they are fitted."""
    context = make_tiny("llama", layers=4)
    asked = PruneConfig(depth=0.75, layers="second-order")

    def loss(index: int) -> float:
        model: Any = copy.deepcopy(context.teacher.model)
        keep_layers(model, [i for i in range(4) if i != index])
        bridge_gaps(model, context.teacher.model, context)
        losses = []
        for batch in context.task.batches(context.train, 32, context.pad_id):
            inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
            with torch.no_grad():
                losses.append(context.task.loss(model(**inputs).logits, torch.from_numpy(batch.labels)))
        return float(torch.stack(losses).mean())

    gone = min(range(4), key=loss)
    found = Prune().resolve(context.teacher.shape, asked, context)
    assert found == PruneConfig(depth=tuple(i for i in range(4) if i != gone), reconstruct=True)
    whole = Prune().resolve(context.teacher.shape, PruneConfig(layers="second-order"), context)
    assert whole == PruneConfig()


def test_other_processes_find_what_was_chosen(make_tiny: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_tiny("bert", layers=4)
    kept = [chosen_layers(first.teacher, "second-order", count, first) for count in (3, 2)]
    monkeypatch.setattr(depth, "_loss", lambda *_: pytest.fail("scored again"))
    again = make_tiny("bert", layers=4)  # nothing in its memory
    assert [chosen_layers(again.teacher, "second-order", count, again) for count in (2, 3)] == kept[::-1]
    other = make_tiny("bert", layers=4, seed=1)
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        chosen_layers(other.teacher, "second-order", 3, other)


def test_what_is_fitted_is_not_scored_on_what_it_was_fitted_to(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context("bert", examples=600)
    drawn: list[bool] = []
    for module in (depth, walk):
        monkeypatch.setattr(module, "sample", lambda c, others=False: drawn.append(others) or sample(c, others=others))
    chosen_layers(context.teacher, "second-order", 2, context)
    assert drawn == [False, False, True] * 3, "the cut model and the original, then the loss"


@pytest.mark.parametrize(("examples", "others"), [(100, 100), (300, 44), (600, 256)])
def test_other_examples_are_others(make_context: MakeContext, examples: int, others: int) -> None:
    context = make_context("bert", examples=examples)
    first, second = ({id(ids) for ids in sample(context, others=each).input_ids} for each in (False, True))
    assert (len(first), len(second)) == (min(examples, 256), others)
    assert first.isdisjoint(second) == (examples > 256)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_models_of_another_depth_are_told_apart(family: str, make_tiny: MakeContext) -> None:
    """ALBERT has one layer's weights however often it is repeated; what is cached by their digest depends on that."""
    model = make_tiny(family).teacher.model
    shallow = copy.deepcopy(model)
    keep_layers(shallow, [0, 1])
    assert weights_digest(shallow) != weights_digest(model) == weights_digest(copy.deepcopy(model))
