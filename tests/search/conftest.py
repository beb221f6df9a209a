"""A search small enough to be run a dozen times in the tests: tiny teacher, tiny space, a few training steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autolite
from autolite.front import Result

SPACE = """
name: tiny
description: All four techniques, a few steps each.
steps:
  - share: {part: [none, ffn], groups: 2}
  - prune: {heads: [1.0, 0.5], ffn: {low: 0.25, high: 1.0, step: 0.25}, depth: [1.0, 0.67], round_to: 8}
  - distill: {temperature: {low: 1.0, high: 4.0, stage: recover, default: 2.0}, batch_size: 16}
  - quantize: {attention: [int8, fp32], ffn: [int8, kmeans4, fp32], embedding: [fp32, int8, int4]}
stages:
  screen: {trials: 6, effort: 2}
  recover: {trials: 3, effort: 4, max_effort: 20}
  confirm: {trials: 4, effort: 6, max_effort: 40}
start:
  - {share.part: none, prune.heads: 1.0, prune.ffn: 1.0, prune.depth: 1.0, quantize.attention: int8}
"""

RunSearch = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("space") / "tiny.yaml"
    file.write_text(SPACE, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def run_search(tiny_teacher: Path, tiny_data: Path, tiny_space: Path) -> RunSearch:
    """Return `autolite.search` on the tiny teacher; any argument can be replaced."""

    def run(**changes: Any) -> Result:
        usual = {"target": "pixel8", "space": str(tiny_space), "budget": "8trials"}
        return autolite.search(**{"model": tiny_teacher, "data": tiny_data, **usual, **changes})

    return run


@pytest.fixture(scope="session")
def finished(run_search: RunSearch, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One finished search, shared by the tests that only look at what it left."""
    return run_search(out=tmp_path_factory.mktemp("runs") / "finished")
