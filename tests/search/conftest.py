"""A space with levels by layer for the tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolite.space import Space, load_space
from tests.search.layers import SPACE


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    file = tmp_path / "layers.yaml"
    file.write_text(SPACE, encoding="utf-8")
    return file


@pytest.fixture
def space(space_file: Path) -> Space:
    return load_space(str(space_file))
