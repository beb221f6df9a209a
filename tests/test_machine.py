"""What is found out about a machine, from files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolite import machine


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_SYS", tmp_path)
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n", encoding="ascii")


def test_the_hottest_sensor_and_all_clocks(sys: Path) -> None:
    write(sys / "class/thermal/thermal_zone0", temp=41_500)
    write(sys / "class/thermal/thermal_zone1", temp=63_000)
    write(sys / "class/thermal/thermal_zone2", temp="-274000")  # what some boards say of a sensor that is off
    for core, clock in enumerate((1_500_000, 2_400_000)):
        write(sys / f"devices/system/cpu/cpu{core}/cpufreq", scaling_cur_freq=clock)
    assert (machine.celsius(), machine.megahertz()) == (63.0, [1500, 2400])


def test_the_margin_is_that_of_the_part_that_is_nearest(sys: Path) -> None:
    one = {"trip_point_0_type": "critical", "trip_point_0_temp": 60_000, "trip_point_1_type": "passive"}
    write(sys / "class/thermal/thermal_zone0", temp=50_000, trip_point_1_temp=85_000, **one)
    write(sys / "class/thermal/thermal_zone1", temp=80_000, trip_point_0_type="hot", trip_point_0_temp=95_000)
    write(sys / "class/thermal/thermal_zone2", temp=99_000)
    assert machine.margin_celsius() == 15.0


def test_a_board_whose_kernel_does_not_know_what_its_firmware_does(sys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_name", lambda: "Raspberry Pi 5 Model B Rev 1.0")
    write(sys / "class/thermal/thermal_zone0", temp=61_500, trip_point_0_type="critical", trip_point_0_temp=110_000)
    assert machine.margin_celsius() == 18.5


def test_a_machine_that_tells_nothing(sys: Path) -> None:
    assert (machine.celsius(), machine.megahertz()) == (None, None)
    assert machine.margin_celsius() is None
    assert machine.last_level_cache() is None
    write(sys / "class/thermal/thermal_zone0", temp="", trip_point_0_type="passive")
    assert machine.celsius() is None
    assert machine.margin_celsius() is None


def test_the_last_level_of_cache(sys: Path) -> None:
    for index, size in enumerate(("32K", "512K", "16M")):
        write(sys / f"devices/system/cpu/cpu0/cache/index{index}", size=size)
    assert machine.last_level_cache() == 16 * 2**20


def test_it_has_a_name() -> None:
    assert machine.cpu_name()
    assert machine.device_name()
