"""What is refused at the door: a second writer, a newer schema, a damaged file; and what the tables enforce."""

from __future__ import annotations

import random
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory

from scheduler.errors import ConflictError, CorruptError, NewerError, OccupiedError, StoreError
from scheduler.model.reservation import State
from scheduler.store import database, schema
from scheduler.store.store import Store
from tests.ledger.lives import history

OpenStore = Callable[[], Store]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the file of a ledger with 40 journal lines."""
    path = tmp_path / "ledger.db"
    store = Store.open(f"sqlite:///{path}")
    assert store.commit([tuple(history(State.BOUND, str(number))) for number in range(10)]) == [None] * 10
    store.close()
    return path


@pytest.mark.parametrize("url", ["file", "postgres"], indirect=True)
def test_a_second_writer_is_refused_until_the_first_has_gone(opened: OpenStore) -> None:
    first = opened()
    with pytest.raises(OccupiedError, match="already works on"):
        opened()
    first.close()
    assert opened().fence == 2


@pytest.mark.parametrize("url", ["file", "postgres"], indirect=True)
def test_a_newer_schema_is_refused_for_writing_and_reading(opened: OpenStore, url: str) -> None:
    store = opened()
    assert store._writer is not None
    with store._writer.begin():
        store._writer.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    for attempt in (opened, lambda: Store.read(url)):
        with pytest.raises(NewerError, match="newer than this Tessera") as caught:
            attempt()
        assert caught.value.code == "store.newer"


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_text("these are not the pages you are looking for\n" * 200)
    for attempt in (Store.open, Store.read):
        with pytest.raises(CorruptError, match="Restore a backup") as caught:
            attempt(f"sqlite:///{path}")
        assert caught.value.code == "store.corrupt"
    assert path.read_text().startswith("these"), "nothing was written over it"


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_page_is_refused_or_found_or_harmless(file: Path, seed: int) -> None:
    url, rng = f"sqlite:///{file}", random.Random(seed)
    with Store.read(url) as store:
        lines = list(store.journal())
    content = bytearray(file.read_bytes())
    start = rng.randrange(0, len(content) - 64)
    content[start : start + 64] = rng.randbytes(64)
    file.write_bytes(content)
    try:
        with Store.open(url) as store:
            found = store.verify()
            if found.ok:
                assert list(store.journal()) == lines
            else:
                assert found.text
    except StoreError:
        return  # refused


def test_a_cut_file_is_refused(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptError, match="damaged"):
        Store.open(f"sqlite:///{file}")


def test_a_full_disk_fails_commits_and_loses_nothing(file: Path) -> None:
    with Store.open(f"sqlite:///{file}") as store:
        assert store._writer is not None
        head = store.head
        pages = store._writer.exec_driver_sql("PRAGMA page_count").scalar()
        store._writer.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        store._writer.rollback()
        group = [tuple(history(State.BOUND, f"more-{number}", fence=store.fence)) for number in range(60)]
        results = store.commit(group)
        assert all(isinstance(result, StoreError) and "full" in str(result) for result in results)
        assert store.head == head
        assert store.verify().ok
        store._writer.exec_driver_sql("PRAGMA max_page_count = 100000")
        store._writer.rollback()
        assert store.commit(group) == [None] * 60
        assert store.verify().ok


def test_a_disk_without_room_is_found_by_a_group_without_changes(file: Path) -> None:
    with Store.open(f"sqlite:///{file}") as store:
        before = store.head, store.verify(), store.accounts()
        assert store.commit([()]) == [None]
        log = file.with_name("ledger.db-wal").stat().st_size
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log, unlimited[1]))  # no file of this process grows beyond that
        try:
            found = [store.commit([()])[0] for _ in range(3)]
            rows = store.load()[0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert all(isinstance(error, StoreError) for error in found)
        assert len(rows) == 10
        assert store.commit([()]) == [None]
        assert (store.head, store.verify(), store.accounts()) == before


def test_a_database_that_another_holds_fails_commits_and_is_read_all_the_same(file: Path) -> None:
    with Store.open(f"sqlite:///{file}") as store, sqlite3.connect(file, isolation_level=None) as other:
        assert store._writer is not None
        store._writer.exec_driver_sql("PRAGMA busy_timeout = 20")  # not five seconds
        store._writer.rollback()
        other.execute("BEGIN IMMEDIATE")
        changes = tuple(history(State.BOUND, "new", fence=store.fence))
        (error,) = store.commit([changes])
        assert isinstance(error, StoreError)
        assert not isinstance(error, ConflictError)
        assert "locked" in str(error)
        assert "new" not in store.load()[0]
        other.execute("ROLLBACK")
        assert store.commit([changes]) == [None]
        assert "new" in store.load()[0]
        assert store.verify().ok
    other.close()


def test_reading_needs_a_ledger_of_this_version(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no ledger at"):
        Store.read(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    empty = tmp_path / "empty.db"
    with sqlite3.connect(empty) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(StoreError, match="no ledger of this version"):
        Store.read(f"sqlite:///{empty}")


def test_a_reader_sees_commits_and_cannot_write(file: Path) -> None:
    url = f"sqlite:///{file}"
    with Store.open(url) as store, Store.read(url) as reader:
        before = reader.verify()
        assert store.commit([tuple(history(State.BOUND, "new", fence=store.fence))]) == [None]
        after = reader.verify()
        assert (before.ok, after.ok, after.rows - before.rows) == (True, True, 4)
        with reader._engine.connect() as connection, pytest.raises(sa.exc.OperationalError, match="readonly"):
            connection.execute(sa.delete(schema.journal))


def test_odd_file_names_work(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/deep/er/100%25 a%20b #1.db"
    with Store.open(url) as store:
        assert store.commit([tuple(history(State.BOUND))]) == [None]
    with Store.read(url) as reader:
        assert reader.verify().rows == 4
    assert (tmp_path / "deep/er/100% a b #1.db").exists()


def test_sqlite_is_set_up_for_safety(file: Path) -> None:
    with Store.open(f"sqlite:///{file}") as store, store._engine.connect() as connection:
        wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
        wanted |= {"trusted_schema": 0, "cell_size_check": 1}
        for name, value in wanted.items():
            assert connection.exec_driver_sql(f"PRAGMA {name}").scalar() == value, name
        tables = connection.exec_driver_sql("PRAGMA table_list").mappings()
        strict = {row["name"]: row["strict"] for row in tables if row["schema"] == "main"}
        assert {name for name, flag in strict.items() if flag} == set(schema.METADATA.tables)


def test_the_migrations_make_the_tables_of_the_schema(file: Path) -> None:
    def tables(engine: sa.Engine) -> dict[str, str]:
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name <> 'alembic_version'"
        with engine.connect() as connection:
            return {row.name: row.sql for row in connection.exec_driver_sql(query)}

    wanted = sa.create_engine("sqlite://")
    schema.METADATA.create_all(wanted)
    with Store.read(f"sqlite:///{file}") as store:
        assert tables(store._engine) == tables(wanted)
    wanted.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        sa.update(schema.requests).values(gpu_milli=-1),
        sa.update(schema.requests).values(memory_mib=(1 << 40) + 1),
        sa.update(schema.requests).values(state="NAPPING"),
        sa.update(schema.requests).values(epoch=0),
        sa.update(schema.accounts).values(pending=-1),
        sa.update(schema.identity).values(id=2),
        sa.insert(schema.credits_).values(workload="w", arrival_us=0, attempts=0, reclaims=0, not_before_us=0, count=0),
    ],
)
def test_the_database_itself_refuses_nonsense(store: Store, statement: sa.Executable) -> None:
    assert store.commit([tuple(history(State.BOUND))]) == [None]
    with store._engine.connect() as connection, pytest.raises(sa.exc.IntegrityError):
        connection.execute(statement)


def test_the_names_of_the_migrations_are_their_revisions() -> None:
    folder = Path(database.__file__).parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    walked = [revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()]
    assert database.revisions() == walked[::-1]


def test_a_database_that_is_current_needs_no_migration_tool(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    Store.open(url).close()
    opening = f"from scheduler.store.store import Store; Store.open({url!r}).close()"
    code = f"import sys; {opening}; print('alembic' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
