"""What the matrices of a model are multiplied with on calibration examples, one stage of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autolite.families import family_of, is_mapped
from autolite.parts import layer_modules
from autolite.techniques.base import Context
from autolite.techniques.teacher import forward, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autolite.tasks.base import Batch

TOKENS = 2**14  # about as many are looked at: ten rows for each of 1536 inputs
BATCH = 16


@dataclass(frozen=True)
class Stage:
    """Matrices that are given one and the same input, `calls` times in one pass (layers can share them).

    `layer` is the number of layers that are complete when it is first used.
    """

    keys: tuple[str, ...]
    calls: int
    layer: int


def examples(context: Context, count: int | None = None) -> list[Batch]:
    """Return batches of `count` training examples drawn by the seed; None for about 2^14 tokens (or all images)."""
    rng = torch.Generator().manual_seed(context.seed)
    order = torch.randperm(len(context.train), generator=rng).numpy()
    if count is None:
        taken, count = 0, 0
        while count < len(order) and taken < TOKENS:
            ids = context.train.input_ids[order[count]]
            taken, count = taken + (len(ids) if ids.ndim == 1 else 1), count + 1
    return list(context.task.batches(context.train.take(order[:count]), BATCH, context.pad_id))


def owners(model: PreTrainedModel, keys: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, module) for every module that multiplies with a parameter in `keys`."""
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    wanted = {id(parameters[key]): key for key in keys}
    for module in model.modules():
        key = wanted.get(id(module._parameters.get("weight")))  # not what stands for another module's
        if key is not None and not isinstance(module, torch.nn.Embedding):
            yield key, module


def real(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows [m, k] of a product's input [..., k] that are no padding by `mask`, [batch, tokens] or None."""
    values = values.detach()
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask]
    return values.flatten(0, -2)


class Inputs:
    """Shows what matrices are given, stage by stage in the order of use, while earlier ones may change in between.

    A stage's pass ends where its input is known, and starts after the layers that were complete in the pass before:
    all stages together cost about as many passes as a layer has of them.

    Attributes:
        stages: the stages of the matrices asked for; one that a pass does not use is in none.
    """

    def __init__(self, model: PreTrainedModel, keys: Collection[str], batches: Sequence[Batch], device: str):
        self._model, self._device = model, device
        self._batches = [to_tensors(batch, device)[0] for batch in batches]
        for inputs in self._batches:
            inputs["use_cache"] = False  # type: ignore[assignment]
        self._modules: dict[str, list[Any]] = {}
        for key, module in owners(model, keys):
            self._modules.setdefault(key, []).append(module)
        skips = is_mapped(model) and not family_of(model.config).repeated
        self._layers: list[Any] = layer_modules(model) if skips else []
        self._complete = 0  # layers whose outputs are kept
        self._outputs: list[Any] = [None] * len(batches)
        self.stages = self._find()

    def _find(self) -> tuple[Stage, ...]:
        uses: list[tuple[str, Any, int]] = []
        complete = 0

        def passed(*_: Any) -> None:
            nonlocal complete
            complete += 1

        def note(key: str, given: tuple[Any, ...]) -> None:
            uses.append((key, given[0], complete))

        with ExitStack() as hooks, torch.no_grad():
            for layer in self._layers:
                hooks.callback(layer.register_forward_hook(passed).remove)
            for key, modules in self._modules.items():
                for module in modules:
                    hook = module.register_forward_pre_hook(lambda _, given, key=key: note(key, given))
                    hooks.callback(hook.remove)
            forward(self._model, self._batches[0], hidden=False)
        stages: dict[int, list[str]] = {}
        seen: set[str] = set()
        for key, given, _ in uses:
            if key not in seen:
                stages.setdefault(id(given), []).append(key)
                seen.add(key)
        calls = [key for key, _, _ in uses]
        first = {key: layer for key, _, layer in reversed(uses)}
        return tuple(Stage(tuple(keys), calls.count(keys[0]), first[keys[0]]) for keys in stages.values())

    @torch.no_grad()
    def visit(self, stage: Stage, look: Callable[[torch.Tensor], None]) -> None:
        """Call `look` with the real rows [m, k] of each input of `stage`; stages must be visited in order."""
        before = stage.layer - 1
        for index, inputs in enumerate(self._batches):
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            left = stage.calls

            def watch(_: Any, given: tuple[Any, ...], mask: torch.Tensor | None = mask) -> None:
                nonlocal left
                look(real(given[0], mask).float())
                left -= 1
                if not left:
                    raise _Enough

            def keep(_: Any, given: Any, output: Any, index: int = index) -> None:
                self._outputs[index] = output

            with ExitStack() as hooks:
                for module in self._modules[stage.keys[0]]:
                    hooks.callback(module.register_forward_pre_hook(watch).remove)
                for layer in self._layers[: self._complete]:
                    layer.forward = lambda *_, output=self._outputs[index], **__: output
                    hooks.callback(delattr, layer, "forward")
                if before >= self._complete:
                    hooks.callback(self._layers[before].register_forward_hook(keep).remove)
                try:
                    forward(self._model, inputs, hidden=False)
                except _Enough:
                    continue
        self._complete = max(self._complete, stage.layer)


class _Enough(Exception):
    """Ends a pass whose remainder is of no interest."""


def second_moments(inputs: Inputs, stage: Stage) -> torch.Tensor:
    """Return the mean of x x^T over the rows x that `stage` is given, float32 [k, k]."""
    total, rows = torch.zeros(()), 0

    def add(values: torch.Tensor) -> None:
        nonlocal total, rows
        total, rows = total + values.T @ values, rows + len(values)

    inputs.visit(stage, add)
    return total / max(rows, 1)
