"""What a teacher says about the training batches: computed once, kept in memory and on disk."""

from __future__ import annotations

import hashlib
import inspect
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from autolite.errors import DataError
from autolite.tasks.base import IGNORED, Batch, Split
from autolite.tasks.encoding import fingerprint
from autolite.techniques.attention import recorded
from autolite.techniques.base import Context, weights_digest
from autolite.techniques.features import FeatureCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autolite.vocabulary import Vocabulary

States = tuple[torch.Tensor, ...]

# Tokens from which the processor's fused attention kernel is faster than plain products; on ten tokens its backward
# pass is up to eight times slower (batch 32, bfloat16).
LONG = 192
PATIENCE = 60.0  # seconds after which what another process should have made is made here


def autocast(device: str) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast where the processor multiplies bfloat16 natively, and a null context elsewhere."""
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        # oneDNN says yes on x86 without the instructions too, where its emulation is slower than float32.
        x86 = torch.cpu.get_capabilities().get("architecture") in {"x86_64", "AMD64"}
        native = torch.cpu._is_avx512_bf16_supported() if x86 else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        native = False
    return torch.autocast(kind, torch.bfloat16) if native else nullcontext()


def to_tensors(batch: Batch, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs by name and the labels of a batch as tensors on `device`."""
    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
    return inputs, torch.from_numpy(np.ascontiguousarray(batch.labels)).to(device)


def own_inputs(inputs: dict[str, torch.Tensor], vocabulary: Vocabulary | None) -> dict[str, torch.Tensor]:
    """Return a batch's inputs, made for the teacher, as a student with this vocabulary reads them."""
    if vocabulary is None:
        return inputs
    ids = inputs["input_ids"]
    return inputs | {"input_ids": torch.from_numpy(vocabulary.table).to(ids.device)[ids]}


def forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor], hidden: bool) -> tuple[torch.Tensor, States]:
    """Run `model` and return its logits and, if asked, the hidden state after each layer ([batch, tokens, width]).

    Inputs that it does not take are left out; a model that tells no hidden states has none.
    """
    taken = inspect.signature(model.forward).parameters
    inputs = {name: tensor for name, tensor in inputs.items() if name in taken}
    tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else LONG
    short_on_cpu = model.device.type == "cpu" and tokens < LONG
    with sdpa_kernel(SDPBackend.MATH) if short_on_cpu else nullcontext():
        output = model(**inputs, output_hidden_states=True) if hidden else model(**inputs)
    states = getattr(output, "hidden_states", None) or () if hidden else ()
    # Models that shorten or pool the sequence in between have states of other lengths, which no mask fits.
    return output.logits, tuple(state for state in states[1:] if state.shape[:2] == output.hidden_states[0].shape[:2])


Features = dict[str, torch.Tensor]


@dataclass
class Teaching:
    """On how many training batches teachers were run, and for how many seconds, waiting for other processes that do so
    included. An epoch has so many batches."""

    batches: int = 0
    seconds: float = 0.0
    epoch: int = 0

    def since(self, begun: Teaching) -> Teaching:
        """Return what came to it since it was as `begun`."""
        return Teaching(self.batches - begun.batches, self.seconds - begun.seconds, self.epoch)


def teaching(context: Context) -> Teaching:
    """Return what this process did so far; it goes on counting."""
    found: Teaching = context.memory.setdefault("teaching", Teaching())
    return found


def observe(model: PreTrainedModel, inputs: dict[str, torch.Tensor], hidden: bool, layers: Collection[int]) -> Features:
    """Run `model` once and return what a distillation loss looks at, by name.

    "logits"; with `hidden` the number of "states" that the model tells, and after each layer L its "state.L" [batch,
    tokens, width]; for each of `layers` its "query.L", "key.L", "value.L" and "allowed.L" (see `Attention`).
    """
    with ExitStack() as stack:
        stack.enter_context(autocast(str(model.device)))
        attention = stack.enter_context(recorded(model)) if layers else []
        logits, states = forward(model, inputs, hidden)
    found = {"logits": logits}
    if hidden:
        found["states"] = torch.tensor(len(states))
    found |= {f"state.{layer}": state for layer, state in enumerate(states)}
    return found | {f"{name}.{layer}": tensor for layer in layers for name, tensor in vars(attention[layer]).items()}


