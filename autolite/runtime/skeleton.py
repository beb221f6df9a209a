"""Skeletons: what any transformers model computes, without its weights, as torch's exporter writes it down.

The exporter takes seconds even for tiny models, and folds, merges and renames the weights that it sees. So the model is
exported as a function of its weights: the graph has an input for each of them, serves every student of one structure,
and its nodes name the parameter that they read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autolite.errors import ModelError, first_line
from autolite.runtime.graph import OPSET
from autolite.unmapped import sample

# Samples are longer than 1 in each direction that may vary: the exporter takes a 1 for a constant.
SAMPLE = (2, 7)
# What is tried, in this order: operator set, and the attention implementation (None: the model's own). The newest has
# attention as one operator; the older one, without it, serves where that cannot express the model's attention.
ATTEMPTS: tuple[tuple[int, str | None], ...] = ((OPSET, None), (20, "eager"))
# Of a configuration: what says how the model is stored, and nothing of what it computes.
_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version")


@dataclass(frozen=True, eq=False)
class Skeleton:
    """An exported graph (onnx_ir) whose inputs are the weights and the model's inputs, by their value in it."""

    graph: Any
    parameters: Mapping[Any, str]
    inputs: Mapping[Any, str]


def skeletons(model: PreTrainedModel) -> Iterator[Skeleton]:
    """Yield the model's skeleton, and then others that compute the same by other operators, for when the runtime
    cannot run the first.

    Raises:
        ModelError: if torch cannot export the model at all, or its positions change with the length of the input: the
            exporter would keep those of the length that it saw.
    """
    for module in model.modules():
        if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
            raise ModelError(
                f"rotary positions of type '{module.rope_type}' change with the length and cannot be emitted"
            )
    failure: Exception | None = None
    found = False
    for opset, attention in ATTEMPTS:
        try:
            with _as_exportable(model, attention), _silence(), torch.no_grad():
                skeleton = _export(model, opset)
        except Exception as error:  # of any kind: the exporter runs the model's own code, and much of its own
            failure = failure or error
        else:
            found = True
            yield skeleton
    if not found:
        assert failure is not None
        raise ModelError(
            f"torch cannot export {type(model).__name__} to ONNX, so that there is nothing to run it with: "
            f"{_reason(failure)}"
        ) from failure


def structure(model: PreTrainedModel) -> str:
    """Return a digest of all that a skeleton depends on: class, configuration, and parameters but for their values."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _ABOUT_FILES}
    first: dict[int, str] = {}
    digest = hashlib.sha256(f"{type(model).__qualname__} {sorted(settings.items(), key=str)}".encode())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        digest.update(f"{name} {tuple(parameter.shape)} {first.setdefault(id(parameter), name)}".encode())
    for name, buffer in model.named_buffers():
        digest.update(name.encode() + buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _OfWeights(nn.Module):
    """The model as a function of its weights and inputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, parameters: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(self.model, parameters, (), inputs).logits


def _export(model: PreTrainedModel, opset: int) -> Skeleton:
    from onnx_ir.passes import common

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    inputs = sample(model, *SAMPLE)
    open_dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program: Any = torch.onnx.export(
        _OfWeights(model),
        kwargs={"parameters": weights, "inputs": inputs},
        dynamic_shapes={"parameters": dict.fromkeys(weights), "inputs": dict.fromkeys(inputs, open_dims)},
        dynamo=True,
        opset_version=opset,
        verbose=False,
    )
    exported = program.model
    for clean in (
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
    ):
        exported = clean(exported).model
    values = list(exported.graph.inputs)
    return Skeleton(
        exported.graph,
        dict(zip(values[: len(weights)], weights, strict=True)),
        dict(zip(values[len(weights) :], inputs, strict=True)),
    )


@contextmanager
def _as_exportable(model: PreTrainedModel, attention: str | None) -> Iterator[None]:
    """Choose the implementations of parts that the exporter knows, and no cache of keys and values, for a while."""
    config: Any = model.config
    switch: Any = model
    cached, used = getattr(config, "use_cache", None), config._attn_implementation
    mixes = model._can_set_experts_implementation()
    experts = config._experts_implementation if mixes else None
    try:
        if cached is not None:
            config.use_cache = False
        if mixes:
            switch.set_experts_implementation("batched_mm")
        if attention is not None:
            switch.set_attn_implementation(attention)
        yield
    finally:
        if cached is not None:
            config.use_cache = cached
        if mixes:
            switch.set_experts_implementation(experts)
        if attention is not None:
            switch.set_attn_implementation(used)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what the exporter prints, logs and warns of to itself; what goes wrong arrives as an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """The first line of what started it all."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return first_line(error)
