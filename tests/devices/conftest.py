"""Devices to test on: this machine, and this machine again at the other end of a real SSH connection, and of a real adb
that takes it for a phone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import psutil
import pytest

from autolite import registry
from autolite.architecture import shape_of
from autolite.contracts import tiny_context
from autolite.devices import adb, connected, ssh, timing
from autolite.devices.adb import SOURCE, Adb
from autolite.devices.base import Device
from autolite.devices.ssh import Ssh
from autolite.devices.timing import Artifact
from autolite.measure import Workload, random_texts
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.testing import VOCAB, tiny_model
from tests.devices.fake_adbd import FakePhone


@dataclass(frozen=True)
class Server:
    """An SSH server on a port of the loopback, that lets in who has the key in `folder`."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int

    def cut(self) -> None:
        """Break every connection; the server goes on."""
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if each.name().startswith("sshd"):
                    each.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no SSH server to start: apt install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # what it drops its privileges in
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    port = _free_port()
    (folder / "config").write_text(
        f"""Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv XDG_CACHE_HOME={folder}/cache TMPDIR={folder}
""",
        encoding="utf-8",
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            raise RuntimeError((folder / "log").read_text(encoding="utf-8"))
        yield Server(process, folder, port)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def home(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has the key, knows the host, and calls it "board"."""
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True)
    public = (server.folder / "host.pub").read_text(encoding="utf-8")
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {public}", encoding="utf-8")
    (ssh / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {server.port}\n  IdentityFile {server.folder}/user\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("HOME", str(ssh.parent))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return ssh.parent


@pytest.fixture
def board(home: Path, server: Server) -> Iterator[Ssh]:
    """The device over SSH, as if it had been set up: its environment's Python is the one that runs the tests."""
    environment = server.folder / "cache" / "autolite" / "device" / f"onnxruntime-{onnxruntime.__version__}" / "bin"
    environment.mkdir(parents=True, exist_ok=True)
    python = environment / "python"
    python.unlink(missing_ok=True)  # that of a real environment is a link to the system's
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with connected("ssh://board") as found:
        assert isinstance(found, Ssh)
        yield found


@pytest.fixture(scope="session")
def adb_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an adb server of our own, which has other keys than the user's."""
    if shutil.which("adb") is None:
        pytest.skip("there is no adb to ask: apt install adb")
    folder, port = tmp_path_factory.mktemp("adb"), _free_port()
    own = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder), "ANDROID_ADB_SERVER_PORT": str(port)}
    subprocess.run(["adb", "start-server"], env=own, capture_output=True, check=True, timeout=60)
    yield port
    subprocess.run(["adb", "-P", str(port), "kill-server"], capture_output=True, check=False, timeout=60)


@pytest.fixture(scope="session")
def library() -> Path:
    """ONNX Runtime as a library, which is what a phone has of it."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime has no library beside its Python module")
    return found[0]


@pytest.fixture(scope="session")
def runner(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phone's runner for this machine, beside its library."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler: apt install gcc libc6-dev")
    program = tmp_path_factory.mktemp("runner") / "runner"
    command = [compiler, "-std=gnu99", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    (program.parent / "libonnxruntime.so").symlink_to(library)
    return program


@pytest.fixture
def handset(adb_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePhone]:
    """What plays a phone, fresh from its box."""
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(adb_port))
    found = FakePhone(tmp_path / "handset")
    yield found
    found.switch_off()
    subprocess.run(["adb", "disconnect", found.serial], capture_output=True, check=False, timeout=60)


@pytest.fixture
def phone(handset: FakePhone, runner: Path, library: Path) -> Iterator[Adb]:
    """The device over adb, as if it had been set up."""
    with connected(f"adb://{handset.serial}") as found:
        assert isinstance(found, Adb)
        folder = Path(handset.there(found.program)).parent
        folder.mkdir()
        shutil.copy(runner, folder / "runner")
        (folder / "libonnxruntime.so").symlink_to(library)
        yield found


@pytest.fixture(params=["local", "ssh", "adb"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A connected device of each kind."""
    if request.param != "local":
        yield request.getfixturevalue({"ssh": "board", "adb": "phone"}[request.param])
    else:
        with connected("local") as found:
            yield found


@dataclass(frozen=True)
class Remote:
    """A device at the other end of a connection that can be cut; `silence` says how long it may be silent."""

    device: Ssh | Adb
    cut: Callable[[], None]
    silence: Callable[[float], None]


@pytest.fixture(params=["ssh", "adb"])
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A device of each kind that has a connection, which is made anew at once."""
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
    monkeypatch.setattr(adb, "_LOOK", 0.1)
    module, device, owner = {"ssh": (ssh, "board", "server"), "adb": (adb, "phone", "handset")}[request.param]
    return Remote(
        request.getfixturevalue(device),
        request.getfixturevalue(owner).cut,
        lambda seconds: monkeypatch.setattr(module, "_SILENCE", seconds),
    )


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Two artifacts of a tiny BERT."""
    teacher = tiny_context("bert", registry.get("task", "text-classification")).teacher
    (inputs,) = random_texts(teacher.shape.vocab, Workload(1, 8), count=1)
    found = {}
    for name in ("one", "two"):
        files = OnnxRuntime().emit(teacher, tmp_path_factory.mktemp(name))
        found[name] = Artifact(files, inputs)
    return found


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact that goes on from earlier calls."""
    model = tiny_model("llama", "language-modeling")
    (inputs,) = random_texts(VOCAB, Workload(2, 8), count=1)
    return Artifact(OnnxRuntime().emit(Student(model, shape_of(model)), tmp_path_factory.mktemp("decoder")), inputs)
