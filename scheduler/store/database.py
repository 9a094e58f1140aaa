"""Opening a database: which one, by whom, in what condition and with which schema.

Invariant: at most one process holds a database for writing; the lock dies with the process.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import StaticPool

from scheduler.errors import ConflictError, CorruptError, NewerError, OccupiedError, StoreError

ADVISORY_LOCK = 0x7E55E7A
WRITES = {"tessera_writes": True}
"""Execution options of the connection whose transactions take the write lock at once."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PRAGMAS = (
    "PRAGMA busy_timeout = 5000",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    "PRAGMA foreign_keys = ON",
)
_WRITER_PRAGMAS = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")


def parse(url: str) -> sa.URL:
    """Read a `--db` URL: `sqlite:///FILE`, `sqlite://` (in memory) or `postgresql://...`.

    Raises:
        StoreError: no such kind of database is supported.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StoreError(f"{url!r} is not a database URL; write sqlite:///FILE or postgresql://HOST/NAME.") from None
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite" or parsed.query:
        raise StoreError(f"{url!r}: only sqlite:///FILE and postgresql://HOST/NAME hold a ledger.")
    return parsed


def file_of(url: sa.URL) -> Path | None:
    """Return the file of a SQLite database on disk; None for any other."""
    on_disk = url.get_backend_name() == "sqlite" and url.database not in {None, "", ":memory:"}
    return Path(str(url.database)).absolute() if on_disk else None


def connect(url: sa.URL, *, read_only: bool = False) -> sa.Engine:
    """Return an engine whose connections are set up as the ledger needs them; nothing is opened yet."""
    if url.get_backend_name() == "postgresql":
        try:
            return sa.create_engine(url)
        except ModuleNotFoundError:
            raise StoreError("PostgreSQL needs the package psycopg; install tessera-scheduler[postgres].") from None
    file = file_of(url)
    if file is None:
        engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    else:
        address = f"file:{_quoted(file)}?mode={'ro' if read_only else 'rwc'}"
        open_file = partial(sqlite3.connect, address, uri=True, check_same_thread=False)
        engine = sa.create_engine("sqlite://", poolclass=sa.QueuePool, creator=open_file)
    pragmas = _PRAGMAS if read_only else (*_PRAGMAS, *_WRITER_PRAGMAS)

    @event.listens_for(engine, "connect")
    def _set_up(raw: sqlite3.Connection, _: object) -> None:
        raw.isolation_level = None  # the driver would begin transactions by itself, and not IMMEDIATE
        for pragma in pragmas:
            raw.execute(pragma)

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = "tessera_writes" in connection.get_execution_options()
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _quoted(file: Path) -> str:
    return str(file).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def occupy(url: sa.URL, engine: sa.Engine) -> Callable[[], None]:
    """Take the database for this process and return the call that gives it back.

    Raises:
        OccupiedError: another process has it.
    """
    file = file_of(url)
    if file is not None:
        return _lock_file(file)
    if url.get_backend_name() == "postgresql":
        return _lock_server(engine)
    return lambda: None


def _lock_file(file: Path) -> Callable[[], None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise OccupiedError(
            f"Another Tessera already works on {file}; stop that one first, or name another --db for another cluster."
        ) from None
    return lambda: os.close(lock)


def _lock_server(engine: sa.Engine) -> Callable[[], None]:
    holder = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    if holder.scalar(sa.select(sa.func.pg_try_advisory_lock(ADVISORY_LOCK))):
        return lambda: _unlock(holder)
    holder.close()
    where = engine.url.render_as_string()
    raise OccupiedError(
        f"Another Tessera already works on {where}; stop that one first, or name another --db for another cluster."
    )


def _unlock(holder: sa.Connection) -> None:
    holder.invalidate()  # the lock belongs to the database connection, so that must end
    holder.close()


def check(engine: sa.Engine) -> None:
    """Let SQLite read every page once.

    Raises:
        CorruptError: the file is damaged or is no database.
    """
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if said != "ok":
            raise CorruptError(_damaged(str(said)))


def _damaged(detail: str) -> str:
    return (
        f"The ledger's database is damaged ({detail}). Restore a backup, or move the file away and start with an empty"
        " ledger: running pods are adopted from the cluster, history is lost."
    )


def translate(error: Exception) -> StoreError:
    """Return a driver's error as the sentence that a caller may see."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    if isinstance(cause, sqlite3.Error) and (getattr(cause, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED:
        return CorruptError(_damaged(str(cause)))
    return StoreError(f"The ledger's database failed: {cause}")


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into ours: what a constraint refuses is a conflict, the rest a failed store."""
    try:
        yield
    except sa.exc.IntegrityError as error:
        raise ConflictError(f"The ledger's database refused this change: {error.orig}") from error
    except (sa.exc.SQLAlchemyError, OSError, sqlite3.Error) as error:
        raise translate(error) from error


def migrate(connection: sa.Connection) -> None:
    """Bring the schema to this program's, inside the caller's transaction.

    Raises:
        NewerError: the database has revisions that this program does not know.
    """
    if _is_current(connection):
        return
    from alembic import command  # noqa: PLC0415 - a third of a second that only a migration is worth
    from alembic.config import Config  # noqa: PLC0415 - as above

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")


def require_current(connection: sa.Connection) -> None:
    """Refuse a schema other than this program's, where nothing may be changed.

    Raises:
        StoreError: the schema is older, or there is none.
        NewerError: it is newer.
    """
    if not _is_current(connection):
        raise StoreError(
            "This database holds no ledger of this version; start tessera serve on it once to bring it up."
        )


def _is_current(connection: sa.Connection) -> bool:
    here = None
    if sa.inspect(connection).has_table("alembic_version"):
        here = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    known = revisions()
    if here is not None and here not in known:
        raise NewerError(
            f"The ledger's database has schema {here}, which is newer than this Tessera; start the newer Tessera again"
            " or restore the backup that was made before the upgrade."
        )
    return here == known[-1]


def revisions() -> list[str]:
    """Return the revisions of the schema, oldest first: the numbers in the names of their files."""
    return sorted(file.name[1:].partition("_")[0] for file in (_MIGRATIONS / "versions").glob("r*_*.py"))
