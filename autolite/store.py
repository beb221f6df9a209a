"""What a run remembers besides Optuna's trials: AutoLite's tables in the same database (any SQLAlchemy URL)."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    CursorResult,
    Float,
    ForeignKey,
    String,
    Update,
    and_,
    create_engine,
    event,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from autolite.errors import RunError, StorageError
from autolite.interrupts import let_finish
from autolite.measure import Measurement

NAME = ".name"  # the file in a run's folder with what the run is called in its database
TEACHER_SHAPE = "teacher shape"  # the fact with the teacher's ModelShape: what prices for another target start from
TEST, FURTHER = "test ", "further "  # what the keys of finalists' numbers on the test split begin with


class Base(DeclarativeBase):
    """Base of AutoLite's tables."""


class Fact(Base):
    """One JSON value a run keeps by name: its fingerprint, the budget spent, what a stage decided to do."""

    __tablename__ = "autolite_fact"
    run: Mapped[str] = mapped_column(String(200), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[Any] = mapped_column(JSON)


class LeaseRow(Base):
    """Who may work on what, and until when. `token` grows with every new holder; `expires` is in seconds of the
    database's clock since 1970, 0 when given up."""

    __tablename__ = "autolite_lease"
    run: Mapped[str] = mapped_column(String(200), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    token: Mapped[int] = mapped_column(BigInteger)
    expires: Mapped[float] = mapped_column(Float(53))


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
    runtime: Mapped[str] = mapped_column(String(200))
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
    """Turn a full disk, a file that cannot be written or a broken database into one clear StorageError or RunError.
    Passwords in a URL are not shown."""
    what = re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", what)
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
    except ModuleNotFoundError as error:
        if error.name not in ("psycopg", "psycopg2"):
            raise
        raise StorageError(
            f"PostgreSQL needs {error.name}, which is not installed: pip install 'autolite[postgresql]', and write "
            "the URL as postgresql+psycopg://user:password@host/database"
        ) from error
    except DatabaseError as error:
        reason = str(error.orig or error).splitlines()[0]
        if "full" in reason:
            raise StorageError(FULL.format(what)) from error
        if any(text in reason for text in ("not a database", "malformed", "no such table", "no such column")):
            raise RunError(
                f"{what} is not a readable study ({reason}): move it away, or choose another directory with --out"
            ) from error
        raise StorageError(f"the database {what} cannot be used: {reason}") from error


def storage_url(out: Path, storage: str | None) -> str:
    """Return the URL of the database of the run in `out`; a SQLite file there unless it was given another."""
    return storage or f"sqlite:///{(out / 'study.db').resolve()}"


def database_of(out: Path, storage: str | None) -> tuple[str, str]:
    """Return the URL of the database of the run that `out` has, and the run's name in it; nothing is opened or made.

    Raises:
        RunError: if there is no run.
    """
    file = out / NAME
    if not file.is_file() or (storage is None and not (out / "study.db").is_file()):
        raise RunError(
            f"{out} has no run ({NAME} and study.db): if it was given a --storage, name the same one; else type its "
            "search command"
        )
    return storage_url(out, storage), file.read_text(encoding="utf-8")


class Store:
    """AutoLite's tables of one run. Every write is one transaction: after `kill -9` a row is there or it is not."""

    def __init__(self, url: str, run: str) -> None:
        self.url, self.run = url, run
        with storage_errors(url):
            self._engine = create_engine(url, **engine_kwargs(url))
            let_finish(self._engine)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _use_wal)
            try:
                Base.metadata.create_all(self._engine)
            except DatabaseError as error:
                if "already exists" not in str(error):
                    raise
                # Another process made them in this moment.
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
        self._merge(Fact(run=self.run, key=key, value=value))

    def _merge(self, *rows: Base) -> None:
        """Write rows in place of those with their keys, each in a transaction of its own."""
        for row in rows:
            with storage_errors(self.url):
                try:
                    with Session(self._engine) as session, session.begin():
                        session.merge(row)
                except IntegrityError:  # another process wrote the first one in this moment
                    with Session(self._engine) as session, session.begin():
                        session.merge(row)

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
        self._merge(
            Artifact(sha256=sha256, name=file.name, size_bytes=file.stat().st_size),
            ArtifactOfPlan(run=self.run, plan_digest=plan_digest, sha256=sha256),
        )

    def take_lease(self, key: str, owner: str, seconds: float, *, force: bool = False) -> int | None:
        """Make `owner` the holder of `key` for so long and return its token, higher than any before; None while
        somebody else (or `owner` itself) holds it, unless `force`."""
        now = self._now()
        free = and_(LeaseRow.run == self.run, LeaseRow.key == key, or_(LeaseRow.expires <= now, literal(force)))
        with self._session() as session:
            # One statement: of two processes that take it at once, the second finds it taken.
            values = {"owner": owner, "token": LeaseRow.token + 1, "expires": now + seconds}
            taken = changed_rows(session, update(LeaseRow).where(free).values(values))
            found = session.get(LeaseRow, (self.run, key))
            if found is not None:
                return found.token if taken else None
        first = insert(LeaseRow).values(run=self.run, key=key, owner=owner, token=1, expires=now + seconds)
        with storage_errors(self.url):
            try:
                with Session(self._engine) as session, session.begin():
                    session.execute(first)
            except IntegrityError:  # another process was first
                return None
        return 1

    def renew_lease(self, key: str, token: int, seconds: float) -> bool:
        """Hold `key` for so long from now; False if another has taken it since. One that ran out and was not taken
        by another is held again."""
        return self._change(key, token, self._now() + seconds)

    def end_lease(self, key: str, token: int) -> bool:
        """Give `key` up; False if another has taken it already."""
        return self._change(key, token, 0.0)

    def _change(self, key: str, token: int, expires: Any) -> bool:
        with self._session() as session:
            return changed_rows(session, change_lease(self.run, key, token, expires)) == 1

    def holder(self, key: str) -> str | None:
        """Return who holds `key` now."""
        with self._session() as session:
            held = select(LeaseRow.owner).filter_by(run=self.run, key=key).where(LeaseRow.expires > self._now())
            return session.scalar(held)

    def leases(self, prefix: str) -> set[str]:
        """Return the keys with this beginning that somebody holds now."""
        with self._session() as session:
            held = select(LeaseRow.key).where(LeaseRow.run == self.run, LeaseRow.expires > self._now())
            return set(session.scalars(held.where(LeaseRow.key.startswith(prefix, autoescape=True))))

    def end_leases_with(self, key: str) -> None:
        """Give up everything that the last holder of `key` held: for when it is known to be gone."""
        with self._session() as session:
            last = select(LeaseRow.owner).filter_by(run=self.run, key=key).scalar_subquery()
            mine = and_(LeaseRow.run == self.run, LeaseRow.owner == last)
            session.execute(update(LeaseRow).where(mine).values(expires=0.0))

    def _now(self) -> ColumnElement[float]:
        """Seconds since 1970 by the database's clock: those of the machines need not agree."""
        return literal_column(_NOW.get(self._engine.dialect.name, _NOW["postgresql"]), Float)

    def close(self) -> None:
        """Release the database's connections."""
        self._engine.dispose()


_NOW = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "mysql": "unix_timestamp(now(6))",
    "mariadb": "unix_timestamp(now(6))",
    "postgresql": "cast(extract(epoch from clock_timestamp()) as double precision)",
}


def change_lease(run: str, key: str, token: int, expires: Any) -> Update:
    """Return the statement that sets when a lease ends: of one row if `token` still is that of its holder, or none."""
    held = and_(LeaseRow.run == run, LeaseRow.key == key, LeaseRow.token == token)
    return update(LeaseRow).where(held).values(expires=expires)


def changed_rows(session: Session, statement: Update) -> int:
    """Run a statement and return the number of rows that it changed."""
    return cast("CursorResult[Any]", session.execute(statement)).rowcount


def engine_kwargs(url: str) -> dict[str, Any]:
    """Return the engine settings for a storage URL; a busy SQLite file is waited for, up to a minute, and a server's
    connection that broke while nothing was asked is made anew."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def _use_wal(connection: Any, _record: Any) -> None:
    """Write-ahead logging lets others (optuna-dashboard) read a study while it is written."""
    connection.execute("PRAGMA journal_mode=WAL")
