"""Devices that are reached by adb: a phone or another machine with Android."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from typing import IO

from autolite.devices.base import KEPT, SMALL, ConnectionLost, check_room, check_status
from autolite.devices.phone import health, inquiry, specification, tensors
from autolite.errors import DeviceError, InputError
from autolite.files import sha256

_FOLDER = "/data/local/tmp/autolite"  # where a shell may write and run programs
_ADDRESS = re.compile(r"adb://(?P<serial>[\w.:-]*)")
_PATIENCE = 10.0  # seconds until a phone that does not answer is given up
_LOOK = 0.5  # seconds between two looks at whether it does
_SILENCE = 120.0  # seconds without a line until a phone is taken for gone
_SLOWEST = 1e6  # bytes a second that a cable carries at least
_ENDED = "autolite-ended:"  # without this line at its end, what ran there was cut off; adb itself would not say so
_COMING = ("offline", "authorizing", "connecting")  # states that pass
_USUAL_MODE = "cmd power set-fixed-performance-mode-enabled false >/dev/null 2>&1"


class Adb:
    """A phone that adb is connected to.

    Everything there is in a folder of its own: the runner beside ONNX Runtime, which `autolite.devices.android` puts
    there, and models by their content.

    Attributes:
        address: as it was given.
        serial: by which adb knows it; empty until the only one that is connected was found.
        folder: where files are kept there.
    """

    folder = _FOLDER

    def __init__(self, address: str, serial: str) -> None:
        self.address, self.serial = address, serial

    @classmethod
    def parse(cls, address: str) -> Adb:
        """Read "adb://[serial]".

        Raises:
            InputError: if it is anything else.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise InputError(f"'{address}' is no device: give adb://[serial], as adb devices lists it")
        return cls(address, found["serial"])

    def open(self) -> None:
        """Find it; see `autolite.devices.base.Device`."""
        state = self._state()
        for _ in range(round(_PATIENCE / _LOOK)):
            if state not in ("", *_COMING):
                break
            threading.Event().wait(_LOOK)
            state = self._state()
        if state != "device":
            raise self._refused(state)
        old = f"find files -mindepth 1 -maxdepth 1 -mtime +{KEPT} -exec rm -rf {{}} + 2>/dev/null"
        self.run(f"mkdir -p {_FOLDER}/files && cd {_FOLDER} || exit; {old}; true")

    def close(self) -> None:
        """Nothing to do: each command is a connection of its own."""

    def alone(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Nothing to do here: the runner takes a lock there."""
        return nullcontext()

    def push(self, files: Sequence[Path]) -> str:
        """Send files; see `autolite.devices.base.Device`. Inputs arrive in the form that the runner there reads."""
        named = {os.path.relpath(file, files[0].parent): file for file in files}
        content = "".join(f"{name}\0{sha256(file)}\0" for name, file in named.items())
        folder = f"{self.folder}/files/{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self.send(named, folder)
        return f"{folder}/{next(iter(named))}"

    def drop(self, paths: Sequence[str]) -> None:
        """Remove files; see `autolite.devices.base.Device`."""
        self.run(shlex.join(["rm", "-rf", *(path.rpartition("/")[0] for path in paths)]))

    def runner(self, words: Sequence[str], text: str = "") -> Iterator[str]:
        """Run the runner there; see `autolite.devices.base.Device`. While it times, the phone is in the mode in which
        its clocks are those that it can hold, if it has one."""
        if list(words) == ["health"]:
            yield json.dumps(health(list(self.lines(inquiry(self.folder, self.program)))))
            return
        try:
            yield from self.lines(shlex.join([self.program, *words]), specification(json.loads(text)))
        except ConnectionLost:
            raise
        except DeviceError:
            self.run(f"{_USUAL_MODE}; true")  # the runner takes it back itself, unless it was killed
            raise

    @property
    def program(self) -> str:
        """Where the runner is, beside ONNX Runtime: in a folder for each version of both, which are those here."""
        import onnxruntime

        return f"{self.folder}/onnxruntime-{onnxruntime.__version__}-{_revision()}/runner"

    def run(self, command: str) -> str:
        """Run a command of the shell there and return its output.

        Raises:
            DeviceError: if it fails, with what it said.
            ConnectionLost: if the phone goes away, or is silent for two minutes.
        """
        return "\n".join(self.lines(command))

    def lines(self, command: str, text: str = "") -> Iterator[str]:
        """Run a command of the shell there and yield the lines of its output and errors as they come; raises what
        `run` raises."""
        said, code = "", None
        for line in self._adb("shell", f'( {command}\n) 2>&1; echo "{_ENDED}$?"', text=text):
            line, ended, number = line.partition(_ENDED)
            if ended and number.isdecimal():
                code = int(number)
            if line or not ended:
                said = line.strip() or said
                yield line
        if code is None:
            raise self._lost(said)
        check_status(self.address, command, code, said)

    def send(self, files: dict[str, Path], folder: str) -> None:
        """Send files to a folder by their names there, unless it is there. It is there whole or not at all.

        Raises:
            DeviceError: if they do not fit.
            ConnectionLost: if the phone goes away.
        """
        part, there = f"{folder}.{uuid.uuid4().hex[:8]}.part", shlex.quote(folder)
        inner = shlex.join({os.path.dirname(f"{part}/{name}") for name in files})
        make = f"mkdir -p {inner} && df -k {shlex.quote(part)} | tail -n 1"
        answer = self.run(f"[ -d {there} ] && touch {there} && exit; {make}")
        if not answer:
            return
        try:
            self._fill(files, part, int(answer.split()[-3]) * 1024)
        except ConnectionLost:
            raise
        except DeviceError:
            self.run(f"rm -rf {shlex.quote(part)}")
            raise
        self.run(f"mv {shlex.quote(part)} {there} 2>/dev/null || [ -d {there} ]")

    def _fill(self, files: dict[str, Path], part: str, free: int) -> None:
        size = sum(file.stat().st_size for file in files.values())
        if size > SMALL:
            check_room(self.address, self.folder, next(iter(files)), size, free)
        with tempfile.TemporaryDirectory() as plain:
            for name, file in files.items():
                if file.suffix == ".npz":
                    content, file = tensors(file.read_bytes()), Path(plain) / "inputs"
                    file.write_bytes(content)
                self._push(file, f"{part}/{name}")

    def _push(self, file: Path, to: str) -> None:
        said = list(self._adb("push", str(file), to, patience=_SILENCE + file.stat().st_size / _SLOWEST, code=True))
        if said.pop() == "0":
            return
        reason = next((line for line in said if "error:" in line), "it said nothing")
        if "': remote " not in reason:
            raise self._lost(reason)
        reason = reason.rpartition("': remote ")[2]
        hint = f": remove what is not needed there, such as {self.folder}/files" if "No space" in reason else ""
        raise DeviceError(f"{self.address} cannot store {to}: {reason}{hint}")

    def _state(self) -> str:
        """What adb says of this phone: "device" if it can be used, nothing if it does not know it."""
        if ":" in self.serial:  # over a network; a cable connects itself
            list(self._adb("connect", self.serial, patience=_PATIENCE))
        said = list(self._adb("devices", patience=3 * _PATIENCE, code=True))  # it may have to start its server
        if said.pop() != "0":
            raise DeviceError(f"adb does not run here: {said[-1] if said else 'it said nothing'}")
        known = dict(line.split("\t", 1) for line in said if "\t" in line)
        if not self.serial and len(known) == 1:
            self.serial = next(iter(known))
        if not self.serial and known:
            names = ", ".join(f"adb://{each}" for each in known)
            raise DeviceError(f"several phones are connected: name one of {names}")
        return known.get(self.serial, "")

    def _adb(self, *words: str, text: str = "", patience: float | None = None, code: bool = False) -> Iterator[str]:
        """Yield the lines that adb writes, and in the end its exit status, if asked for. It is given up when it is
        silent for too long."""
        named = ["-s", self.serial] if words[0] in ("shell", "push") else []
        heard: Queue[str | None] = Queue()
        with tempfile.TemporaryFile() as given:
            given.write(text.encode())
            given.seek(0)
            process = subprocess.Popen(
                [_program(), *named, *words], stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        assert process.stdout is not None
        threading.Thread(target=_listen, args=(process.stdout, heard), daemon=True).start()
        patience = _SILENCE if patience is None else patience
        try:
            while (line := heard.get(timeout=patience)) is not None:
                yield line
            status = process.wait(_PATIENCE)
        except (Empty, subprocess.TimeoutExpired):
            raise ConnectionLost(f"{self.address} has been silent for {patience:g} s") from None
        finally:  # whoever reads may have had enough, or be interrupted
            process.kill()
            process.wait()
        if code:
            yield str(status)

    def _lost(self, said: str) -> DeviceError:
        """Say why what ran there did not come to its end."""
        if "unauthorized" in said or "confirmation dialog" in said:
            return self._refused("unauthorized")
        reason = re.match(r"(?:adb: )?error: (.*)", said)
        return ConnectionLost(f"the connection to {self.address} was lost" + (f" ({reason[1]})" if reason else ""))

    def _refused(self, state: str) -> DeviceError:
        """Say why it cannot be used, and what helps."""
        match state:
            case "unauthorized":
                return DeviceError(
                    f"{self.address} does not let this computer in: unlock the phone and accept the computer's key"
                )
            case "" if not self.serial:
                return ConnectionLost(
                    "no phone is connected: plug it in, with USB debugging switched on in its developer options"
                )
            case "":
                return ConnectionLost(f"cannot reach {self.address}: is it plugged in? adb devices lists what is")
            case "offline" | "authorizing" | "connecting":
                return ConnectionLost(f"{self.address} does not answer ({state}): plug it in again, or restart it")
            case _ if state.startswith("no permissions"):
                return DeviceError(f"{self.address} may not be used by you: {state}")
            case _:
                return DeviceError(f"{self.address} is in the state '{state}': start Android on it")


def _listen(output: IO[bytes], heard: Queue[str | None]) -> None:
    with output:
        for raw in output:
            heard.put(raw.decode(errors="replace").rstrip("\r\n"))
    heard.put(None)


def _program() -> str:
    """Where adb is: on the path, else in Android's own folder.

    Raises:
        DeviceError: if it is not installed.
    """
    homes = [os.environ[name] for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT") if os.environ.get(name)]
    for folder in (None, *(os.path.join(home, "platform-tools") for home in homes)):
        if found := shutil.which("adb", path=folder):
            return found
    raise DeviceError("phones need adb, which is not installed here: on Debian, apt install adb")


@cache
def _revision() -> str:
    """Which runner it is that belongs to this AutoLite."""
    return sha256(SOURCE)[:8]


SOURCE = Path(__file__).with_name("runner.c")
