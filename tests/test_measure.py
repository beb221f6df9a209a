"""Timing and its statistics, with runners that take known times on a clock that only they advance."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.errors import InputError
from autolite.host_lock import host_lock
from autolite.measure import (
    Timing,
    Workload,
    faster,
    time_interleaved,
    timing_to_measurements,
    tokens_per_second,
)


class Clock:
    """A clock in nanoseconds that stands still unless somebody works."""

    def __init__(self) -> None:
        self.now = 0
        self.slowness = 1.0

    def __call__(self) -> int:
        return self.now


class Worker:
    """A runner of known duration that notes what it was called with."""

    def __init__(self, clock: Clock, milliseconds: float, log: list[str] | None = None, name: str = "") -> None:
        self.clock, self.milliseconds, self.log, self.name = clock, milliseconds, log, name
        self.seen: list[int] = []
        self.collecting: list[bool] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.clock.now += round(self.milliseconds * self.clock.slowness * 1e6)
        self.seen.append(int(inputs["x"][0]))
        self.collecting.append(gc.isenabled())
        if self.log is not None:
            self.log.append(self.name)
        return {}


def arrays(value: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.array([value])}


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class TestWorkload:
    @given(st.builds(Workload, *[st.integers(1, 10**6)] * 3, st.integers(0, 10**6)))
    def test_what_is_written_is_read_back(self, workload: Workload) -> None:
        assert Workload.parse(str(workload)) == workload

    def test_what_is_not_named_comes_from_the_default(self) -> None:
        assert Workload.parse(" tokens=7 ", Workload(2, 3, 4, 5)) == Workload(2, 7, 4, 5)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "'' is not name=number"),
            ("batch", "'batch' is not name=number"),
            ("batch=1,,tokens=2", "'' is not name=number"),
            ("token=4", "unknown part 'token': did you mean 'tokens'"),
            ("tokens=4,tokens=4", "tokens is given twice"),
            ("tokens=x", "tokens=x must be a whole number of at least 1"),
            ("tokens=0", "tokens=0 must be a whole number of at least 1"),
            ("threads=-1", "threads=-1 must be"),
            ("batch=1.5", "batch=1.5 must be"),
            ("batch=²", "batch=² must be"),
            ("generated=-1", "generated=-1 must be a whole number of at least 0"),
        ],
    )
    def test_a_bad_part_is_named(self, text: str, message: str) -> None:
        with pytest.raises(InputError) as caught:
            Workload.parse(text)
        assert message in str(caught.value)


class TestTimeInterleaved:
    def test_each_runner_gets_its_own_time(self) -> None:
        clock = Clock()
        timings = time_interleaved({"a": Worker(clock, 3), "b": Worker(clock, 12)}, arrays(), 1.0, clock=clock)
        assert {name: t.median for name, t in timings.items()} == {"a": 3.0, "b": 12.0}
        assert timings["a"].p90 == 3.0
        assert timings["a"].median_interval() == (3.0, 3.0)

    def test_short_calls_are_repeated_within_a_round_and_long_ones_are_not(self) -> None:
        clock = Clock()
        timings = time_interleaved({"a": Worker(clock, 0.5), "b": Worker(clock, 50)}, arrays(), 0.5, clock=clock)
        assert {len(burst) for burst in timings["a"].rounds} == {10}  # 5 ms
        assert {len(burst) for burst in timings["b"].rounds} == {1}
        assert timings["a"].samples == 10 * len(timings["a"].rounds)

    def test_everything_takes_about_the_seconds_asked_for_and_at_least_the_rounds(self) -> None:
        clock = Clock()
        runners = {"a": Worker(clock, 10), "b": Worker(clock, 10)}
        time_interleaved(runners, arrays(), 2.0, clock=clock)
        assert 2.0e9 <= clock.now < 2.1e9
        timings = time_interleaved(runners, arrays(), 0.0, min_rounds=7, clock=clock)
        assert len(timings["a"].rounds) == len(timings["b"].rounds) == 7

    def test_warm_up_and_the_first_call_of_a_round_are_not_timed(self) -> None:
        clock, log = Clock(), list[str]()
        time_interleaved({"a": Worker(clock, 10, log, "a")}, arrays(), 0.0, warmup=0.05, min_rounds=2, clock=clock)
        assert len(log) == 5 + 2 * 2

    def test_the_order_rotates(self) -> None:
        clock, log = Clock(), list[str]()
        runners = {name: Worker(clock, 10, log, name) for name in "abc"}
        time_interleaved(runners, arrays(), 0.0, warmup=0, min_rounds=3, clock=clock)
        assert "".join(log[3:]) == "aabbcc" + "bbccaa" + "ccaabb"

    def test_all_runners_of_a_round_see_the_same_input(self) -> None:
        clock = Clock()
        runners = {"a": Worker(clock, 10), "b": Worker(clock, 10)}
        time_interleaved(runners, [arrays(1), arrays(2)], 0.0, warmup=0, min_rounds=3, clock=clock)
        assert runners["a"].seen[1:] == runners["b"].seen[1:] == [1, 1, 2, 2, 1, 1]

    def test_a_drift_meets_all_alike_and_cancels_in_the_ratio(self) -> None:
        clock = Clock()

        class Drifting(Worker):
            def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                self.clock.slowness = 1 + self.clock.now / 1e9
                return super().run(inputs)

        timings = time_interleaved({"a": Drifting(clock, 8), "b": Drifting(clock, 2)}, arrays(), 3.0, clock=clock)
        value, low, high = faster(timings["a"], timings["b"])
        assert timings["a"].rounds[-1][0] > 2 * timings["a"].rounds[0][0]
        assert 3.8 < low <= value <= high < 4.2

    def test_no_garbage_is_collected_meanwhile_and_it_is_turned_on_again(self) -> None:
        clock = Clock()
        worker = Worker(clock, 10)
        time_interleaved({"a": worker}, arrays(), 0.1, clock=clock)
        assert not any(worker.collecting)
        assert gc.isenabled()

    def test_a_runner_that_fails_releases_everything(self) -> None:
        class Broken:
            def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                raise RuntimeError("no such kernel")

        with pytest.raises(RuntimeError, match="no such kernel"):
            time_interleaved({"a": Broken()}, arrays(), 0.1)
        assert gc.isenabled()
        with host_lock(pytest.fail):
            pass

    @pytest.mark.parametrize(("runners", "inputs"), [({}, arrays()), ({"a": Worker(Clock(), 1)}, [])])
    def test_nothing_to_time_is_refused(self, runners: dict[str, Worker], inputs: list[dict[str, np.ndarray]]) -> None:
        with pytest.raises(ValueError, match="at least one runner and one input"):
            time_interleaved(runners, inputs, 0.1)

    def test_real_time_is_in_milliseconds(self) -> None:
        class Sleeper:
            def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                threading.Event().wait(0.002)
                return {}

        timing = time_interleaved({"a": Sleeper()}, arrays(), 0.0, warmup=0)["a"]
        assert timing.median >= 2.0


class TestStatistics:
    def test_rounds_weigh_the_same_and_p90_is_over_all_calls(self) -> None:
        timing = Timing(((1.0, 1.0, 10.0), (2.0,), (3.0,)))
        assert timing.median == 2.0
        assert timing.p90 == pytest.approx(np.percentile([1, 1, 10, 2, 3], 90))
        assert timing.samples == 5

    def test_the_interval_covers_the_true_median_about_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(1)
        hits = 0
        for _ in range(300):
            low, high = Timing(tuple((float(x),) for x in rng.lognormal(0, 0.3, 31))).median_interval()
            hits += low <= 1.0 <= high
        assert 0.88 <= hits / 300 <= 1.0

    @given(st.lists(st.floats(0.1, 100), min_size=1, max_size=20))
    def test_intervals_contain_their_values_and_are_the_same_every_time(self, times: list[float]) -> None:
        timing = Timing(tuple((t, 2 * t) for t in times))
        low, high = timing.median_interval()
        assert low - 1e-9 <= timing.median <= high + 1e-9
        assert timing.median_interval() == (low, high)

    def test_the_ratio_of_paired_rounds_is_surer_than_its_parts(self) -> None:
        load = np.random.default_rng(0).lognormal(0, 0.5, 40)
        slow, fast = (Timing(tuple((float(base * x),) for x in load)) for base in (6.0, 2.0))
        value, low, high = faster(slow, fast)
        assert (value, low, high) == pytest.approx((3.0, 3.0, 3.0))
        apart = slow.median_interval()
        assert apart[1] / apart[0] > 1.2

    def test_tokens_a_second_are_those_of_the_steps_behind_the_prompt(self) -> None:
        load = np.random.default_rng(0).lognormal(0, 0.5, 25)  # other programs, for both calls of a round alike
        prompt, whole = (Timing(tuple((float(base * x),) for x in load)) for base in (10.0, 74.0))
        value, low, high = tokens_per_second(whole, prompt, 64) or (0, 0, 0)
        assert value == pytest.approx(1000 / np.median(load))
        assert low < value < high
        assert tokens_per_second(prompt, whole, 64) is None  # lost in noise
        with pytest.raises(ValueError, match="25 and 1 rounds"):
            tokens_per_second(whole, Timing(((1.0,),)), 64)

    def test_timings_of_different_runs_cannot_be_compared(self) -> None:
        with pytest.raises(ValueError, match=r"baseline has 1 rounds, candidate 2: time both in one call"):
            faster(Timing(((1.0,),)), Timing(((1.0,), (2.0,))))

    def test_measurements_say_what_was_measured(self) -> None:
        found = timing_to_measurements(Timing(((2.0, 3.0, 4.0), (3.0,))), Workload(1, 64, 2), "onnxruntime 1.24")
        assert set(found) == {"latency_ms", "p90_ms"}
        latency = found["latency_ms"]
        assert (latency.metric, latency.value, latency.source) == ("latency_ms", 3.0, "measured")
        assert (latency.runtime, latency.workload) == ("onnxruntime 1.24", "batch=1,tokens=64,threads=2")
        assert latency.low <= latency.value <= latency.high
        assert found["p90_ms"].value > latency.value


def test_nothing_heavier_than_numpy_is_imported() -> None:
    code = "import sys, autolite.measure; print([m for m in ('torch', 'onnxruntime', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
