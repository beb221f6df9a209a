"""The teacher's outputs on the training batches: computed once, kept in memory, and the logits on disk too."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from autolite.files import write_atomically
from autolite.tasks.base import Batch
from autolite.tasks.encoding import fingerprint
from autolite.techniques.base import Context, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = tuple[torch.Tensor, ...]

# Tokens from which the processor's fused attention kernel is faster than plain products; on ten tokens its backward
# pass is up to eight times slower (batch 32, bfloat16).
LONG = 192
LARGEST_FILE = 2**28  # bytes; more logits than that are cheaper to compute again than to rewrite


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


def own_inputs(inputs: dict[str, torch.Tensor], student: Student) -> dict[str, torch.Tensor]:
    """Return a batch's inputs, made for the teacher, as the student reads them: in its own vocabulary's ids."""
    if student.vocabulary is None:
        return inputs
    ids = inputs["input_ids"]
    return inputs | {"input_ids": torch.from_numpy(student.vocabulary.table).to(ids.device)[ids]}


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


class TeacherOutputs:
    """What the teacher says about each of a fixed list of batches; a batch is run when it is first asked for.

    Everything lives in memory up to `limit` bytes and is computed again beyond that. Hidden states are rounded to
    bfloat16 whether they were kept or not, so that a full memory changes no result.

    Attributes:
        batches: the training batches, in the task's order.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], device: str, file: Path | None, limit: int):
        self.batches = batches
        model.train(False)
        self._model, self._device, self._file, self._free = model, device, file, limit
        self._logits: dict[int, torch.Tensor] = {}
        self._hidden: dict[int, States] = {}
        self._unsaved = False
        self._read()

    def of(self, index: int, hidden: bool) -> tuple[torch.Tensor, States]:
        """Return logits and (if `hidden`) the bfloat16 state after each layer, for batch number `index`."""
        if index not in self._logits or (hidden and index not in self._hidden):
            logits, states = self._run(index, hidden)
            if index not in self._logits and self._keep(logits):
                self._logits[index], self._unsaved = logits.cpu(), True
            if hidden and self._keep(*states):
                self._hidden[index] = tuple(state.cpu() for state in states)
            return self._logits.get(index, logits).to(self._device), states
        states = self._hidden[index] if hidden else ()
        return self._logits[index].to(self._device), tuple(state.to(self._device) for state in states)

    @torch.no_grad()
    def _run(self, index: int, hidden: bool) -> tuple[torch.Tensor, States]:
        inputs, _ = to_tensors(self.batches[index], self._device)
        with autocast(self._device):
            logits, states = forward(self._model, inputs, hidden)
        # The rows of a classifier are kept in float32, as the file has them.
        logits = logits.float() if logits.ndim == 2 else logits
        return logits, tuple(state.to(torch.bfloat16) for state in states)

    def _keep(self, *tensors: torch.Tensor) -> bool:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self._free:
            return False
        self._free -= size
        return True

    def _table(self) -> np.ndarray | None:
        """The file's logits [examples, classes], NaN where not computed; None if there is no usable file."""
        examples = sum(len(batch.indices) for batch in self.batches)
        try:
            table = np.load(self._file, allow_pickle=False) if self._file else None
        except (OSError, ValueError, EOFError):
            return None
        usable = table is not None and table.ndim == 2 and len(table) == examples and table.dtype == np.float32
        return table if usable else None

    def _read(self) -> None:
        table = self._table()
        if table is None:
            return
        for index, batch in enumerate(self.batches):
            rows = torch.from_numpy(table[batch.indices])
            if rows.isfinite().all() and self._keep(rows):
                self._logits[index] = rows

    def save(self) -> None:
        """Write the logits of a classifier to the file, together with what other processes wrote meanwhile.

        Raises:
            StorageError: if the file cannot be written.
        """
        if self._file is None or not self._unsaved or next(iter(self._logits.values())).ndim != 2:
            return
        examples, classes = sum(len(b.indices) for b in self.batches), next(iter(self._logits.values())).shape[1]
        if 4 * examples * classes > LARGEST_FILE:
            return
        table = self._table()
        if table is None or table.shape[1] != classes:
            table = np.full((examples, classes), np.nan, np.float32)
        for index, rows in self._logits.items():
            table[self.batches[index].indices] = rows.numpy()
        stream = io.BytesIO()
        np.save(stream, table)
        write_atomically(self._file, stream.getvalue())
        self._unsaved = False


def teacher_outputs(context: Context, batch_size: int) -> TeacherOutputs:
    """Return the teacher's outputs on `context.train` in batches of `batch_size`, from `context.memory` if there.

    They are kept by batch size because a row's last bits depend on the batch it was computed in.
    """
    key = f"teacher-{fingerprint([context.train])[:12]}-{batch_size}"
    name = f"{key}-{context.device}"
    if name not in context.memory:
        model: Any = context.teacher.model
        if model.device != torch.device(context.device):
            model = deepcopy(model).to(context.device)
        batches = list(context.task.batches(context.train, batch_size, context.pad_id))
        file = None if context.cache is None else context.cache / f"{key}.npy"
        limit = psutil.virtual_memory().available // 4
        context.memory[name] = TeacherOutputs(model, batches, context.device, file, limit)
    outputs: TeacherOutputs = context.memory[name]
    return outputs
