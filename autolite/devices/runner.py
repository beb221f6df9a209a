"""What runs on a device. It is sent there with the modules that it imports, and needs Python and ONNX Runtime alone.

    python runner.pyz health
    python runner.pyz time < SPEC
    python runner.pyz memory < SPEC
    python runner.pyz outputs < SPEC

Answers are lines of JSON, a burst of calls as soon as it has been timed: what was measured before a connection is lost
is not lost.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolite import machine
from autolite.host_lock import lock_folder
from autolite.rounds import interleaved

if TYPE_CHECKING:  # old Pythons have others
    from collections.abc import Callable, Iterator

_MEMORY_CALLS = 3
_WAITING = 5.0  # seconds between two lines while another process has the device


def health() -> dict[str, Any]:
    """Return what this machine is and how it does; None for what it does not tell."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    kept = os.environ.get("XDG_CACHE_HOME", str(Path.home()))
    return {
        "model": machine.device_name(),
        "machine": platform.machine() + ("" if sys.maxsize > 2**32 else ", 32 bits"),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
        "onnxruntime": _version(),
        "cores": machine.processors(),
        "memory_bytes": pages * size,
        "cache_bytes": machine.last_level_cache(),
        "free_bytes": shutil.disk_usage(kept if os.path.isdir(kept) else "/").free,
        "margin_celsius": machine.margin_celsius(),
        **state(),
    }


def state() -> dict[str, Any]:
    """Return how warm and how fast this machine is now."""
    return {"celsius": machine.celsius(), "megahertz": machine.megahertz()}


def measure_time(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the bursts of the models of a spec, and between them the machine's state, once a second at most."""
    calls = _calls(spec)
    yield {"runtime": _version(), "process": os.getpid()}
    gc.collect()
    gc.disable()
    looked, settings = 0.0, {key: spec[key] for key in ("warmup", "min_rounds", "first")}
    for number, name, burst in interleaved(calls, spec["seconds"], **settings):
        yield {"round": number, "model": name, "milliseconds": burst}
        if time.monotonic() - looked > 1:
            yield {"state": state()}
            looked = time.monotonic()


def measure_memory(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the peak resident bytes of this process with the only model of a spec, less those without it; None where
    the system does not tell."""
    import numpy as np

    (each,) = spec["models"].values()
    with np.load(each["inputs"]) as arrays:
        _ = [arrays[name] for name in arrays.files]  # they are not the model's
    _version()  # nor is the runtime
    before = _peak()
    (call,) = _calls(spec).values()
    for number in range(_MEMORY_CALLS):
        call(number)
    after = _peak()
    yield {"peak_bytes": None if before is None or after is None else after - before}


def outputs(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the first output of each model of a spec, as nested lists of numbers."""
    for name, call in _calls(spec).items():
        yield {"model": name, "output": call(0)[0].tolist()}


def _calls(spec: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    """Load the models of a spec, equal ones once, each to be called with its inputs."""
    import numpy as np

    from autolite.runtime.session import opened

    sessions: dict[str, Any] = {}
    found: dict[str, Callable[[int], Any]] = {}
    for name, each in spec["models"].items():
        file = each["file"]
        if file not in sessions:
            sessions[file], _ = opened(file, spec["threads"], exact=spec.get("exact", True))
        session = sessions[file]
        first = [session.get_outputs()[0].name]  # others, such as a cache, need not be copied
        takes = {one.name for one in session.get_inputs()}
        with np.load(each["inputs"]) as arrays:
            feed = {key: arrays[key] for key in arrays.files if key in takes}
        found[name] = partial(_run, session, first, feed)
    return found


def _run(session: Any, outputs: list[str], feed: dict[str, Any], number: int) -> Any:
    return session.run(outputs, feed)


def _peak() -> int | None:
    """The most memory that this process has had, in bytes. Not `getrusage`, whose peak may be that of the process which
    started this one."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _version() -> str | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock that searches on this machine hold while they time (`autolite.host_lock`)."""
    import fcntl

    file = os.open(lock_folder() / "timing.lock", os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(OSError):  # whatever the umask says, if it is ours
        os.fchmod(file, 0o666)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                print(json.dumps({"waiting": True}), flush=True)  # a sign of life, and the end if nobody hears it
                time.sleep(_WAITING)
        yield
    finally:
        os.close(file)


def _pin(cores: list[int]) -> None:
    """Run on these cores only."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        raise ValueError(f"it has no cores {', '.join(map(str, cores))} that can be used: ask for others") from None


def _end(process: int) -> None:
    """End a runner that waits for somebody who has gone."""
    with suppress(OSError):
        if b"runner" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)


def main(words: list[str]) -> int:
    """Do what is asked and answer on standard output."""
    if words == ["health"]:
        print(json.dumps(health()), flush=True)
        return 0
    spec = json.loads(sys.stdin.read())
    measure = {"time": measure_time, "memory": measure_memory, "outputs": outputs}[words[0]]
    try:
        if spec.get("replaces"):
            _end(spec["replaces"])
        if spec["cores"]:
            _pin(spec["cores"])
        with _alone() if spec["lock"] else nullcontext():
            for line in measure(spec):
                print(json.dumps(line), flush=True)
    except BrokenPipeError:  # nobody reads any more
        return 1
    except Exception as error:
        print(json.dumps({"error": (str(error).strip() or repr(error)).splitlines()[0]}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
