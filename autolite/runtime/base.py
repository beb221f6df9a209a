"""What a runtime is: it emits a student as files and loads files as something that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from autolite.measure import Runner, Workload
from autolite.techniques.base import Student


class Runtime(Protocol):
    """One file, one registry line. Instances are stateless."""

    name: str
    formats: frozenset[str]  # number formats that it can run

    @property
    def version(self) -> str:
        """Version of the installed runtime."""
        ...

    def emit(self, student: Student, folder: Path, workload: Workload | None = None, tuned: bool = False) -> list[Path]:
        """Write the artifact into `folder` and return its files, the one to load first. Of equivalent forms it takes
        the one that is fastest at `workload`: as a rule, or with `tuned` by measurements on this machine, which are
        made once and kept. Deterministic: equal students and measurements give equal bytes. The graph takes int64
        `input_ids` and `attention_mask` [batch, tokens] (and `token_type_ids` where the model has token types), or
        float32 `pixel_values` [batch, channels, height, width], and returns float32 `logits`. A decoder may go on from
        earlier calls beside that: then its runner is an `autolite.measure.Decoder`."""
        ...

    def load(self, file: Path, threads: int = 1) -> Runner:
        """Load an artifact. Raises ModelError if it is missing, truncated or not loadable."""
        ...
