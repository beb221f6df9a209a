"""SSH as it goes wrong: who is not let in is told why, and what was measured before a connection broke is kept."""

from __future__ import annotations

import shlex
import socket
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from autolite.devices import connected, ssh
from autolite.devices import timing as timings
from autolite.devices.base import ConnectionLost, Health, health_of
from autolite.devices.setup import setup
from autolite.devices.ssh import Ssh
from autolite.devices.timing import Artifact, time_on
from autolite.errors import DeviceError
from tests.devices.conftest import Server


def test_files_are_sent_once_and_whole(board: Ssh, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model" * 100_000)
    (tmp_path / "model.onnx.data").write_bytes(b"data")
    files = [tmp_path / "model.onnx", tmp_path / "model.onnx.data"]
    there = Path(board.push(files))
    assert [f.name for f in sorted(there.parent.iterdir())] == ["model.onnx", "model.onnx.data"]
    assert there.read_bytes() == files[0].read_bytes()
    before = there.stat().st_ino
    assert board.push(files) == str(there)
    assert there.stat().st_ino == before
    files[1].write_bytes(b"other")
    assert board.push(files) != str(there), "others go elsewhere"


def test_a_file_that_broke_off_is_sent_again(board: Ssh, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"whole")
    there = Path(board.push([tmp_path / "m"]))
    there.rename(f"{there}.0.part")
    assert Path(board.push([tmp_path / "m"])).read_bytes() == b"whole"


def test_data_in_a_folder_beside_the_model_stays_there(board: Ssh, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "m.onnx").write_bytes(b"model")
    (tmp_path / "w" / "x.bin").write_bytes(b"weights")
    there = Path(board.push([tmp_path / "m.onnx", tmp_path / "w" / "x.bin"]))
    assert (there.parent / "w" / "x.bin").read_bytes() == b"weights"


def test_a_full_disk_is_told_before_anything_is_sent(
    board: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(Ssh, "_free", lambda device: 4096)
    with pytest.raises(DeviceError, match=r"has 4,096 bytes free where .* large has 2,000,000: remove"):
        board.push([tmp_path / "large"])


# Getting in


def test_a_user_and_a_port_are_part_of_the_address(server: Server, home: Path) -> None:
    (home / ".ssh" / "id_ed25519").write_bytes((server.folder / "user").read_bytes())
    (home / ".ssh" / "config").unlink()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    with connected(f"ssh://{user}@127.0.0.1:{server.port}") as found:
        assert isinstance(found, Ssh)
        assert found.run("id -un").strip() == user


def test_a_host_that_is_not_known(home: Path) -> None:
    (home / ".ssh" / "known_hosts").unlink()
    with (
        pytest.raises(DeviceError, match=r"is not in ~/.ssh/known_hosts: connect to it once with ssh"),
        connected("ssh://board"),
    ):
        pass


def test_a_host_that_is_another_one(server: Server, home: Path) -> None:
    other = (server.folder / "stranger.pub").read_text(encoding="utf-8")
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {other}", encoding="utf-8")
    with pytest.raises(DeviceError, match=r"has another host key than .* ssh-keygen -R"), connected("ssh://board"):
        pass


def test_a_key_that_is_not_taken(server: Server, home: Path) -> None:
    config = home / ".ssh" / "config"
    config.write_text(config.read_text(encoding="utf-8").replace("/user", "/stranger"), encoding="utf-8")
    with (
        pytest.raises(DeviceError, match=r"does not let you in with the keys .* ssh-copy-id"),
        connected("ssh://board"),
    ):
        pass


def test_a_key_with_a_password_is_for_the_agent(server: Server, home: Path) -> None:
    key = home / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    config = home / ".ssh" / "config"
    text = config.read_text(encoding="utf-8").replace(str(server.folder / "user"), str(key))
    config.write_text(text, encoding="utf-8")
    with (
        pytest.raises(DeviceError, match="has a password: give it to the agent with ssh-add"),
        connected("ssh://board"),
    ):
        pass


def test_no_key_at_all(server: Server, home: Path) -> None:
    (home / ".ssh" / "config").unlink()
    with pytest.raises(DeviceError, match="does not let you in"), connected(f"ssh://127.0.0.1:{server.port}"):
        pass


def test_what_answers_is_no_ssh_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"ssh://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionLost, match=f"cannot reach {address}: .*SSH"), connected(address):
            pass


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1:1", "[Rr]efused|[Uu]nable to connect"), ("no-host.invalid", "there is no host of the name")],
)
def test_a_host_that_is_not_there(host: str, reason: str, home: Path) -> None:
    with pytest.raises(ConnectionLost, match=f"cannot reach ssh://{host}: .*({reason})"), connected(f"ssh://{host}"):
        pass


def test_a_configuration_that_cannot_be_read(home: Path) -> None:
    (home / ".ssh" / "config").write_text("Host board\n  Match nonsense\n", encoding="utf-8")
    with pytest.raises(DeviceError, match=r"cannot read .*config"), connected("ssh://board"):
        pass


# Connections that break


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "_PAUSE", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_device_that_stays_away_is_given_up(
    board: Ssh, server: Server, artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(board, "port", 1)  # where it is looked for when it is gone
    server.cut()
    with pytest.raises(ConnectionLost, match="cannot reach"):
        time_on(board, artifacts, threads=1, seconds=0.0, say=said.append)
    assert len(said) == 3


# Setting it up


def test_a_device_without_onnx_runtime_has_a_version_of_none(board: Ssh) -> None:
    board.run(f"mv {board.environment} {board.environment}.away")
    try:
        bare = board.run("python3 -c 'import onnxruntime' 2>&1; true")
        assert (health_of(board).onnxruntime is None) == ("ModuleNotFoundError" in bare)
    finally:
        board.run(f"mv {board.environment}.away {board.environment}")


def test_a_processor_without_packages_is_refused(board: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health(**{**vars(health_of(board)), "machine": "armv7l", "onnxruntime": None})
    monkeypatch.setattr("autolite.devices.setup.health_of", lambda device: health)
    with pytest.raises(DeviceError, match=r"is a machine of armv7l with glibc .* alone"):
        setup(board)


def test_a_python_without_packages_is_refused(board: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health(**{**vars(health_of(board)), "python": "3.7.3", "onnxruntime": None})
    monkeypatch.setattr("autolite.devices.setup.health_of", lambda device: health)
    with pytest.raises(DeviceError, match=r"there is no onnxruntime .* for Python 3\.7 on .*: install a newer"):
        setup(board)


@pytest.mark.slow
def test_a_device_is_set_up_once(board: Ssh, monkeypatch: pytest.MonkeyPatch, artifacts: dict[str, Artifact]) -> None:
    board.run(f"rm -rf {shlex.quote(board.environment)}")
    said = list[str]()
    health = setup(board, said.append)
    assert len(said) == 3
    setup(board, said.append)
    assert len(said) == 3, "nothing was done again"
    assert health.onnxruntime == onnxruntime.__version__
    assert "/onnxruntime-" in board.run(f"{board.environment}/bin/python -c 'import sys; print(sys.prefix)'")
    assert time_on(board, artifacts, threads=1, seconds=0.0, warmup=0.0).timings
