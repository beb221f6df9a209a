"""What flows through a model on a few training examples: the examples, and the inputs of chosen modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autolite.techniques.base import Context

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from autolite.tasks.base import Split

EXAMPLES = 256  # that scores and statistics are taken from
BATCH = 32

Uses = list[tuple["nn.Module", torch.Tensor]]


def sample(context: Context, *, others: bool = False) -> Split:
    """Return at most 256 examples of `context.train`, drawn by `context.seed`; `others` are none of these, unless these
    are all."""
    total, rng = len(context.train), np.random.default_rng(context.seed)
    chosen = rng.choice(total, min(EXAMPLES, total), replace=False)
    if others and len(rest := np.setdiff1d(np.arange(total), chosen)):
        chosen = rng.choice(rest, min(EXAMPLES, len(rest)), replace=False)
    return context.train.take(np.sort(chosen))


def owner(model: PreTrainedModel, key: str) -> nn.Module:
    """Return the module that holds the parameter called `key`."""
    return model.get_submodule(key.rpartition(".")[0])


def hidden_input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """Return the hidden state among what a layer is called with."""
    state: torch.Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return state


def hidden_output(output: Any) -> torch.Tensor:
    """Return the hidden state among what a layer returns."""
    state: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return state


def real(values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the rows of [batch, tokens, width] that are no padding, as [rows, width]."""
    mask = inputs.get("attention_mask")
    return values.flatten(0, 1) if mask is None else values[mask.bool()]


@contextmanager
def recorded(modules: Iterable[nn.Module], gradients: bool = False) -> Iterator[Uses]:
    """Collect (module, its input) for every call of the modules, in order; with `gradients` the inputs require them."""
    uses: Uses = []

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        state = hidden_input(arguments, keywords)
        if gradients and not state.requires_grad:  # it does already unless the model's own parameters are frozen
            state.requires_grad_()
        uses.append((module, state))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()