class TeacherOutputs:
    """What a teacher says about each of a fixed list of batches; a batch is run when it is first asked for.

    Everything lives in memory up to `limit` bytes, and in `cache`; it is computed again beyond that. All but the logits
    of a classifier is rounded to bfloat16 whether it was kept or not, so that a full memory changes no result.

    Attributes:
        batches: the training batches, in the task's order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        digest: str,
        batches: Sequence[Batch],
        device: str,
        cache: FeatureCache | None,
        limit: int,
        teaching: Teaching,
        counts: bool = True,
    ) -> None:
        """Take a model whose weights have this digest. Of several teachers one `counts` the batches."""
        self.batches = batches
        model.train(False)
        self._model, self._device, self._cache, self._free = model, device, cache, limit
        self._kept: dict[int, Features] = {}
        self._keys: dict[int, str] = {}
        self._digest, self._teaching, self._counts = digest, teaching, counts
        self._shares = True  # whether processes find what the others write, and in time

    def of(self, index: int, hidden: bool, layers: Collection[int] = (), ahead: Sequence[int] = ()) -> Features:
        """Return what `observe` says of batch number `index`, without "allowed".

        While another process that shares the cache makes that, this one makes it of a batch of those `ahead`, which it
        will be asked for next: so they share out what all of them need. After one that does not end, no other is waited
        for.
        """
        known = self._known(index, hidden, layers)
        if known is None:
            begun = time.monotonic()
            known = self._made(index, hidden, layers)
            while known is None:
                free = (self._made(each, hidden, layers) for each in ahead if not self._there(each))
                if not any(free):
                    threading.Event().wait(0.01)
                self._shares &= time.monotonic() - begun < PATIENCE
                known = self._known(index, hidden, layers) or self._made(index, hidden, layers)
            self._teaching.seconds += time.monotonic() - begun
        return {name: tensor.to(self._device) for name, tensor in known.items()}

    def _known(self, index: int, hidden: bool, layers: Collection[int]) -> Features | None:
        """Return what is kept of a batch, if that is all that is asked for."""
        known = self._kept.get(index, {})
        if not _has(known, hidden, layers):
            known = self._recalled(index)
            self._keep(index, known)
        return known if _has(known, hidden, layers) else None

    def _made(self, index: int, hidden: bool, layers: Collection[int]) -> Features | None:
        """Run the teacher on a batch and keep what it says; None if another process does just now."""
        shared = self._cache if self._shares else None
        with nullcontext(True) if shared is None else shared.claimed(self._key(index)) as free:
            if not free:
                return None
            known = self._known(index, hidden, layers)  # which another process may have made since
            if known is None:
                known = self._recalled(index) | self._run(index, hidden, layers)
                plain = {name: tensor.cpu() for name, tensor in known.items()}
                if self._cache is not None:
                    self._shares &= self._cache.write(self._key(index), plain)
                self._keep(index, plain)
            return known

    def _there(self, index: int) -> bool:
        return bool(self._kept.get(index)) or (self._cache is not None and self._cache.has(self._key(index)))

    def _recalled(self, index: int) -> Features:
        kept = self._kept.get(index, {})
        return kept if self._cache is None else kept | self._cache.read(self._key(index))

    @torch.no_grad()
    def _run(self, index: int, hidden: bool, layers: Collection[int]) -> Features:
        inputs, _ = to_tensors(self.batches[index], self._device)
        found = observe(self._model, inputs, hidden, layers)
        self._teaching.batches += self._counts
        return {name: _rounded(name, tensor) for name, tensor in found.items() if not name.startswith("allowed")}

    def _keep(self, index: int, features: Features) -> None:
        kept = self._kept.setdefault(index, {})
        new = {name: tensor for name, tensor in features.items() if name not in kept}
        size = sum(tensor.numel() * tensor.element_size() for tensor in new.values())
        if size <= self._free:
            self._free -= size
            kept |= {name: tensor.cpu() for name, tensor in new.items()}

    def _key(self, index: int) -> str:
        """Name by content what the outputs depend on: the weights, the batch, and the arithmetic."""
        if index not in self._keys:
            self._keys[index] = self._named(index)
        return self._keys[index]

    def _named(self, index: int) -> str:
        precise = isinstance(autocast(self._device), nullcontext)
        digest = hashlib.sha256(f"{self._digest} {torch.device(self._device).type} {precise}".encode())
        for name, array in sorted(self.batches[index].inputs.items()):
            digest.update(f" {name} {array.dtype} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()[:32]


def _has(known: Features, hidden: bool, layers: Collection[int]) -> bool:
    wanted = ["logits", *(f"query.{layer}" for layer in layers), *(["states"] if hidden else [])]
    return all(name in known for name in wanted)


def _rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "logits":
        return tensor.float() if tensor.ndim == 2 else tensor
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def training_split(context: Context, epoch: int) -> Split:
    """Return the examples of an epoch (from 0): labelled and unlabelled ones, as `context.augment` changes them.

    Raises:
        DataError: if there are none, or the augmentation returns no split of examples with a label each.
    """
    split = context.train if context.unlabelled is None else joined(context.train, context.unlabelled)
    if context.augment is not None:
        changed = context.augment(split, np.random.default_rng([context.seed, epoch]))
        labels = len(changed) if len(split.labels) else 0
        if len(changed.labels) != labels:
            raise DataError(
                f"the augmentation must return a Split with a label for each example ({IGNORED} where it is unknown), "
                f"but returned {len(changed)} examples and {len(changed.labels)} labels"
            )
        split = changed
    if not len(split):
        raise DataError("distill: the training split is empty")
    return split


def joined(first: Split, second: Split) -> Split:
    """Return the examples of both under the name of the first; what has no token types has zeros if the other has."""
    types: list[np.ndarray] | None = None
    if first.token_type_ids is not None or second.token_type_ids is not None:
        types = [
            row
            for split in (first, second)
            for row in split.token_type_ids or [np.zeros_like(ids) for ids in split.input_ids]
        ]
    return Split(
        first.name, [*first.input_ids, *second.input_ids], types, np.concatenate([first.labels, second.labels])
    )


def teacher_outputs(context: Context, batch_size: int, epoch: int = 0) -> TeacherOutputs:
    """Return the teacher's outputs on an epoch's examples in batches of `batch_size`; from `context.memory`, unless
    every epoch has examples of its own.

    They are kept by batch because a row's last bits depend on the batch it was computed in.
    """
    return outputs_of(context.teacher.model, "teacher", context, batch_size, epoch)


def outputs_of(model: PreTrainedModel, name: str, context: Context, batch_size: int, epoch: int = 0) -> TeacherOutputs:
    """Return what `teacher_outputs` does of another teacher, known by `name`."""
    split = training_split(context, epoch)
    key = f"{name}-{fingerprint([split])[:12]}-{batch_size}-{context.device}"
    if key in context.memory:
        known: TeacherOutputs = context.memory[key]
        return known
    place = f"{name} on {context.device}"
    if place not in context.memory:
        moved: Any = model
        if moved.device != torch.device(context.device):
            moved = deepcopy(moved).to(context.device)
        context.memory[place] = moved, weights_digest(model)
    moved, digest = context.memory[place]
    batches = list(context.task.batches(split, batch_size, context.pad_id))
    limit = psutil.virtual_memory().available // 4
    count = teaching(context)
    count.epoch = max(count.epoch, len(batches))
    outputs = TeacherOutputs(moved, digest, batches, context.device, _cache(context), limit, count, name == "teacher")
    if context.augment is None:
        context.memory[key] = outputs
    return outputs


def _cache(context: Context) -> FeatureCache | None:
    if context.cache is None or not context.cache_limit:
        return None
    cache: FeatureCache = context.memory.setdefault(
        "features", FeatureCache(context.cache / "teacher", context.cache_limit)
    )
    return cache
