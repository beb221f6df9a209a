"""What a run remembers besides Optuna's trials: AutoLite's tables in the same database (any SQLAlchemy URL)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, String, create_engine, event, select
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from autolite.errors import RunError, StorageError
from autolite.measure import Measurement

TEACHER_SHAPE = "teacher shape"  # the fact with the teacher's ModelShape: what prices for another target start from


class Base(DeclarativeBase):
    """Base of AutoLite's tables."""


class Fact(Base):
    """One JSON value a run keeps by name: its fingerprint, the budget spent, what a stage decided to do."""

    __tablename__ = "autolite_fact"
    run: Mapped[str] = mapped_column(String(200), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[Any] = mapped_column(JSON)


class MeasurementRow(Base):
    """One Measurement of one plan in one run."""

    __tablename__ = "autolite_measurement"
    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[str] = mapped_column(String(200), index=True)
    plan_digest: Mapped[str] = mapped_column(String(64), index=True)
    stage: Mapped[str] = mapped_column(String(20))
    metric: Mapped[str] = mapped_column(String(60))
    value: Mapped[float] = mapped_column(Float(53))
    low: Mapped[float] = mapped_column(Float(53))
    high: Mapped[float] = mapped_column(Float(53))
    source: Mapped[str] = mapped_column(String(20))
    runtime: Mapped[str] = mapped_column(String(60))
    workload: Mapped[str] = mapped_column(String(200))
    made: Mapped[datetime]


class Artifact(Base):
    """A file that was emitted for a plan, by content: equal bytes have one row."""

    __tablename__ = "autolite_artifact"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class ArtifactOfPlan(Base):
    """Which artifacts a plan has in a run."""

    __tablename__ = "autolite_plan_artifact"
    run: Mapped[str] = mapped_column(String(200), primary_key=True)
    plan_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("autolite_artifact.sha256"), primary_key=True)


FULL = "the disk is full while writing {}: free some space and type the same command again; what was found is kept"


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a full disk, a file that cannot be written or a broken database into one clear StorageError or RunError."""
    try:
        try:
            yield
        except Exception as error:
            # Optuna hides SQLAlchemy's error behind one of its own, which says nothing.
            if type(error).__name__ == "StorageInternalError" and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
    except OSError as error:
        # shutil gathers the errors of a copied tree in a list and has no errno of its own.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or f"[Errno {errno.ENOSPC}]" in str(error):
            raise StorageError(FULL.format(what)) from error
        raise StorageError(f"{what} cannot be read or written: {error}") from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise StorageError(f"not a usable storage URL for {what}: {error}") from error
    except DatabaseError as error:
        reason = str(error.orig or error).splitlines()[0]
        if "full" in reason:
            raise StorageError(FULL.format(what)) from error
        if any(text in reason for text in ("not a database", "malformed", "no such table", "no such column")):
            raise RunError(
                f"{what} is not a readable study ({reason}): move it away, or choose another directory with --out"
            ) from error
        raise StorageError(f"the database {what} cannot be used: {reason}") from error


class Store:
    """AutoLite's tables of one run. Every write is one transaction: after `kill -9` a row is there or it is not."""

    def __init__(self, url: str, run: str) -> None:
        self.url, self.run = url, run
        with storage_errors(url):
            self._engine = create_engine(url, **engine_kwargs(url))
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _use_wal)
            Base.metadata.create_all(self._engine)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with storage_errors(self.url), Session(self._engine) as session, session.begin():
            yield session

    def get(self, key: str, default: Any = None) -> Any:
        """Return the fact called `key`, or `default`."""
        with self._session() as session:
            fact = session.get(Fact, (self.run, key))
            return default if fact is None else fact.value

    def facts(self, prefix: str) -> dict[str, Any]:
        """Return all facts whose key begins with `prefix`, by key, in order."""
        with self._session() as session:
            found = select(Fact).filter_by(run=self.run).where(Fact.key.startswith(prefix, autoescape=True))
            return {fact.key: fact.value for fact in session.scalars(found.order_by(Fact.key))}

    def put(self, key: str, value: Any) -> None:
        """Write the fact called `key` (plain JSON types), replacing what was there."""
        with self._session() as session:
            session.merge(Fact(run=self.run, key=key, value=value))

    def add_measurements(self, plan_digest: str, stage: str, measurements: list[Measurement]) -> list[int]:
        """Append measurements of a plan; returns their row ids."""
        now = datetime.now(UTC).replace(tzinfo=None)
        rows = [
            MeasurementRow(run=self.run, plan_digest=plan_digest, stage=stage, made=now, **m.to_json())
            for m in measurements
        ]
        with self._session() as session:
            session.add_all(rows)
            session.flush()
            return [row.id for row in rows]

    def measurements(self, plan_digest: str) -> list[Measurement]:
        """Return every measurement of a plan in this run, oldest first."""
        with self._session() as session:
            query = select(MeasurementRow).filter_by(run=self.run, plan_digest=plan_digest).order_by(MeasurementRow.id)
            return [
                Measurement(r.metric, r.value, r.low, r.high, r.source, r.runtime, r.workload)  # type: ignore[arg-type]
                for r in session.scalars(query)
            ]

    def add_artifact(self, plan_digest: str, file: Path, sha256: str) -> None:
        """Record that a plan has this file."""
        with self._session() as session:
            session.merge(Artifact(sha256=sha256, name=file.name, size_bytes=file.stat().st_size))
            session.flush()
            session.merge(ArtifactOfPlan(run=self.run, plan_digest=plan_digest, sha256=sha256))

    def close(self) -> None:
        """Release the database's connections."""
        self._engine.dispose()


def engine_kwargs(url: str) -> dict[str, Any]:
    """Return the engine settings for a storage URL; a busy SQLite file is waited for, up to a minute."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}


def _use_wal(connection: Any, _record: Any) -> None:
    """Write-ahead logging lets others (optuna-dashboard) read a study while it is written."""
    connection.execute("PRAGMA journal_mode=WAL")
