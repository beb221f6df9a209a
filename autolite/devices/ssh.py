"""Devices that are reached by SSH: a board or a server with Python."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shlex
import socket
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from autolite.devices.base import KEPT, SMALL, ConnectionLost, check_room, check_status
from autolite.errors import DeviceError, InputError, first_line
from autolite.files import sha256

if TYPE_CHECKING:
    import paramiko

SENT = (
    "machine.py",
    "saturation.py",
    "host_lock.py",
    "rounds.py",
    "runtime/session.py",
    "devices/runner.py",
)  # what the runner consists of
_ADDRESS = re.compile(r"ssh://(?:(?P<user>[^@/:]+)@)?(?P<host>[^@/:\[\]]+|\[[^@/]+\])(?::(?P<port>\d{1,5}))?/?")
_PATIENCE = 10.0  # seconds until a host that does not answer is given up
_SILENCE = 120.0  # seconds without a line until a device is taken for gone
_ALIVE, _DEAD = 5, 30  # seconds between two signs of life, and until a connection that answers none is dead
_FOLDER = '"${XDG_CACHE_HOME:-$HOME/.cache}/autolite/device"'


class Ssh:
    """A machine at the other end of an SSH connection.

    Everything is kept in its user's cache folder: the runner, models by their content, and the environment that
    `autolite.devices.setup` makes.

    Attributes:
        address: as it was given.
        folder: where files are kept there, once connected.
    """

    def __init__(self, address: str, host: str, user: str | None, port: int | None) -> None:
        self.address, self.host, self.user, self.port = address, host, user, port
        self.folder = ""
        self._client: paramiko.SSHClient | None = None
        self._files: paramiko.SFTPClient | None = None

    @classmethod
    def parse(cls, address: str) -> Ssh:
        """Read "ssh://[user@]host[:port]".

        Raises:
            InputError: if it is anything else.
        """
        found = _ADDRESS.fullmatch(address)
        port = int(found["port"]) if found and found["port"] else None
        if found is None or (port is not None and not 0 < port < 2**16):
            raise InputError(f"'{address}' is no device: give ssh://[user@]host[:port]")
        return cls(address, found["host"].strip("[]"), found["user"], port)

    def open(self) -> None:
        """Connect; see `autolite.devices.base.Device`."""
        try:
            import paramiko
        except ImportError:
            raise DeviceError("devices over SSH need paramiko: pip install 'autolite[devices]'") from None

        logging.getLogger("paramiko").addHandler(logging.NullHandler())  # what goes wrong arrives as an exception
        known = _configured(self.host)
        host, port = known.get("hostname", self.host), int(self.port or known.get("port", 22))
        client = self._client = paramiko.SSHClient()
        try:
            client.load_system_host_keys()
        except (paramiko.hostkeys.InvalidHostKey, OSError) as error:
            raise DeviceError(f"cannot read ~/.ssh/known_hosts: {first_line(error)}") from None
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        keys: Any = [name for name in known.get("identityfile", []) if Path(name).is_file()]
        proxy = known.get("proxycommand")
        try:
            client.connect(
                host,
                port,
                username=self.user or known.get("user"),
                key_filename=keys,
                sock=paramiko.ProxyCommand(proxy) if proxy else None,
                timeout=_PATIENCE,
                banner_timeout=_PATIENCE,
                auth_timeout=_PATIENCE,
            )
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._refused(error, f"[{host}]:{port}" if port != 22 else host) from None
        self._transport.set_keepalive(_ALIVE)
        if isinstance(self._transport.sock, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
            self._transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD * 1000)
        old = f"find files -type f -mtime +{KEPT} -delete 2>/dev/null"
        said = self.run(f"mkdir -p {_FOLDER}/files && cd {_FOLDER} || exit; {old}; pwd -P")
        self.folder = said.splitlines()[-1]  # before it may be what a shell says at its start

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            self._client.close()
        self._client = self._files = None

    def alone(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Nothing to do here: the runner takes a lock there."""
        return nullcontext()

    def push(self, files: Sequence[Path]) -> str:
        """Send files; see `autolite.devices.base.Device`."""
        digest = hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()[:16]
        names = [os.path.relpath(file, files[0].parent) for file in files]
        folder = f"{self.folder}/files/{digest}"
        for inner in {os.path.dirname(name) for name in names} - {""}:
            self.run(f"mkdir -p {shlex.quote(f'{folder}/{inner}')}")
        for name, file in zip(names, files, strict=True):
            with file.open("rb") as stream:
                self.send(stream, file.stat().st_size, f"{folder}/{name}")
        return f"{folder}/{names[0]}"

    def drop(self, paths: Sequence[str]) -> None:
        """Remove files; see `autolite.devices.base.Device`."""
        self.run(shlex.join(["rm", "-rf", *(path.rpartition("/")[0] for path in paths)]))

    def runner(self, words: Sequence[str], text: str = "") -> Iterator[str]:
        """Run the runner there; see `autolite.devices.base.Device`."""
        packed = zipped()
        file = f"{self.folder}/runner-{hashlib.sha256(packed).hexdigest()[:16]}.pyz"
        self.send(io.BytesIO(packed), len(packed), file)
        own = shlex.quote(f"{self.environment}/bin/python")
        # Not `exec`: the shell says which signal ended it, and the server would only end the connection.
        yield from self.lines(
            f'python={own}; [ -x "$python" ] || python=python3; "$python" {shlex.join([file, *words])}; exit $?', text
        )

    @property
    def environment(self) -> str:
        """Where the environment is that models run in: one for each version of ONNX Runtime, which is the one here."""
        import onnxruntime

        return f"{self.folder}/onnxruntime-{onnxruntime.__version__}"

    def run(self, command: str) -> str:
        """Run a command of the shell there and return its output.

        Raises:
            DeviceError: if it fails, with what it said.
            ConnectionLost: if the device goes away, or is silent for two minutes.
        """
        return "\n".join(self.lines(command))

    def lines(self, command: str, text: str = "") -> Iterator[str]:
        """Run a command of the shell there and yield the lines of its output and errors as they come; raises what
        `run` raises."""
        import paramiko

        said = ""
        try:
            channel = self._transport.open_session(timeout=_PATIENCE)
            with channel:
                channel.settimeout(_SILENCE)
                channel.set_combine_stderr(True)
                channel.exec_command(shlex.join(["sh", "-c", command]))
                with suppress(OSError):  # it has ended without reading
                    channel.sendall(text.encode())
                    channel.shutdown_write()
                with channel.makefile("rb") as output:
                    for raw in output:
                        line = raw.decode(errors="replace").rstrip("\n")
                        said = line.strip() or said
                        yield line
                code = channel.recv_exit_status()
        except TimeoutError:
            raise ConnectionLost(f"{self.address} has been silent for {_SILENCE:g} s") from None
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._lost(error) from None
        if code == -1:
            raise self._lost(None)
        check_status(self.address, command, code, said)

    def send(self, stream: IO[bytes], size: int, to: str) -> None:
        """Send a file of `size` bytes, unless it is there. It is there whole or not at all.

        Raises:
            DeviceError: if it does not fit.
            ConnectionLost: if the device goes away.
        """
        import paramiko

        part = f"{to}.{uuid.uuid4().hex[:8]}.part"
        try:
            files = self._sftp()
            if _is_there(files, to):
                files.utime(to, None)
                return
            if size > SMALL:
                check_room(self.address, self.folder, Path(to).name, size, self._free())
            if not _is_there(files, folder := to.rpartition("/")[0]):
                files.mkdir(folder)
            files.putfo(stream, part, size)
            files.posix_rename(part, to)
        except paramiko.SFTPError as error:
            raise DeviceError(f"{self.address} takes no files: {first_line(error)}") from None
        except (paramiko.SSHException, EOFError, TimeoutError, ConnectionError) as error:
            raise self._lost(error) from None
        except OSError as error:
            if str(error) == "Socket is closed" or not self._transport.is_active():
                raise self._lost(error) from None
            raise DeviceError(f"{self.address} cannot store {to}: {first_line(error)}") from None

    @property
    def _transport(self) -> paramiko.Transport:
        found = None if self._client is None else self._client.get_transport()
        if found is None:
            raise ConnectionLost(f"{self.address} is not connected")
        return found

    def _sftp(self) -> paramiko.SFTPClient:
        """The connection for files, made once."""
        import paramiko

        if self._files is None:
            try:
                self._files = paramiko.SFTPClient.from_transport(self._transport)
            except (paramiko.SSHException, EOFError):
                if not self._transport.is_active():
                    raise
            if self._files is None or (channel := self._files.get_channel()) is None:
                raise DeviceError(f"{self.address} takes no files: its SSH server lacks SFTP")
            channel.settimeout(_SILENCE)
        return self._files

    def _free(self) -> int:
        """The bytes that are free where models are kept."""
        return int(self.run(f"df -Pk {shlex.quote(self.folder)}").splitlines()[-1].split()[3]) * 1024

    def _lost(self, error: BaseException | None) -> ConnectionLost:
        reason = f" ({error})" if error is not None and str(error) else ""
        return ConnectionLost(f"the connection to {self.address} was lost{reason}")

    def _refused(self, error: Exception, host: str) -> DeviceError:
        """Say why there is no connection, and what helps."""
        import paramiko

        found = self._client and self._client.get_transport()
        answers = bool(found and found.is_active() and found.remote_version)
        match error:
            case paramiko.BadHostKeyException():
                return DeviceError(
                    f"{self.address} has another host key than ~/.ssh/known_hosts says: if that is right, remove the "
                    f"old one with ssh-keygen -R '{host}'"
                )
            case paramiko.PasswordRequiredException():
                return DeviceError(f"the key for {self.address} has a password: give it to the agent with ssh-add")
            case paramiko.SSHException() if "not found in known_hosts" in str(error):
                return DeviceError(f"{self.address} is not in ~/.ssh/known_hosts: connect to it once with ssh")
            case paramiko.AuthenticationException():
                answers = True
            case socket.gaierror():
                return ConnectionLost(f"cannot reach {self.address}: there is no host of the name {host}")
        if answers:
            return DeviceError(
                f"{self.address} does not let you in with the keys of ~/.ssh or the agent: put one there with "
                "ssh-copy-id"
            )
        reason = re.sub(r"^\[Errno \w+\] ", "", first_line(error)).rstrip(".")
        return ConnectionLost(
            f"cannot reach {self.address}: {reason}; is it on, connected, and is its SSH server running?"
        )


@cache
def zipped() -> bytes:
    """Return the runner as one file that Python runs: the modules as they are here, in packages that are else empty."""
    root = Path(__file__).parents[1]
    parts = {f"autolite/{name}": (root / name).read_bytes() for name in SENT}
    parts |= {f"{Path(name).parent}/__init__.py": b"" for name in parts}
    parts["__main__.py"] = b"import sys\nfrom autolite.devices.runner import main\nsys.exit(main(sys.argv[1:]))\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in sorted(parts.items()):
            archive.writestr(zipfile.ZipInfo(name), content)
    return packed.getvalue()


def _configured(host: str) -> dict[str, Any]:
    """What the user's ~/.ssh/config says of a host."""
    import paramiko

    file = Path.home() / ".ssh" / "config"
    if not file.is_file():
        return {}
    try:
        return dict(paramiko.SSHConfig.from_path(str(file)).lookup(host))
    except paramiko.SSHException as error:
        raise DeviceError(f"cannot read {file}: {first_line(error)}") from None


def _is_there(files: paramiko.SFTPClient, path: str) -> bool:
    try:
        files.stat(path)
    except FileNotFoundError:
        return False
    return True
