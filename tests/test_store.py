"""What a run remembers survives, and a database that cannot be used is one clear sentence."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import optuna
import pytest

from autolite.errors import RunError, StorageError
from autolite.measure import Measurement
from autolite.store import Store, storage_errors


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def test_facts_and_measurements_are_there_after_reopening(tmp_path: Path) -> None:
    found = Measurement("latency_ms", 1.5, 1.0, 2.0, "measured", "onnxruntime 1", "batch=1")
    store = Store(url(tmp_path), "run")
    store.put("spent", 3.5)
    store.put("spent", 4.5)
    ids = store.add_measurements("abc", "screen", [found, found])
    store.close()
    again = Store(url(tmp_path), "run")
    assert again.get("spent") == 4.5
    assert again.get("nothing", "default") == "default"
    assert again.measurements("abc") == [found, found]
    assert len(set(ids)) == 2


def test_runs_in_one_database_do_not_see_each_other(tmp_path: Path) -> None:
    one, other = Store(url(tmp_path), "one"), Store(url(tmp_path), "other")
    one.put("spent", 1)
    assert other.get("spent") is None


def test_an_artifact_of_two_plans_is_stored_once(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"12345")
    store = Store(url(tmp_path), "run")
    for digest in ("one", "two", "one"):
        store.add_artifact(digest, file, "hash")
    store.close()
    with sqlite3.connect(tmp_path / "study.db") as database:
        count = {
            table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("autolite_artifact", "autolite_plan_artifact")
        }
    assert count == {"autolite_artifact": 1, "autolite_plan_artifact": 2}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")])
def test_a_full_disk_is_named_with_the_remedy(error: OSError) -> None:
    with pytest.raises(StorageError, match=r"disk is full .*free some space"), storage_errors("runs/x"):
        raise error


def test_a_full_database_is_named_through_what_optuna_makes_of_it(tmp_path: Path) -> None:
    storage = optuna.storages.RDBStorage(url(tmp_path))
    study = optuna.create_study(storage=storage)
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")

    def fill() -> None:
        with storage_errors(url(tmp_path)):
            for _ in range(200):
                study.ask().set_user_attr("large", "x" * 2000)

    with pytest.raises(StorageError, match="disk is full"):
        fill()


def test_a_file_that_is_no_database_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"this is not SQLite, but long enough to look like a file " * 20)
    with pytest.raises(RunError, match=r"not a readable study.*--out"):
        Store(url(tmp_path), "run")


def test_a_driver_that_is_not_installed_is_named_with_the_remedy() -> None:
    with pytest.raises(StorageError, match=r"autolite\[postgresql\]"), storage_errors("postgresql+psycopg://x/y"):
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")


def test_errors_do_not_show_passwords() -> None:
    with pytest.raises(StorageError, match=r"me:\*\*\*@server/x") as raised:
        Store("mongodb://me:secret@server/x", "run")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("bad", ["nonsense", "mongodb://x/y", "sqlite:////no/such/folder/study.db"])
def test_a_storage_url_that_cannot_be_used_is_refused(bad: str) -> None:
    with pytest.raises(StorageError, match=r"storage URL|cannot be used"):
        Store(bad, "run")
