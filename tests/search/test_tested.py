"""Which finalists run side by side on the test split."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.search.tested import _together


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 400))
def test_artifacts_run_in_groups_that_memory_has_room_for(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], free: int
) -> None:
    folder = tmp_path_factory.mktemp("artifacts")
    files: dict[str, Path] = {}
    for number, size in enumerate(sizes):
        files[str(number)] = folder / f"{number}.onnx"
        files[str(number)].write_bytes(b"x" * size)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        groups = list(_together(files))
    assert [name for group in groups for name in group] == list(files)
    for group, after in zip(groups, [*groups[1:], None], strict=False):
        together = sum(sizes[int(name)] for name in group)
        assert together <= free / 4 or len(group) == 1
        assert after is None or together + sizes[int(after[0])] > free / 4  # no group ends early
