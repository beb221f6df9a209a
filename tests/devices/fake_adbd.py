"""What answers the real adb in place of a phone: adbd's protocol over TCP, for commands of the shell and files sent.

Commands run on this machine, with a folder in place of /data/local/tmp and a few of Android's programs in front of the
others. As adbd does, it tells the shell to hang up (SIGHUP) when whoever listens to it has gone, and reads no more.

The protocol is that of https://android.googlesource.com/platform/packages/modules/adb/+/main: docs/dev/protocol.md (the
packets), shell_protocol.h and docs/dev/sync.md (what they carry).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import IO

VERSION, MOST = 0x01000001, 256 * 1024
TOKEN = 1  # the kind of an AUTH packet that wants a signature
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
TEMPORARY = "/data/local/tmp"

_PROGRAMS = {
    "getprop": 'cat "$PHONE/properties/$1" 2>/dev/null || echo',
    "dumpsys": 'cat "$PHONE/dumpsys/$1"',
    "cmd": 'echo "$*" >> "$PHONE/cmd.log"',
}
_PROPERTIES = {
    "ro.product.manufacturer": "Google",
    "ro.product.model": "Pixel 8",
    "ro.product.cpu.abi": "x86_64",
    "ro.build.version.release": "15",
}
# As a Pixel prints it, shortened.
THERMAL = """IsStatusOverride: false
Thermal Status: {status}
Cached temperatures:
	Temperature{{mValue=99.0, mType=3, mName=VIRTUAL-SKIN, mStatus=0}}
HAL Ready: true
Current temperatures from HAL:
	Temperature{{mValue={skin}, mType=3, mName=VIRTUAL-SKIN, mStatus=0}}
	Temperature{{mValue=28.5, mType=2, mName=battery, mStatus=0}}
	Temperature{{mValue=0.0, mType=4, mName=USB, mStatus=0}}
Current cooling devices from HAL:
	CoolingDevice{{mValue=0, mType=2, mName=cdev}}
Temperature static thresholds from HAL:
	TemperatureThreshold{{mType=3, mName=VIRTUAL-SKIN, mHotThrottlingThresholds=[NaN, 39.0, 43.0, 45.0, 46.5]}}
	TemperatureThreshold{{mType=2, mName=battery, mHotThrottlingThresholds=[NaN, NaN, NaN, 60.0, NaN]}}
