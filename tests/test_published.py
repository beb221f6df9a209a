"""The table of published times: what is in it can be priced, and what is wrong in it is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # whose files import each other by name

import published

from autolite.hardware.profile_files import load_profile, profile_names
from autolite.measure import Measurement

ROWS, MODELS, SOURCES = published.load()


def test_every_row_is_of_a_shipped_device_and_used() -> None:
    assert {row.device for row in ROWS} <= set(profile_names())
    assert {row.model for row in ROWS} == set(MODELS)
    assert {row.source for row in ROWS} == set(SOURCES)
    threads = {device: load_profile(device).threads for device in {row.device for row in ROWS}}
    assert all(1 <= row.threads <= threads[row.device] for row in ROWS)
    assert all(row.value > 0 for row in ROWS)
    assert len({(row.device, row.model, row.format, row.workload, row.metric, row.source) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("bert-base", 85), ("bert-large", 302), ("llama-7b", 6738 - 131), ("llama-3-8b", 8030 - 525), ("tinyllama", 1034)],
)
def test_shapes_have_the_matrices_of_their_models(name: str, millions: float) -> None:
    """Of the layers and the head: what is multiplied, so without the table of words."""
    from autolite.products import matmuls

    found = sum(each.n * each.k for each in matmuls(published.shape(name, MODELS[name], "fp32")))
    assert found / 1e6 == pytest.approx(millions, rel=0.005)


def test_rates_and_times_are_compared_the_same_way() -> None:
    rate, time = (next(row for row in ROWS if row.metric == metric) for metric in ("tokens_per_second", "latency_ms"))
    half, twice = (Measurement("", factor * rate.value, 0, 1, "predicted") for factor in (0.5, 2))
    assert published.slowness(rate, half) == 2
    assert published.slowness(rate, twice) == 0.5
    assert published.slowness(time, Measurement("", 2 * time.value, 0, 1, "predicted")) == 2
    assert "2 rows: a factor of 2.00 off in the mean" in published.summary(np.array([0.5, 2]), np.array([True, False]))


def test_all_are_priced_and_shown() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        published.show(console)
    text = captured.get()
    assert f"all: {len(ROWS)} rows" in text
    assert all(f"fitted {kind}:" in text for kind in published.FITTED)


@pytest.mark.parametrize(
    ("place", "value"), [(1, "bert-bass"), (2, "fp16"), (6, "latency"), (8, "nowhere"), (9, "maybe"), (9, False)]
)
def test_what_is_unknown_is_named_with_its_row(place: int, value: object, tmp_path: Path) -> None:
    data = yaml.safe_load(published.FILE.read_text(encoding="utf-8"))
    data["rows"][3][place] = value
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=f"unknown .* {value!r}"):
        published.load(tmp_path / "rows.yaml")
