"""Runs a model block by block and tells what its projections read and write, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from autolite.families import family_of
from autolite.parts import layer_modules, part
from autolite.techniques.base import Context
from autolite.techniques.observe import BATCH, hidden_input, sample
from autolite.techniques.teacher import forward, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["attention", "ffn"]
Side = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a block's output projection: its input and output, and the residual stream that it is added to. Or
    of its first input projection (the query, `ffn_in`), whose input all of the block's input projections read."""

    kind: Kind
    layer: int
    input: Tensor
    output: Tensor
    stream: Tensor


class _Enough(Exception):
    """Stops a forward pass when all that was wanted has been seen."""


class Walk:
    """Runs a model on the calibration examples, block after block: a pass starts with the state before the first layer
    of the pass before, and ends with the last block that is wanted."""

    def __init__(self, model: PreTrainedModel, context: Context):
        self.model, self.family = model, family_of(model.config)
        batches = context.task.batches(sample(context), BATCH, context.pad_id)
        self.batches = [to_tensors(batch, str(model.device))[0] for batch in batches]
        self.reached: list[tuple[int, Tensor | None]] = [(0, None)] * len(self.batches)

    def observe(self, batch: int, wanted: Collection[tuple[Kind, int]], side: Side = "output") -> list[Use]:
        """Run one batch and return the uses of the projections at one side of the wanted blocks (kind, layer); later
        calls want no earlier layer."""
        family, layers = self.family, layer_modules(self.model)
        first = min(layer for _, layer in wanted)
        start, state = self.reached[batch]
        uses: list[Use] = []
        index, stream = -1, torch.empty(0)

        def enter(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            nonlocal index, stream
            index, stream = index + 1, hidden_input(arguments, keywords)
            if index == start and state is not None:
                stream = state
                arguments, keywords = (state, *arguments[1:]), {**keywords}
                keywords.pop("hidden_states", None)
            if index == first and not family.repeated:
                self.reached[batch] = (first, stream)
            return arguments, keywords

        def between(_: Any, arguments: tuple[Any, ...]) -> None:
            nonlocal stream
            stream = arguments[0]

        def use(of: Side, kind: Kind, arguments: tuple[Any, ...], output: Tensor) -> None:
            nonlocal stream
            if of == side and (kind, index) in wanted:
                uses.append(Use(kind, index, arguments[0], output, stream))
                if len(uses) == len(wanted):
                    raise _Enough
            if (of, kind) == ("output", "attention") and family.pre_norm:
                stream = stream + output

        with ExitStack() as undo:

            def hook(path: str, register: Callable[[Any], Any]) -> None:
                for module in dict.fromkeys(part(layer, path) if path else layer for layer in layers):
                    undo.callback(register(module).remove)

            for layer in layers[:start]:  # what is before the state need not run
                layer.forward = lambda hidden, *_, **__: hidden
                undo.callback(layer.__dict__.pop, "forward")
            hook("", lambda m: m.register_forward_pre_hook(enter, with_kwargs=True))
            query = family.query or family.fused_qkv
            hook(query, lambda m: m.register_forward_hook(lambda _, a, y: use("input", "attention", a, y)))
            hook(family.out, lambda m: m.register_forward_hook(lambda _, a, y: use("output", "attention", a, y)))
            hook(family.ffn_in, lambda m: m.register_forward_hook(lambda _, a, y: use("input", "ffn", a, y)))
            hook(family.ffn_out, lambda m: m.register_forward_hook(lambda _, a, y: use("output", "ffn", a, y)))
            if not family.pre_norm:
                hook(family.ffn_in, lambda m: m.register_forward_pre_hook(between))
            with suppress(_Enough):
                forward(self.model, self.batches[batch], hidden=False)
        return uses
