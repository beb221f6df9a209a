"""Every way to quantize can be searched, with mixed precision by one number and recovery after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolite.plan import make_step
from autolite.space import load_space
from tests.conftest import RunSearch

SPACE = """
name: numbers
description: Formats, how they are reached, and what is learnt after that.
steps:
  - prune: {ffn: [1.0, 0.5], round_to: 8}
  - distill: {batch_size: 16}
  - quantize:
      attention: [int8, int4]
      ffn: [int8, int4]
      average_bits: [0.0, 6.5]
      levels: int4,int8,bf16
      rounding: [nearest, weighted, gptq]
      scaling: [none, awq, smooth]
      calibration: [mse, minmax]
  - recover: {batch_size: 16, alpha: {low: 0.0, high: 0.5}}
stages:
  screen: {trials: 4, effort: 2}
  recover: {trials: 2, effort: 3, max_effort: 10}
  confirm: {trials: 2, effort: 4, max_effort: 10}
start:
  - {prune.ffn: 0.5, quantize.average_bits: 6.5, quantize.rounding: gptq, quantize.scaling: awq}
  - {prune.ffn: 1.0, quantize.average_bits: 0.0, quantize.attention: int4, quantize.rounding: weighted}
"""


@pytest.fixture
def space(tmp_path: Path) -> Path:
    file = tmp_path / "numbers.yaml"
    file.write_text(SPACE, encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_search_over_all_of_it_ends_with_explicit_plans(space: Path, run_search: RunSearch, tmp_path: Path) -> None:
    front = run_search(out=tmp_path / "run", space=str(space), budget="4trials").front
    assert front.candidates
    for candidate in front.candidates:
        quantize = next(s.config.model_dump() for s in candidate.plan.steps if s.technique == "quantize")
        assert quantize["average_bits"] == 0, "what was asked for as a number is formats by now"
        recovers = any(step.technique == "recover" for step in candidate.plan.steps)
        assert recovers == any("int4" in quantize[part] for part in ("attention", "ffn"))
    files = list((tmp_path / "run").rglob("*.safetensors"))
    assert files


def test_formats_that_are_trained_for_are_no_free_variants(space: Path) -> None:
    loaded = load_space(str(space))
    assert loaded.trains_formats
    assert not load_space("default").trains_formats
    params = loaded.complete({})
    assert all(
        {name for name in other if other[name] != params[name]} <= {"quantize.attention", "quantize.ffn"}
        for other in loaded.variants(params)
    )


def test_levels_are_one_text_in_a_space() -> None:
    assert make_step("quantize", {"levels": "int4, int8"}) == make_step("quantize", {"levels": ["int4", "int8"]})
