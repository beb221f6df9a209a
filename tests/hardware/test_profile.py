"""Profiles: what is shipped is complete and sourced, and what is wrong in a file is named."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from autolite import registry
from autolite.errors import TargetError
from autolite.formats import FORMATS
from autolite.hardware import load_target, target_names
from autolite.hardware.profile import Profile, growth
from autolite.hardware.profile_files import dump_profile, load_profile, parse_profile, profile_names

SHIPPED = profile_names()


def shipped(name: str = "pixel8") -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((registry.data_dir("hardware_profiles") / f"{name}.yaml").read_text())
    return data


def test_the_targets_of_the_readme_are_there() -> None:
    assert {"pixel8", "raspberry-pi-5", "x86-avx512"} <= set(SHIPPED)
    assert target_names() == [*SHIPPED, "local"]


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_it_loads_under_its_file_name_and_runs_every_format(self, name: str) -> None:
        profile = load_profile(name)
        assert profile.name == name
        assert set(profile.formats) == set(FORMATS)
        assert profile.runtime in registry.names("runtime")
        assert profile.threads == profile.unit.threads
        assert load_target(name) == profile

    def test_every_number_says_where_it_comes_from(self, name: str) -> None:
        numbers = load_profile(name).numbers()
        assert len(numbers) > 25
        for path, number in numbers.items():
            assert len(number.source) > 5, path
            assert number.date <= datetime.date.today() or number.date.year < 2100, path
            # Only what is exact by definition has no uncertainty, and a guess is never precise.
            assert number.sigma > 0 or number.kind in ("derived", "datasheet"), path
            assert number.kind != "assumed" or number.sigma >= 0.1, path

    def test_it_is_written_and_read_back_equal(self, name: str) -> None:
        profile = load_profile(name)
        again = parse_profile(dump_profile(profile), "dump")
        assert again.model_dump(exclude={"sources"}) == profile.model_dump(exclude={"sources"})
        assert (again.digest == profile.digest) == (again == profile)

    def test_small_integers_are_not_slower_than_floats(self, name: str) -> None:
        peak = load_profile(name).unit.peak
        assert peak["int8"].value > peak["fp32"].value


def test_a_profile_of_your_own_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**shipped(), "name": "mine"}))
    assert load_target(file).name == load_target(str(file)).name == "mine"


def test_what_was_measured_elsewhere_is_not_this_machine(tmp_path: Path) -> None:
    """A file that `local` left on a board, copied here, is called by its file."""
    text = yaml.safe_dump({**shipped(), "name": "local"})
    for name in ("board.yaml", "local.yaml"):
        (tmp_path / name).write_text(text)
    assert load_target(tmp_path / "board.yaml").name == "board"
    with pytest.raises(TargetError, match="would be taken for this machine"):
        load_target(tmp_path / "local.yaml")


GUESS = ["assumed", "a guess", "2026-01-01", 0.5]


def write(file: Path, **fields: Any) -> Path:
    file.write_text(yaml.safe_dump(fields))
    return file


def test_a_variant_says_only_what_differs(tmp_path: Path) -> None:
    base = load_profile("pixel8")
    units = [{"name": "big", "power": [9, "W", *GUESS]}, {"name": "gpu", "threads": 1, "unavailable": "no driver"}]
    fields = {"description": "mine", "memory": {"size": [12, "GB", *GUESS]}, "units": units}
    found = load_profile(write(tmp_path / "warm.yaml", extends="pixel8", name="warm", **fields))
    changed = {path for path, number in found.numbers().items() if number != base.numbers().get(path)}
    assert changed == {"memory.size", "units.big.power"}
    assert [unit.name for unit in found.units] == [*(unit.name for unit in base.units), "gpu"]
    further = write(tmp_path / "hot.yaml", extends="warm.yaml", name="hot", description="hotter")
    assert load_profile(further).numbers() == found.numbers()
    assert parse_profile(dump_profile(found), "dump").numbers() == found.numbers()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extends": "pixle8"}, r"mine\.yaml: extends: unknown target 'pixle8': did you mean 'pixel8'"),
        ({"extends": "pixel8", "name": None}, r"mine\.yaml: a profile that extends 'pixel8' needs a name of its own"),
        ({"extends": "mine.yaml"}, r"mine\.yaml: extends mine\.yaml, which extends it in turn"),
        ({"extends": "nowhere.yaml"}, "cannot read the hardware profile .*nowhere"),
        ({"extends": "pixel8", "idle": 3}, r"mine\.yaml: idle: .*got 3"),
    ],
)
def test_variants_of_nothing_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"name": "mine", "description": "mine", **fields}
    file = write(tmp_path / "mine.yaml", **{name: value for name, value in given.items() if value is not None})
    with pytest.raises(TargetError, match=message):
        load_profile(file)


def test_a_variant_may_run_on_another_processor(tmp_path: Path) -> None:
    found = load_profile(write(tmp_path / "x.yaml", extends="pixel8", name="x", description="x", default_unit="prime"))
    assert (found.unit.name, found.threads) == ("prime", 1)
    assert found.numbers() == load_profile("pixel8").numbers()


def test_a_number_of_a_variant_has_its_own_source(tmp_path: Path) -> None:
    long = {"value": 0.8, "unit": "W", "kind": "measured", "source": "a meter", "date": "2026-01-01", "sigma": 0.1}
    write(tmp_path / "base.yaml", extends="pixel8", name="base", description="base", idle=long)
    file = write(tmp_path / "mine.yaml", extends="base.yaml", name="mine", description="mine", idle={"value": 2.0})
    with pytest.raises(TargetError, match=r"mine\.yaml: idle\.unit: Field required"):
        load_profile(file)


def test_what_is_wrong_in_what_is_extended_is_named_with_that_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", extends="pixel8", name="base", description="base", idle=3)
    file = write(tmp_path / "mine.yaml", extends="base.yaml", name="mine", description="mine")
    with pytest.raises(TargetError, match=r"base\.yaml: idle: .*got 3"):
        load_profile(file)


def test_a_program_never_has_more_than_the_memory(tmp_path: Path) -> None:
    phone = load_profile("iphone-15")
    assert phone.memory.limit < 1e9 * phone.memory.size.value
    small = {"size": [1, "GB", *GUESS]}
    file = write(tmp_path / "small.yaml", extends="iphone-15", name="small", description="small", memory=small)
    assert load_profile(file).memory.limit == 1e9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dispatch": [3, "us", "assumed", "guess", "2026-01-01"]}, "this has 5 of the 6 parts"),
        ({"dispatch": {"value": 3, "unit": "us", "kind": "assumed", "source": "x", "date": "2026-01-01"}}, "sigma"),
        ({"dispatch": [3, "ms", "assumed", "guess", "2026-01-01", 0.1]}, "dispatch: the unit here is us, not ms"),
        ({"dispatch": [-3, "us", "assumed", "guess", "2026-01-01", 0.1]}, "greater than or equal to 0, but got -3"),
        ({"dispatch": [3, "us", "guessed", "guess", "2026-01-01", 0.1]}, "dispatch.kind"),
        ({"dispatch": [3, "us", "assumed", "", "2026-01-01", 0.1]}, "dispatch.source"),
        ({"dispatch": [3, "us", "assumed", "guess", "today", 0.1]}, "dispatch.date"),
        ({"dispatch": [3, "us", "assumed", "guess", "2026-01-01", -0.1]}, "dispatch.sigma"),
        ({"dispatch": [float("nan"), "us", "assumed", "guess", "2026-01-01", 0.1]}, "dispatch.value"),
        ({"correction": [0, "1", "assumed", "guess", "2026-01-01", 0.1]}, "correction: must be above 0"),
        ({"dispatch": 3}, "dispatch"),
        ({"dispach": 3}, "dispach: Extra inputs are not permitted"),
        ({"memory": None}, "memory"),
        ({"default_unit": "bigg"}, "unknown default_unit 'bigg': did you mean 'big'?"),
        ({"default_unit": "npu"}, "default_unit 'npu' is unavailable: the Edge TPU"),
        ({"formats": {"fp32": "fp32", "int8": "int9"}}, "formats.int8 is priced as 'int9', which units.big.peak"),
        ({"formats": {"int8": "int8"}}, "formats lacks fp32"),
        ({"units": []}, "units"),
        ({"units": [*shipped()["units"], shipped()["units"][0]]}, "two units are called 'big'"),
        ({"efficiency": {}}, "which efficiency does not have: add it there"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(change: dict[str, Any], message: str) -> None:
    text = yaml.safe_dump({**shipped(), **change})
    with pytest.raises(TargetError) as caught:
        parse_profile(text, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert message in str(caught.value)


def test_a_unit_that_can_be_used_needs_all_its_numbers() -> None:
    data = shipped()
    del data["units"][0]["softmax"]
    with pytest.raises(TargetError, match="unit big lacks softmax: give it, or say why the unit is `unavailable`"):
        parse_profile(yaml.safe_dump(data), "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "holds list"), ("", "holds NoneType"), ("a: *b", "alias")]
)
def test_what_is_no_profile_at_all_is_refused(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_profile(text, "mine.yaml")


def test_unknown_targets_get_the_nearest_name() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'pixle8': did you mean 'pixel8'\? Known: .*local"):
        load_target("pixle8")
    with pytest.raises(TargetError, match=r"cannot read the hardware profile nowhere\.yaml"):
        load_target("nowhere.yaml")


def test_profiles_are_values() -> None:
    one, same = load_profile("pixel8"), load_profile("pixel8")
    assert one == same
    assert hash(one) == hash(same)
    other = one.model_copy(update={"name": "other"})
    assert Profile.model_validate(other.model_dump()) != one


def test_the_interval_of_a_log_normal() -> None:
    assert growth(0) == 1
    assert growth(0.1) == pytest.approx(1.2161, abs=1e-3)  # exp(1.96 * 0.09975)


def test_the_board_of_the_guide_is_a_target(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(# my-board.*?)```", guide, flags=re.S)
    (tmp_path / "my-board.yaml").write_text(example)
    found, base = load_target(tmp_path / "my-board.yaml"), load_profile("raspberry-pi-5")
    changed = {path for path, number in found.numbers().items() if number != base.numbers()[path]}
    assert changed == {"units.cpu.peak.fp32", "memory.size"}


# Multiprocessors, clock in GHz that the figure is given for, operations a cycle of the tensor cores of one in 16 bits
TENSOR_CORES = {
    "t4": (40, 1.59, 1024),
    "l4": (58, 2.04, 1024),
    "a10": (72, 1.695, 1024),
    "a100": (108, 1.41, 2048),
    "h100": (132, 1.83, 4096),
    "h200": (132, 1.83, 4096),
}


@pytest.mark.parametrize("name", TENSOR_CORES)
def test_peaks_of_gpus_are_dense(name: str) -> None:
    """Vendors print twice these, with sparsity."""
    cores, clock, operations = TENSOR_CORES[name]
    peak = load_profile(name).unit.peak
    assert peak["bf16"].value == pytest.approx(cores * clock * operations, rel=0.005)
    assert peak["int8"].value == pytest.approx(2 * peak["bf16"].value, rel=0.005)


def test_a_gpu_may_be_allowed_tf32(tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", extends="a100", name="x", description="x", formats={"fp32": "tf32"})
    found, base = load_profile(file), load_profile("a100")
    assert found.numbers() == base.numbers()
    assert found.formats == {**base.formats, "fp32": ("tf32",)}


def test_the_guide_explains_every_field_and_target() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    for name in target_names():
        assert f"`{name}`" in guide
    for path in load_profile("pixel8").numbers():
        assert path.split(".")[-1] in guide or path.split(".")[-2] in guide, path
