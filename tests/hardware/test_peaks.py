"""The peaks of this machine: the best of the measured products, kept for the next time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autolite.cache import cache_dir
from autolite.errors import TargetError
from autolite.hardware import peaks
from autolite.hardware.peaks import CLASSES
from autolite.hardware.probes import Probe, loaded, square
from autolite.measure import Timing


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def machine(monkeypatch: pytest.MonkeyPatch, gflops: Mapping[str, float], slow: float = 1.0) -> list[int]:
    """A machine with these rates, of which most rounds are `slow` times slower; a list that grows when it is timed."""
    measured: list[int] = []

    def fake(probes: Mapping[str, Probe], *_: Any, **__: Any) -> dict[str, Timing]:
        measured.append(1)
        times = {name: 2e-6 * int(name.split()[1]) ** 3 / gflops[name] for name in probes}
        return {name: Timing(((ms,), *[(slow * ms,)] * 4)) for name, ms in times.items()}

    monkeypatch.setattr(peaks, "time_interleaved", fake)
    monkeypatch.setattr(peaks, "square", lambda kernel, size: Probe(b"", {}, (size, size, size, 1)))
    monkeypatch.setattr(peaks, "loaded", lambda probes, threads: probes)
    return measured


RATES = {f"{kernel} {size}": 10.0 * i + size / 512 for i, kernel in enumerate(CLASSES, 1) for size in peaks.SIZES}


@pytest.mark.parametrize("slow", [1.0, 1.2])
def test_the_peak_is_the_best_rate_of_the_quietest_round(monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    machine(monkeypatch, RATES, slow)
    assert peaks.local_peaks(1) == pytest.approx({kernel: 10 * i + 2 for i, kernel in enumerate(CLASSES, 1)})


def test_it_is_measured_once_for_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, said = machine(monkeypatch, RATES), list[str]()
    first = peaks.local_peaks(1, said.append)
    assert said == ["measuring the peaks of this machine on 1 thread, about three seconds"]
    assert (peaks.local_peaks(1, said.append), len(said), len(measured)) == (first, 1, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps(dict.fromkeys(CLASSES, 0)), '{"fp32": "fast"}'])
def test_a_damaged_cache_file_is_measured_anew(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    measured = machine(monkeypatch, RATES)
    first = peaks.local_peaks(1)
    (file,) = cache_dir().rglob("*.json")
    file.write_text(content, encoding="utf-8")
    assert peaks.local_peaks(1) == first
    assert len(measured) == 2


def test_what_a_busy_machine_gave_is_used_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, said = machine(monkeypatch, RATES, slow=2.0), list[str]()
    for _ in range(2):
        peaks.local_peaks(1, said.append)
    assert len(measured) == 2
    assert said[1] == "other programs slowed the products by 100 %: the peaks are measured again next time"


def test_threads_that_are_not_there_are_refused() -> None:
    with pytest.raises(TargetError, match=r"threads=1000000, but this process may use \d+ processors: ask for 1 to"):
        peaks.local_peaks(10**6)


@pytest.mark.parametrize("kernel", CLASSES)
def test_each_class_multiplies_square_matrices_in_its_own_format(kernel: str) -> None:
    probe = square(kernel, 64)
    x = probe.inputs["x"]
    assert x.shape == (64, 64)
    assert x.dtype == (np.uint8 if kernel == "int8" else np.float32)
    found = loaded({"once": probe}, 1)["once"].run({})["y"]
    assert found.shape == (64, 64)
    # A product is linear in its rows: doubling them doubles the result, up to the quantization of int4's activations.
    if kernel != "int8":
        doubled = loaded({"twice": replace(probe, inputs={"x": 2 * x})}, 1)["twice"].run({})["y"]
        np.testing.assert_allclose(doubled, 2 * found, rtol=1e-4, atol=1e-4)
