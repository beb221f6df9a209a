"""A runtime without a runtime, for tests of everything around one: artifacts are JSON, logits come from hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autolite.errors import ModelError
from autolite.formats import FORMATS
from autolite.measure import Workload
from autolite.techniques.base import Student

FILE = "model.json"


class FakeRuntime:
    """Emits the student's shape and a digest of its weights as JSON, in milliseconds."""

    name = "fake"
    version = "1"
    formats = frozenset(FORMATS)

    def emit(self, student: Student, folder: Path, workload: Workload | None = None, tuned: bool = False) -> list[Path]:
        """Write the artifact: equal students give equal bytes."""
        digest = hashlib.sha256()
        for key, value in sorted(student.model.state_dict().items()):
            digest.update(key.encode() + value.detach().contiguous().cpu().numpy().tobytes())
        for key, encoded in sorted(student.encoded.items()):
            digest.update(f"{key}:{encoded.format}".encode())
        shape = student.shape
        record = {
            "fake": 1,
            "digest": digest.hexdigest(),
            "outputs": shape.outputs,
            "every_token": type(student.model).__name__.endswith(("ForCausalLM", "LMHeadModel")),
        }
        file = folder / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return [file]

    def load(self, file: Path, threads: int = 1) -> FakeRunner:
        """Load such an artifact.

        Raises:
            ModelError: if it is missing or not one.
        """
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return FakeRunner(record["digest"], int(record["outputs"]), bool(record["every_token"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{file} is missing, truncated or no artifact of the fake runtime: {error!r}") from error


@dataclass(frozen=True)
class FakeRunner:
    """Logits in [-1, 1) that depend on the artifact and on the ids that attention reaches, and on nothing else."""

    digest: str
    outputs: int
    every_token: bool

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call: {"logits": float32 [batch, outputs] or [batch, tokens, outputs]}."""
        ids = np.asarray(inputs["input_ids"])
        masks = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(bool)
        rows = []
        for row, mask in zip(ids, masks, strict=True):
            if self.every_token:
                rows.append(np.stack([self._logits(row[: i + 1][mask[: i + 1]]) for i in range(len(row))]))
            else:
                rows.append(self._logits(row[mask]))
        return {"logits": np.stack(rows)}

    def _logits(self, ids: np.ndarray) -> np.ndarray:
        seed = hashlib.sha256(self.digest.encode() + ids.astype(np.int64).tobytes()).digest()
        return np.random.default_rng(list(seed)).uniform(-1, 1, self.outputs).astype(np.float32)
