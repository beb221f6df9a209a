"""A PostgreSQL server of the tests' own, where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest


def programs() -> Path | None:
    """The folder with initdb and postgres: of the search path, or where Debian puts them, the newest."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "postgres").is_file() and (f / "initdb").is_file()), None)


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a server on a free port, with its data in a temporary folder, and yield its URL; skips where it cannot."""
    bin_dir = programs()
    if bin_dir is None:
        pytest.skip("PostgreSQL's initdb and postgres are not installed")
    as_user: dict[str, Any] = {}
    if os.getuid() == 0:  # which the server refuses to run as
        try:
            other = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
        as_user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="autolite-postgresql-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if as_user:
            os.chown(folder, as_user["user"], as_user["group"])
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}
        make = [bin_dir / "initdb", "-D", folder / "data", "-A", "trust", "-U", "autolite", "--no-sync", "-E", "UTF8"]
        subprocess.run([*make, "--locale=C"], check=True, **quiet)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(folder)]
        server = subprocess.Popen([bin_dir / "postgres", "-D", folder / "data", "-p", str(port), *options], **quiet)
        try:
            for _ in range(300):
                try:
                    psycopg.connect(host="127.0.0.1", port=port, user="autolite", dbname="postgres").close()
                    break
                except psycopg.OperationalError:
                    assert server.poll() is None, "the server ended at once"
                    time.sleep(0.1)
            yield f"postgresql+psycopg://autolite@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()  # waits for connections to end; a second signal would not
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.send_signal(2)  # SIGINT: connections are ended
                server.wait(timeout=20)
