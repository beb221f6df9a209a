"""This machine as a target: the fit finds the numbers behind synthetic times, and a real one is measured and kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autolite.cache import cache_dir
from autolite.errors import TargetError
from autolite.formats import FORMATS
from autolite.hardware import load_target, local
from autolite.hardware.fit import Machine, fit_profile
from autolite.hardware.predict import predict
from autolite.hardware.probes import CHAIN, HEADS, KERNELS, LAYERS, ROWS, SIZES, Probe
from autolite.hardware.profile import Profile
from autolite.measure import Timing, Workload
from tests.shapes import bert_shape

SPEED = {"fp32": 200e3, "int8": 600e3, "int7": 800e3, "int4": 250e3, "attention": 150e3}  # FLOPs a microsecond
HALVES = {"fp32": (4, 0, 10), "int8": (6, 50, 100), "int7": (5, 40, 110), "int4": (1, 30, 80), "attention": (0, 10, 5)}
SOFTMAX, BANDWIDTH, STALL, SHARE, DISPATCH, FIXED = 12.0, 20e3, 0.8, 12e6, 0.4, 5.0
MACHINE = Machine("local", "a processor", 1, 8e9, 32.0 * 2**20)


def product(kernel: str, m: float, k: float, n: float) -> float:
    rows, columns, depth = HALVES[kernel]
    return 2 * m * k * n / SPEED[kernel] * (1 + rows / m + columns / n + depth / k)


def world() -> tuple[dict[str, float], dict[str, Probe]]:
    """Microseconds of every probe on a machine whose numbers are the constants above."""
    times: dict[str, float] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for kernel in KERNELS:
        for k, n in SIZES:
            for m in ROWS:
                name = f"{kernel} {m} {k} {n}"
                times[name], sizes[name] = product(kernel, m, k, n), (m, k, n, 1)
    for heads, width, tokens in HEADS:
        name = f"attention {heads} {width} {tokens}"
        times[name] = heads * (product("attention", tokens, 2 * width, tokens) + tokens / SOFTMAX)
        sizes[name] = (tokens, 2 * width, tokens, heads)
    alone = product("fp32", 16, 384, 1536) + product("fp32", 16, 1536, 384)
    nbytes = 2 * 4 * 384 * 1536
    for depth in LAYERS:
        missing = min(1.0, max(0.0, depth * nbytes / SHARE - 1))
        times[f"layers {depth}"] = depth * (alone + STALL * missing * nbytes / BANDWIDTH)
    times["memory"], sizes["memory"] = 4 * 2048 * 8192 / BANDWIDTH, (1, 2048, 8192, 1)
    times |= {
        "activation": 64 * 1536 / 2e3,
        "approximation": 64 * 1536 / 3.2e3,
        "normalization": 64 * 384 / 3e3,
        "copy": 12 * 64 * 1536 / 100e3,
    }
    times = {name: time + DISPATCH + FIXED for name, time in times.items()}
    times |= {f"chain {length}": FIXED + length * DISPATCH for length in CHAIN}
    return times, {name: Probe(b"", {}, sizes.get(name, ())) for name in times}


def timings(times: Mapping[str, float], slow: float = 1.0) -> dict[str, Timing]:
    """Rounds of which the quietest is undisturbed and the others take `slow` times as long."""
    return {name: Timing(((us / 1e3,), *[(slow * us / 1e3,)] * 4)) for name, us in times.items()}


def fit(times: Mapping[str, float], models: Mapping[str, Probe], slow: float = 1.0) -> Profile:
    return fit_profile(timings(times, slow), models, MACHINE, "ONNX Runtime 1.0")


@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_the_fit_finds_the_numbers_behind_the_times_whatever_else_ran_in_most_rounds(slow: float) -> None:
    profile = fit(*world(), slow=slow)
    for kernel in (*KERNELS, "attention"):
        assert profile.unit.peak[kernel].value == pytest.approx(SPEED[kernel] / 1e3, rel=0.02)
        found = profile.efficiency[kernel]
        assert (found.rows.value, found.columns.value, found.depth.value) == pytest.approx(
            HALVES[kernel], rel=0.1, abs=0.5
        )
    assert profile.unit.softmax is not None
    expected = {
        profile.unit.softmax: SOFTMAX,
        profile.unit.elementwise["activation"]: 2.0,
        profile.unit.elementwise["approximation"]: 3.2,
        profile.unit.elementwise["normalization"]: 3.0,
        profile.memory.bandwidth: BANDWIDTH / 1e3,
        profile.memory.stall: STALL,
        profile.cache.size: SHARE / 1e6,
        profile.cache.bandwidth: 100.0,
        profile.dispatch: DISPATCH,
        profile.fixed: FIXED,
    }
    for number, value in expected.items():
        assert number.value == pytest.approx(value, rel=0.1), number
        assert number.kind in ("measured", "calibrated")
        assert number.sigma > 0


def test_codes_of_seven_bits_take_the_kernel_of_int8_where_that_is_exact() -> None:
    times, models = world()
    assert fit(times, models).formats["int7"] == ("int7",)
    assert fit(times, models).formats["kmeans4"] == ("int7", "fp32")
    times = {name: time for name, time in times.items() if not name.startswith("int7")}
    profile = fit(times, models)
    assert profile.formats["int7"] == ("int8",)
    assert profile.formats["int4"] == ("int4", "int8", "fp32")
    assert set(profile.formats) == set(FORMATS)


def test_rounds_that_took_a_thousand_times_as_long_make_numbers_unsure_and_nothing_fail() -> None:
    times, models = world()
    disturbed = {name: Timing((*[(us / 1e3,)] * 3, *[(us,)] * 2)) for name, us in times.items()}
    profile = fit_profile(disturbed, models, MACHINE, "ONNX Runtime 1.0")
    assert profile.unit.elementwise["normalization"].value == pytest.approx(3.0, rel=0.1)
    assert profile.unit.elementwise["normalization"].sigma == profile.fixed.sigma == 1


def test_a_few_disturbed_probes_do_not_bend_the_fit() -> None:
    times, models = world()
    for name in ("fp32 128 768 3072", "fp32 64 768 3072", "int8 16 128 512"):
        times[name] *= 3
    profile = fit(times, models)
    assert profile.unit.peak["fp32"].value == pytest.approx(SPEED["fp32"] / 1e3, rel=0.05)
    assert profile.unit.peak["int8"].value == pytest.approx(SPEED["int8"] / 1e3, rel=0.05)


def test_weights_that_the_machine_reads_while_it_computes_have_no_stall() -> None:
    times, models = world()
    for depth in LAYERS:
        times[f"layers {depth}"] = depth * (times["fp32 16 384 1536"] + times["fp32 16 1536 384"] - 11)
    assert fit(times, models).memory.stall.value == 0


class TestLocalProfile:
    @pytest.fixture(autouse=True)
    def _own_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def synthetic(self, monkeypatch: pytest.MonkeyPatch, slow: float = 1.0) -> list[int]:
        """Put the synthetic machine in the place of this one; return a list that grows with each measurement."""
        measured: list[int] = []
        times, models = world()

        def fake(*_: Any, **__: Any) -> dict[str, Timing]:
            measured.append(1)
            return timings(times, slow)

        monkeypatch.setattr(local, "probes", lambda cache, saturated: models)
        monkeypatch.setattr(local, "loaded", lambda models, threads: models)
        monkeypatch.setattr(local, "time_interleaved", fake)
        return measured

    def test_it_is_measured_once_and_then_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured, said = self.synthetic(monkeypatch), list[str]()
        first = load_target("local", 1, said.append)
        assert first.name == "local"
        assert first.threads == 1
        assert said == ["measuring this machine on 1 thread, about twelve seconds"]
        again = load_target("local", 1)
        assert (again, len(measured)) == (first, 1)
        local.local_profile(1, refresh=True)
        assert len(measured) == 2
        if (os.cpu_count() or 1) > 1:
            assert load_target("local", 2).threads == 2
            assert len(measured) == 3

    def test_a_damaged_cache_file_is_measured_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = self.synthetic(monkeypatch)
        first = local.local_profile(1)
        (file,) = cache_dir().rglob("*.yaml")
        file.write_text(file.read_text()[:300])
        assert local.local_profile(1) == first
        assert len(measured) == 2
        assert [f.name for f in cache_dir().rglob("*") if f.is_file()] == [file.name]

    def test_what_a_busy_machine_gave_is_used_but_not_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured, said = self.synthetic(monkeypatch, slow=2.0), list[str]()
        for _ in range(2):
            local.local_profile(1, progress=said.append)
        assert len(measured) == 2
        assert said[1] == "other programs slowed the probes by 100 %: this machine is measured again next time"

    def test_a_cache_that_cannot_be_written_is_no_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.synthetic(monkeypatch)
        (tmp_path / "cache").write_text("a file where the folder should be")
        assert local.local_profile(1).name == "local"

    @pytest.mark.parametrize("threads", [0, -1, 10**6])
    def test_threads_that_are_not_there_are_refused(self, threads: int) -> None:
        with pytest.raises(
            TargetError, match=rf"threads={threads}, but this process may use \d+ processors: ask for 1 to"
        ):
            local.local_profile(threads)

    def test_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local, "_SECONDS", 0.0)
        profile = local.local_profile(1)
        assert profile.unit.peak["fp32"].value > 0.5
        assert profile.memory.size.value > 0.1
        latency = predict(bert_shape(), profile, Workload(1, 64, 1))["latency_ms"]
        assert 0.01 < latency.low < latency.value < latency.high < 1e5
        assert profile.runtime == "onnxruntime"
