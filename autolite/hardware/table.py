"""A profile corrected by a table of latencies that somebody measured elsewhere: one row for each model and call."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autolite.architecture import ModelShape
from autolite.configured import shape_of_config
from autolite.errors import InputError, ModelError, TargetError, first_line
from autolite.hardware.calibration import FEWEST, Calibrated, Sample, calibrated
from autolite.hardware.predict import time_parts
from autolite.hardware.profile import Profile
from autolite.measure import Workload

CALL = ("tokens", "batch", "threads", "generated")
LATENCY = "latency_ms"
PARTS = 10  # of the models; each is held out once
# Whoever measured a table may have used another program than the profile's: what that takes for a call and for each
# operator, whatever its size, can be tens of times as much (eager PyTorch).
UNSURE = {"dispatch": 2.0, "around": 2.0, "fixed": 2.0}


def read_table(file: Path, profile: Profile) -> list[Sample]:
    """Read a CSV file of measured latencies.

    Its columns are `latency_ms`; `tokens` and, where they are not 1, 1 and 0, `batch`, `threads` and `generated`; and
    what the models are: `config`, the path of a configuration in JSON or YAML (from the table's folder) or the JSON
    itself, or `model_type` and further fields of transformers' configuration, or both, where the fields come first. An
    empty cell is as if there were no such column.

    Args:
        file: the table.
        profile: of the device, which has to have the numbers of threads.

    Raises:
        InputError: naming the row, the column and what is wrong there.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the table {file}: {first_line(error)}") from None
    if missing := [name for name in (LATENCY, "tokens") if name not in columns]:
        raise InputError(f"{file} has no column '{missing[0]}'; it has {', '.join(columns) or 'none'}")
    if "config" not in columns and "model_type" not in columns:
        raise InputError(f"{file} does not say what the models are: add a column 'config' or 'model_type'")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise InputError(f"{file} has the column '{twice[0]}' twice: remove one")
    shapes: dict[str, ModelShape] = {}
    found = [_sample(row, f"{file}, row {number}", file.parent, shapes) for number, row in enumerate(rows, 2)]
    models = {shape: number for number, shape in enumerate(dict.fromkeys(each.shape for each in found))}
    if len(found) < FEWEST or len(models) < 2:
        raise InputError(
            f"{file} has {len(found)} rows of {len(models)} model{'s' * (len(models) != 1)}: a calibration needs "
            f"{FEWEST} rows of 2 models at least"
        )
    for number, each in enumerate(found, 2):
        try:
            time_parts(each.shape, profile, each.workload)
        except TargetError as error:
            raise InputError(f"{file}, row {number}: {error}") from None
    return [replace(each, group=str(models[each.shape] % PARTS)) for each in found]


def calibrated_by_table(profile: Profile, samples: Sequence[Sample], name: str) -> Calibrated:
    """Correct a profile by the rows of a table; see `autolite.hardware.calibration.calibrated`.

    Args:
        profile: to start from: of the same device, or of the nearest that is known.
        samples: the rows.
        name: of the table, for people.
    """
    data = profile.model_dump()
    for key, sigma in UNSURE.items():
        if (number := data[key]) is not None:
            number["sigma"] = max(number["sigma"], sigma)
    found = calibrated(Profile.model_validate(data), samples, f"{len(samples)} latencies of {name}")
    off = abs(found.errors).mean()
    text = f"{profile.description}; {len(samples)} latencies of {name}, {off:.1%} off where held out"
    return replace(found, profile=found.profile.model_copy(update={"description": text}))


def _sample(row: Mapping[Any, Any], where: str, folder: Path, shapes: dict[str, ModelShape]) -> Sample:
    """A row's sample; `shapes` are those of the configurations that were met before."""
    if None in row or None in row.values():
        raise InputError(f"{where} has {'more' if None in row else 'fewer'} cells than there are columns")
    cells = {str(name): str(cell).strip() for name, cell in row.items() if str(cell).strip()}
    milliseconds = _number(cells.pop(LATENCY, ""), where)
    call = ",".join(f"{name}={cells.pop(name)}" for name in CALL if name in cells)
    if "tokens=" not in call:
        raise InputError(f"{where} has no tokens: give how many the input has")
    try:
        workload = Workload.parse(call)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    fields = _config(cells.pop("config"), where, folder) if "config" in cells else {}
    fields |= {name: _value(cell) for name, cell in cells.items()}
    key = json.dumps(fields, sort_keys=True, default=str)
    if key not in shapes:
        try:
            shapes[key] = shape_of_config(fields, cells)
        except ModelError as error:
            raise InputError(f"{where}: {error}") from None
    shape = shapes[key]
    if workload.generated and not shape.stacks[-1].causal:
        raise InputError(f"{where}: generated={workload.generated}, but a model of this kind generates nothing")
    return Sample(shape, workload, milliseconds, "")


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{where}: {LATENCY} is '{cell}', which is no number of milliseconds above 0")
    return value


def _config(cell: str, where: str, folder: Path) -> dict[str, Any]:
    try:
        text = cell if cell.startswith("{") else (folder / cell).read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}: cannot read the config '{cell[:80]}': {first_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: the config '{cell[:80]}' is not a list of fields and their values")
    return {str(name): value for name, value in found.items()}


def _value(cell: str) -> Any:
    """A cell as the number or the truth value that it is, else as text."""
    try:
        value = yaml.safe_load(cell)
    except yaml.YAMLError:
        return cell
    return value if isinstance(value, int | float) else cell
