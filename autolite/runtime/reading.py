"""Reading sequences piece by piece with ONNX Runtime: keys and values of what was read stay where the runtime has
them, and never become arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from autolite.errors import ModelError, first_line
from autolite.runtime.requirements import REQUIRES
from autolite.runtime.sequences import BEFORE, KEEP, PRESENT


class Reading:
    """Sequences of equal length that are being read.

    Where the model's attention can write new keys and values behind the earlier ones, there is room for `limit` tokens
    from the beginning, and nothing is copied; else ONNX Runtime makes a longer copy in every call.
    """

    def __init__(self, session: Any, limit: int, batch: int = 1) -> None:
        self._session, self._read = session, 0
        self._batch, self._limit, self._last = batch, limit, np.array(1)
        self._in_place = _writes_in_place(session)
        caches = [(one.name, one.shape) for one in session.get_inputs() if one.name.startswith(BEFORE)]
        self._names = {name: PRESENT + name.removeprefix(BEFORE) for name, _ in caches}
        self._binding = binding = session.io_binding()
        binding.bind_output("logits", "cpu")  # the first of the outputs from now on
        if any(one.name == KEEP for one in session.get_overridable_initializers()):
            # Not bind_cpu_input, which knows no inputs with a default
            binding.bind_ortvalue_input(KEEP, onnxruntime.OrtValue.ortvalue_from_numpy(self._last))
        for name, (_, heads, _, dim) in caches:
            room = limit if self._in_place else 0
            empty = onnxruntime.OrtValue.ortvalue_from_shape_and_type([batch, heads, room, dim], np.float32, "cpu")
            binding.bind_ortvalue_input(name, empty)
            if self._in_place:
                binding.bind_ortvalue_output(self._names[name], empty)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read the next tokens, int64 [batch, tokens], one at least; return the logits after the last of them, float32
        [batch, vocab].

        Raises:
            ModelError: if there are more than were to be read, or the model fails.
        """
        read, binding = self._read + ids.shape[1], self._binding
        if read > self._limit:
            raise ModelError(f"{read} tokens are to be read, but there is room for {self._limit}; begin with more room")
        mask = np.ones((self._batch, read), np.int64)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")  # where they were, there is no room for another number of them
        if not self._in_place:
            for present in self._names.values():
                binding.bind_output(present, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise ModelError(f"the model failed on tokens {self._read} to {read}: {first_line(error)}") from error
        self._read = read
        logits, *presents = binding.get_outputs()
        if not self._in_place:
            for name, present in zip(self._names, presents, strict=True):
                binding.bind_ortvalue_input(name, present)
        return np.asarray(logits.numpy()[:, -1])


@dataclass(frozen=True)
class Generating:
    """A whole call of a language model, to be timed: it reads the prompt, and then so many single tokens."""

    session: Any
    tokens: int

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the logits after the last token, float32 [batch, vocab]; prompts are the `input_ids` int64 [batch,
        tokens], and their tokens again are what follows."""
        ids = inputs["input_ids"]
        batch, prompt = ids.shape
        reading = Reading(self.session, prompt + self.tokens, batch)
        logits = reading.read(ids)
        for step in range(self.tokens):
            place = step % prompt
            logits = reading.read(np.ascontiguousarray(ids[:, place : place + 1]))
        return {"logits": logits}


def _writes_in_place(session: Any) -> bool:
    """Whether a model's attention is the one that can do so: emission takes the same in all layers."""
    metadata = session.get_modelmeta().custom_metadata_map
    operators = json.loads(metadata.get(REQUIRES, "{}")).get("operators", {})
    return "GroupQueryAttention" in operators.get("com.microsoft", ())
