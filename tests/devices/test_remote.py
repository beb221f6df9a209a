"""What holds of every device at the other end of a connection: commands run there, and connections break."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from autolite.devices import timing as timings
from autolite.devices.base import ConnectionLost, Device
from autolite.devices.timing import MIN_ROUNDS, Artifact, time_on
from autolite.errors import DeviceError
from tests.devices.conftest import Remote


def test_the_lines_of_a_command_come_back(remote: Remote) -> None:
    device = remote.device
    assert list(device.lines("echo one; cat", "two\n")) == ["one", "two"]
    assert device.run("echo three >&2") == "three"
    assert device.run("echo 'a  b'; printf '\\351'") == "a  b\n\ufffd"
    assert device.run("true") == ""


def test_a_command_that_fails_says_so(remote: Remote) -> None:
    device = remote.device
    with pytest.raises(
        DeviceError, match=f"{device.address}: 'echo no such thing; exit 3' ended with 3: no such thing"
    ):
        device.run("echo no such thing; exit 3")
    with pytest.raises(DeviceError, match="ended with 1: it said nothing"):
        device.run("false")
    with pytest.raises(DeviceError, match="was ended by signal 9: its memory may be too small"):
        device.run("sh -c 'kill -9 $$'; exit $?")


def test_what_was_timed_before_a_connection_broke_is_kept(
    remote: Remote, artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, said, firsts = list[str](), list[str](), list[int]()
    answers = timings.answers

    def breaking(device: Device, words: Sequence[str], spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if words == ["time"]:
            firsts.append(spec["first"])
        for answer in answers(device, words, spec):
            yield answer
            if "round" in answer:
                seen.append(answer["model"])
                if len(seen) == 7:
                    remote.cut()

    monkeypatch.setattr(timings, "answers", breaking)
    found = time_on(remote.device, artifacts, threads=1, seconds=0.5, warmup=0.0, memory=False, say=said.append)
    (rounds,) = {len(timing.rounds) for timing in found.timings.values()}
    assert rounds >= MIN_ROUNDS
    assert firsts[0] == 0
    assert firsts[1] >= 3, "it goes on where it was"
    assert "was lost" in said[0]


def test_a_device_that_says_nothing_is_taken_for_gone(remote: Remote) -> None:
    remote.silence(0.3)
    with pytest.raises(ConnectionLost, match="has been silent"):
        remote.device.run("sleep 5")