"""


class FakePhone:
    """A phone on a port of the loopback.

    Attributes:
        folder: what it stores, and its programs.
        trusts: whether it lets in whoever comes.
        full: whether it has no room for files that are sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.trusts, self.full = folder, True, False
        (folder / "tmp").mkdir(parents=True)
        for kind, files in {"bin": _PROGRAMS, "properties": _PROPERTIES, "dumpsys": {}}.items():
            (folder / kind).mkdir()
            for name, text in files.items():
                (folder / kind / name).write_text(f"#!/bin/sh\n{text}\n" if kind == "bin" else f"{text}\n", "utf-8")
                (folder / kind / name).chmod(0o755)
        self.warm(30.0)
        self._connections: list[_Connection] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def tmp(self) -> Path:
        """What stands for /data/local/tmp."""
        return self.folder / "tmp"

    def warm(self, skin: float, status: int = 0) -> None:
        """Say that it is so warm, and by which degree it slows down."""
        (self.folder / "dumpsys" / "thermalservice").write_text(THERMAL.format(skin=skin, status=status), "utf-8")

    def asked(self) -> list[str]:
        """What `cmd` was asked to do."""
        log = self.folder / "cmd.log"
        return log.read_text("utf-8").splitlines() if log.exists() else []

    def cut(self) -> None:
        """Break every connection; the phone goes on."""
        for each in self._connections:
            each.close()
        self._connections.clear()

    def switch_off(self) -> None:
        """Be gone."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # else the thread that accepts takes one more
        self._server.close()
        self.cut()

    def there(self, text: str) -> str:
        """What a path of a phone is here."""
        return text.replace(TEMPORARY, str(self.tmp))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                found, _ = self._server.accept()
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = _Connection(self, found)
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Connection:
    """An adb server that is connected."""

    def __init__(self, phone: FakePhone, found: socket.socket) -> None:
        self.phone, self._socket, self._sending = phone, found, threading.Lock()
        self._streams: dict[int, _Stream] = {}

    def serve(self) -> None:
        with suppress(OSError, EOFError), self._socket.makefile("rb") as packets:
            while True:
                command, first, second, size, _, _ = struct.unpack("<4s5I", _whole(packets, 24))
                self._answer(command, first, second, _whole(packets, size))
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for each in list(self._streams.values()):
            each.closed()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        (number,) = struct.unpack("<I", command)
        head = struct.pack("<4s5I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self._sending:
            self._socket.sendall(head + data)

    def _answer(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command == b"CNXN" and self.phone.trusts:
            self.send(b"CNXN", VERSION, MOST, b"device::ro.product.model=Pixel 8;features=shell_v2,cmd")
        elif command in (b"CNXN", b"AUTH"):
            self.send(b"AUTH", TOKEN, 0, bytes(20))
        elif command == b"OPEN":
            name = data.rstrip(b"\0").decode()
            stream = self._streams[first] = _Stream(self, first)
            serve = _shell if name.startswith("shell,v2") else _sync if name == "sync:" else None
            if serve is None:
                self.send(b"CLSE", 0, first)
                return
            self.send(b"OKAY", first, first)
            threading.Thread(target=serve, args=(stream, name), daemon=True).start()
        elif stream := self._streams.get(second):
            if command == b"WRTE":
                stream.incoming.put(data)
                self.send(b"OKAY", second, second)
            elif command == b"OKAY":
                stream.taken.set()
            elif command == b"CLSE":
                stream.closed()


class _Stream:
    """A service that was opened; its number is the same on both sides."""

    def __init__(self, connection: _Connection, number: int) -> None:
        self.connection, self.number, self.phone = connection, number, connection.phone
        self.incoming: Queue[bytes] = Queue()
        self.taken, self.gone, self._sending, self._left = threading.Event(), False, threading.Lock(), b""
        self.taken.set()

    def send(self, data: bytes) -> None:
        with self._sending:
            self.taken.wait()
            if self.gone:
                raise EOFError
            self.taken.clear()
            self.connection.send(b"WRTE", self.number, self.number, data)

    def read(self, size: int) -> bytes:
        while len(self._left) < size:
            if not (more := self.incoming.get()):
                raise EOFError
            self._left += more
        found, self._left = self._left[:size], self._left[size:]
        return found

    def end(self) -> None:
        with suppress(OSError):
            self.taken.wait()
            if not self.gone:
                self.connection.send(b"CLSE", self.number, self.number)

    def closed(self) -> None:
        self.gone = True
        self.incoming.put(b"")
        self.taken.set()


def _shell(stream: _Stream, name: str) -> None:
    phone, command = stream.phone, re.sub(r"^[^:]*:", "", name)
    path = f"{phone.folder}/bin:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["sh", "-c", phone.there(command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": path, "PHONE": str(phone.folder)},
        cwd=phone.folder,
    )
    assert process.stdin
    outputs = [(STDOUT, process.stdout), (STDERR, process.stderr)]
    threads = [threading.Thread(target=_tell, args=(stream, *each), daemon=True) for each in outputs]
    for each in (*threads, threading.Thread(target=_hear, args=(stream, process), daemon=True)):
        each.start()
    for each in threads:
        each.join()
    code = process.wait()
    with suppress(OSError, EOFError):
        stream.send(struct.pack("<BIB", EXIT, 1, code if code >= 0 else 128 - code))
    stream.end()


def _tell(stream: _Stream, kind: int, output: IO[bytes]) -> None:
    with suppress(OSError, EOFError), output:  # then whoever writes on finds nobody
        while data := os.read(output.fileno(), 60_000):
            stream.send(struct.pack("<BI", kind, len(data)) + data)


def _hear(stream: _Stream, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    with suppress(EOFError):
        while True:
            kind, size = struct.unpack("<BI", stream.read(5))
            data = stream.read(size)
            with suppress(OSError):
                if kind == STDIN:
                    process.stdin.write(stream.phone.there(data.decode()).encode())
                    process.stdin.flush()
                elif kind == CLOSE_STDIN:
                    process.stdin.close()
    if process.poll() is None:
        process.send_signal(signal.SIGHUP)


def _sync(stream: _Stream, name: str) -> None:
    phone = stream.phone
    with suppress(OSError, EOFError):
        while True:
            command, size = struct.unpack("<4sI", stream.read(8))
            if command == b"QUIT":
                break
            path = phone.there(stream.read(size).decode())
            if command == b"STAT":
                found = os.stat(path) if os.path.exists(path) else None
                mode, bytes_there = (found.st_mode, found.st_size) if found else (0, 0)
                stream.send(struct.pack("<4s3I", b"STAT", mode, bytes_there, 0))
            elif command == b"SEND":
                _take(stream, path)
            else:
                _refuse(stream, f"unknown command {command.decode()}")
                break
    stream.end()


def _take(stream: _Stream, path: str) -> None:
    path, _, mode = path.rpartition(",")
    content = bytearray()
    while True:
        command, size = struct.unpack("<4sI", stream.read(8))
        if command == b"DONE":
            break
        content += stream.read(size)
    if stream.phone.full:
        _refuse(stream, "write failed: No space left on device")
        return
    try:
        Path(path).write_bytes(content)
        Path(path).chmod(int(mode) & 0o777)
    except OSError as error:
        _refuse(stream, f"couldn't create file: {error.strerror}")
        return
    stream.send(struct.pack("<4sI", b"OKAY", 0))


def _refuse(stream: _Stream, reason: str) -> None:
    stream.send(struct.pack("<4sI", b"FAIL", len(reason)) + reason.encode())


def _whole(stream: IO[bytes], size: int) -> bytes:
    found = stream.read(size)
    if len(found) < size:
        raise EOFError
    return found
