"""A training run kept on disk, so that it goes on where it was killed and ends with the same bits."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import nn

from autolite.errors import StorageError
from autolite.files import parts_of, write_atomically

SECONDS = 20.0  # between two writes; a run of a small model writes for about a hundredth of its time then


@dataclass(eq=False)
class Checkpoint:
    """Weights, the optimizer's state, torch's generators and the number of steps done, in one safetensors file.

    The name of `file` must say everything the run depends on; what was written under that name is gone on from.
    """

    file: Path
    _last: float = field(default_factory=time.monotonic, init=False)

    def due(self) -> bool:
        """Whether it is time to write again. When that is decides nothing about the result."""
        return time.monotonic() - self._last >= SECONDS

    def save(self, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write the run as it is after `step` steps.

        Raises:
            StorageError: if the file cannot be written.
        """
        tensors = {"step": torch.tensor(step), "random": torch.get_rng_state()}
        for device in {p.device for p in parameters if p.is_cuda}:
            tensors[f"random.{device.index}"] = torch.cuda.get_rng_state(device)
        for number, parameter in enumerate(parameters):
            tensors[f"parameter.{number}"] = parameter.detach()
            for name, value in optimizer.state[parameter].items():
                tensors[f"{name}.{number}"] = value
        # A tensor that shares memory with another cannot be written; generators and states never do.
        write_atomically(self.file, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        self._last = time.monotonic()

    def restore(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Bring everything to where the file says and return the number of steps done; 0, with nothing changed, if
        there is no file or it is damaged."""
        try:
            tensors = load(self.file.read_bytes())
        except (OSError, safetensors.SafetensorError, ValueError):
            return 0
        names = [f"parameter.{number}" for number in range(len(parameters))]
        if any(n not in tensors or tensors[n].shape != p.shape for n, p in zip(names, parameters, strict=True)):
            return 0
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(tensors.pop(f"parameter.{number}"))
        torch.set_rng_state(tensors.pop("random"))
        for name in [name for name in tensors if name.startswith("random.")]:
            torch.cuda.set_rng_state(tensors.pop(name), int(name.rpartition(".")[2]))
        step = int(tensors.pop("step"))
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            what, _, number_text = name.rpartition(".")
            states.setdefault(int(number_text), {})[what] = tensor
        for number, state in states.items():
            parameter = parameters[number]
            # Fused AdamW keeps its count of steps beside the parameter.
            optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in state.items()}
        return step

    def remove(self) -> None:
        """Forget the run, and what a process that was killed while it wrote left of a checkpoint."""
        self.file.unlink(missing_ok=True)
        for part in parts_of(self.file):
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Trunk:
    """What runs of different lengths have in common, as checkpoints at some of its steps: a longer run goes on from a
    shorter one's and ends with the same bits.

    `name` must say everything that the steps in common depend on. The `last` run is gone on from by no other.
    """

    folder: Path
    name: str
    last: bool = False

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint at a step."""
        return Checkpoint(self.folder / f"{self.name}-{step}.safetensors")

    def restore(self, most: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Bring everything to where the last checkpoint of at most `most` steps says and return its step; 0, with
        nothing changed, if there is none."""
        files = self.folder.glob(f"{self.name}-*.safetensors")
        for step in sorted((int(file.stem.rpartition("-")[2]) for file in files), reverse=True):
            if step <= most and (done := self.at(step).restore(parameters, optimizer)):
                return done
        return 0

    def save(self, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint at a step, in the place of earlier ones; a full disk only costs time later."""
        if self.last:
            return
        with suppress(StorageError):
            self.at(step).save(step, parameters, optimizer)
            for file in self.folder.glob(f"{self.name}-*.safetensors"):
                if int(file.stem.rpartition("-")[2]) < step:
                    file.unlink(missing_ok=True)
