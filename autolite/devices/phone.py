"""What a phone says of itself, and what the runner there reads: plain text and bytes on both sides."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from autolite.errors import DeviceError

MACHINES = {"arm64-v8a": "aarch64", "x86_64": "x86_64", "armeabi-v7a": "armv7l", "x86": "i686"}  # by ABI
_PROPERTIES = ("manufacturer", "model", "cpu.abi")  # of ro.product
_ELEMENTS = {  # as ONNX numbers them
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip
_PLAIN = ("threads", "exact", "lock", "replaces", "warmup", "min_rounds", "seconds", "first")
_SENSOR = re.compile(r"Temperature\{mValue=(?P<celsius>[^,]+), mType=-?\d+, mName=(?P<name>[^,]+),")
_LIMITS = re.compile(  # as Android prints them from version 15 on, and before
    r"(?:mName=|\.name = )(?P<name>[^,]+), (?:mHot|\.hot)ThrottlingThresholds ?= ?\[(?P<limits>[^\]]*)\]"
)
_MODERATE = 2  # of Android's degrees of throttling: 1 is one that nobody notices, on some phones from 35 degrees on
_HOTTEST = 150.0  # degrees; what tells more is no sensor


def inquiry(folder: str, program: str) -> str:
    """Return a command of the shell that prints what `health` reads.

    Args:
        folder: whose disk is meant.
        program: the runner there, which need not be there.
    """
    cpu, thermal = "/sys/devices/system/cpu", "/sys/class/thermal/thermal_zone*/temp"
    lines = [f'echo "{name} $(getprop ro.product.{name})"' for name in _PROPERTIES]
    lines += ['echo "android $(getprop ro.build.version.release)"', 'echo "kernel $(uname -sr)"']
    lines += ['echo "cores $(nproc)"', 'echo "memory $(grep MemTotal /proc/meminfo)"']
    lines += [f'echo "free $(df -k {folder} | tail -n 1)"', f'echo "runtime $({program} version 2>/dev/null)"']
    for word, files in {
        "zone": thermal,
        "clock": f"{cpu}/cpu[0-9]*/cpufreq/scaling_cur_freq",
        "cache": f"{cpu}/cpu0/cache/index*/size",
    }.items():
        lines.append(f"cat {files} 2>/dev/null | sed 's/^/{word} /'")
    return "\n".join([*lines, "echo thermal", "dumpsys thermalservice 2>/dev/null; true"])


def health(lines: Sequence[str]) -> dict[str, Any]:
    """Read what `inquiry` made a phone print; the fields of `autolite.devices.base.Health`.

    Raises:
        DeviceError: if that is not what a phone says.
    """
    told = list(lines)
    end = told.index("thermal") if "thermal" in told else len(told)
    found: dict[str, list[str]] = {}
    for line in told[:end]:
        word, _, value = line.partition(" ")
        found.setdefault(word, []).append(value.strip())
    hottest, margin = thermal("\n".join(told[end:]))
    zones = [value / 1000 for value in _numbers(found.get("zone", ()))]
    caches = [re.fullmatch(r"(\d+)([KM])", each) for each in found.get("cache", ())]
    sizes = [float(each[1]) * {"K": 2**10, "M": 2**20}[each[2]] for each in caches if each]
    try:
        abi, cores, free = found["cpu.abi"][0], int(found["cores"][0]), int(found["free"][0].split()[-3]) * 1024
        memory = int(found["memory"][0].split()[1]) * 1024
    except (KeyError, IndexError, ValueError):
        said = ", ".join(told[:3]) or "nothing"
        raise DeviceError(f"the phone does not say what it is, as Android does; it said: {said}") from None
    return {
        "model": _name(found["manufacturer"][0], found["model"][0]),
        "machine": MACHINES.get(abi, abi),
        "system": found["kernel"][0],
        "libc": f"Android {found['android'][0]}",
        "python": "",
        "onnxruntime": runtime if re.fullmatch(r"\d+\.\S+", runtime := found["runtime"][0]) else None,
        "cores": cores,
        "memory_bytes": memory,
        "cache_bytes": max(sizes, default=None),
        "free_bytes": free,
        "celsius": hottest or max((zone for zone in zones if 0 < zone < _HOTTEST), default=None),
        "margin_celsius": margin,
        "megahertz": [round(value / 1000) for value in _numbers(found.get("clock", ()))] or None,
    }


def thermal(text: str) -> tuple[float | None, float | None]:
    """Read `dumpsys thermalservice`: the hottest sensor, and the degrees until the first one has the phone slow down.

    It does so where Android calls its throttling moderate. Both are None where it does not tell. A phone that already
    slows down has no degrees left, whatever its sensors say.
    """
    _, _, current = text.partition("Current temperatures from HAL:")
    sensors = {
        each["name"]: celsius
        for each in _SENSOR.finditer(current)
        for celsius in _numbers([each["celsius"]])
        if 0 < celsius < _HOTTEST
    }
    left = []
    for each in _LIMITS.finditer(text):
        limits = [limit for limit in _numbers(each["limits"].split(",")[_MODERATE:]) if math.isfinite(limit)]
        celsius = sensors.get(each["name"])
        if celsius is not None and limits:
            left.append(min(limits) - celsius)
    if (status := re.search(r"Thermal Status: (\d+)", text)) and int(status[1]) >= _MODERATE:
        left.append(0.0)
    return max(sensors.values(), default=None), min(left, default=None)


def specification(spec: Mapping[str, Any]) -> str:
    """Return what the runner on a phone is to do: lines of a word and its value.

    Raises:
        DeviceError: if a file has a name that no line can hold.
    """
    lines = [f"{word} {_plain(spec[word])}" for word in _PLAIN if spec.get(word) is not None]
    if spec["cores"]:
        lines.append(f"cores {','.join(map(str, spec['cores']))}")
    for name, each in spec["models"].items():
        lines += [f"model {json.dumps(name)}", f"file {each['file']}", f"inputs {each['inputs']}"]
    if broken := next((line for line in lines if "\n" in line), None):
        raise DeviceError(f"{broken!r}: a file with a line break in its name cannot be sent to a phone: rename it")
    return "".join(f"{line}\n" for line in lines)


def tensors(packed: bytes) -> bytes:
    """Return the arrays of an .npz file as the runner on a phone reads them: for each its name's length, type and rank,
    its dimensions, its length in bytes, its name and itself; all numbers little-endian.

    Raises:
        DeviceError: if ONNX Runtime has no such type.
    """
    found = bytearray()
    with np.load(io.BytesIO(packed)) as arrays:
        for name in arrays.files:
            array = np.asarray(arrays[name], order="C")
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            if array.dtype.name not in _ELEMENTS:
                raise DeviceError(f"input '{name}' is of {array.dtype.name}, which cannot be sent to a phone")
            data, called = array.tobytes(), name.encode()
            found += struct.pack("<III", len(called), _ELEMENTS[array.dtype.name], array.ndim)
            found += struct.pack(f"<{array.ndim}qQ", *array.shape, len(data)) + called + data
    return bytes(found)


def _numbers(texts: Sequence[str]) -> Iterator[float]:
    for text in texts:
        try:
            yield float(text)
        except ValueError:
            continue


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _name(maker: str, model: str) -> str:
    """The model with its maker before it, unless it names the maker itself."""
    return model if model.lower().startswith(maker.lower()) else f"{maker} {model}".strip()
