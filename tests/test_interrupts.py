"""An interruption waits for the transaction that it falls into, and leaves nothing locked."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from autolite.interrupts import let_finish


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_comes_after_the_transaction_and_leaves_the_database_free(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    engine = create_engine(url)
    let_finish(engine)

    def write() -> None:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE t (x INTEGER)"))
            interrupt()
            connection.execute(text("INSERT INTO t VALUES (1)"))

    with pytest.raises(KeyboardInterrupt):
        write()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with create_engine(url, connect_args={"timeout": 0}).begin() as other:
        other.execute(text("INSERT INTO t VALUES (2)"))  # or "database is locked"
        assert other.execute(text("SELECT count(*) FROM t")).scalar() == 2


def test_a_second_one_comes_at_once(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'study.db'}")
    let_finish(engine)
    reached = []

    def wait() -> None:
        with engine.begin():
            for number in range(3):
                interrupt()
                reached.append(number)

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert reached == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with engine.begin():  # nothing of it is left
        pass
