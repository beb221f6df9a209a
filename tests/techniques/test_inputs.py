"""What matrices are given, stage by stage: the same as in one pass that looks at all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autolite import contracts
from autolite.parts import matrices_of
from autolite.surgery import share_layers
from autolite.techniques.inputs import TOKENS, Inputs, examples, owners, second_moments
from autolite.techniques.teacher import forward, to_tensors
from autolite.testing import tiny_model


def all_at_once(model: Any, keys: list[str], batches: list[Any]) -> dict[str, torch.Tensor]:
    """x x^T, the mean over all real rows, written down without stages, early ends and late starts."""
    rows: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    mask: list[torch.Tensor] = []

    def note(key: str, given: torch.Tensor) -> None:
        rows[key] += [x for x, m in zip(given, mask[0], strict=True) for x in (x[m] if given.ndim == 3 else x[None])]

    hooks = [
        module.register_forward_pre_hook(lambda _, given, key=key: note(key, given[0]))
        for key, module in owners(model, keys)
    ]
    with torch.no_grad():
        for batch in batches:
            inputs, _ = to_tensors(batch, "cpu")
            shape = inputs["input_ids"].shape if "input_ids" in inputs else (len(batch.indices), 17)
            mask[:] = [inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(shape).bool()]
            forward(model, inputs, hidden=False)
    for hook in hooks:
        hook.remove()
    return {key: torch.stack(x).T @ torch.stack(x) / len(x) for key, x in rows.items() if x}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_stages_see_what_one_pass_sees(family: str, shared: bool) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    model = context.teacher.model
    if shared:
        share_layers(model, attention=[0, 1, 0], feed_forward=[0, 0, 2])
    keys = [key for group in matrices_of(model).values() for key in group]
    batches = examples(context)
    expected = all_at_once(model, keys, batches)
    inputs = Inputs(model, keys, batches, "cpu")
    seen = [key for stage in inputs.stages for key in stage.keys]
    assert sorted(seen) == sorted(expected), "every product once; tables that are only looked up in have no inputs"
    for stage in inputs.stages:
        found = second_moments(inputs, stage)
        for key in stage.keys:
            torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-4)


def test_later_stages_see_what_was_changed_before() -> None:
    context = contracts.tiny_context("llama", contracts.tiny_task("llama"))
    model = context.teacher.model
    matrices = {key: m for group in matrices_of(model).values() for key, m in group.items()}
    inputs = Inputs(model, list(matrices), examples(context), "cpu")
    found = {}
    for stage in inputs.stages:
        for key in stage.keys:
            found[key] = second_moments(inputs, stage)
        with torch.no_grad():
            for key in stage.keys:
                matrices[key].weight.mul_(0.5)
    again = Inputs(model, list(matrices), examples(context), "cpu")
    for stage in again.stages:
        torch.testing.assert_close(second_moments(again, stage), found[stage.keys[0]])


def test_a_model_without_a_map_has_stages_too() -> None:
    model = tiny_model("electra", embedding_size=32, intermediate_size=64)
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    groups = matrices_of(model)
    keys = [*groups["attention"], *groups["ffn"], *groups["head"]]
    expected = all_at_once(model, keys, examples(context))
    inputs = Inputs(model, keys, examples(context), "cpu")
    assert sorted(key for stage in inputs.stages for key in stage.keys) == sorted(expected)
    for stage in inputs.stages:
        torch.testing.assert_close(second_moments(inputs, stage), expected[stage.keys[0]], rtol=1e-4, atol=1e-4)


def test_examples_are_drawn_by_the_seed_until_there_are_enough_tokens() -> None:
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    every = [i for batch in examples(context) for i in batch.indices]
    assert sorted(every) == list(range(len(context.train))), f"all of them are fewer than {TOKENS} tokens"
    assert sum(len(batch.indices) for batch in examples(context, 5)) == 5
