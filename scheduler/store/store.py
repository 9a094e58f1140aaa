"""The ledger on disk: load it, verify it, and commit groups of transactions to it, all or none each.

Invariant: a row is written only over the very row that its change was made from, by the holder of the present fence,
together with its journal line, its accounts and its credit. All SQL of the project is in this package.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Self

import sqlalchemy as sa

from scheduler.errors import ConflictError, StoreError
from scheduler.ids import NewId, random_ids
from scheduler.ledger.accounts import Accounts, account_lines
from scheduler.ledger.journal import GENESIS, Line, Verified, line
from scheduler.ledger.ledger import TERMINAL_KEPT
from scheduler.ledger.lifecycle import TERMINAL
from scheduler.model.reservation import Change, Credit, Row
from scheduler.store import database, schema
from scheduler.store.audit import PAGE, accounts_digest, read_accounts, read_page, read_row, verify_from
from scheduler.store.prepared import Prepared

CHECKPOINT_EVERY = 1000

_ROW_COLUMNS = tuple(field.name for field in fields(Row))
_TERMINAL = sorted(state.value for state in TERMINAL)

_insert_row = sa.insert(schema.requests)
_update_row = (
    sa.update(schema.requests)
    .where(
        schema.requests.c.id == sa.bindparam("was_id"),
        schema.requests.c.epoch == sa.bindparam("was_epoch"),
        schema.requests.c.state == sa.bindparam("was_state"),
    )
    .values({name: sa.bindparam(name) for name in _ROW_COLUMNS if name != "id"})
)
_insert_line = sa.insert(schema.journal)
_update_head = (
    sa.update(schema.identity)
    .where(
        schema.identity.c.fence == sa.bindparam("my_fence"),
        schema.identity.c.head_seq == sa.bindparam("was_seq"),
    )
    .values(head_seq=sa.bindparam("seq"), head_hash=sa.bindparam("hash"))
)
_update_account = (
    sa.update(schema.accounts)
    .where(
        schema.accounts.c.queue == sa.bindparam("of_queue"),
        schema.accounts.c.resource == sa.bindparam("of_resource"),
    )
    .values(
        pending=schema.accounts.c.pending + sa.bindparam("more_pending"),
        posted=schema.accounts.c.posted + sa.bindparam("more_posted"),
    )
)


@dataclass(frozen=True, slots=True)
class _Statements:
    """What every commit runs."""

    insert_row: Prepared
    update_row: Prepared
    insert_line: Prepared
    update_head: Prepared
    update_account: Prepared

    @classmethod
    def of(cls, dialect: sa.Dialect) -> Self:
        """Compile them for this kind of database."""
        every = (_insert_row, _update_row, _insert_line, _update_head, _update_account)
        return cls(*(Prepared(statement, dialect) for statement in every))


class Store:
    """One open ledger. `open` takes it for writing, `read` looks at it beside a running process.

    Not thread-safe for writing: one writer calls `commit`. Reading is safe beside it.

    Attributes:
        identity: UUID of this database, made once.
        fence: epoch of this writer; 0 when opened by `read`.
    """

    def __init__(self, engine: sa.Engine) -> None:
        """Wrap an engine; use `open` or `read`."""
        self.identity = ""
        self.fence = 0
        self._engine = engine
        self._closing = ExitStack()
        self._writer: sa.Connection | None = None
        self._statements = _Statements.of(engine.dialect)
        # The in-memory database has one connection for everybody; a file gives each reader its own.
        self._guard = threading.RLock() if isinstance(engine.pool, sa.StaticPool) else nullcontext()
        self._head = (0, GENESIS)
        self._checkpoint = 0
        self._known_accounts: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, url: str, *, new_id: NewId = random_ids) -> Self:
        """Take a database for writing: create or migrate it, check it, raise its fence.

        Args:
            url: `sqlite:///FILE`, `sqlite://` (in memory, for tests and the demo) or `postgresql://HOST/NAME`.
            new_id: source of the identity of a new database.

        Raises:
            OccupiedError: another process works on it.
            NewerError: its schema is newer than this program.
            CorruptError: it is damaged.
            StoreError: it cannot be opened.
        """
        parsed = database.parse(url)
        store = cls(database.connect(parsed))
        store._closing.callback(store._engine.dispose)
        try:
            with database.translated():
                store._closing.callback(database.occupy(parsed, store._engine))
                database.check(store._engine)
                store._writer = store._engine.connect().execution_options(**database.WRITES)
                store._closing.callback(store._writer.close)
                with store._writer.begin():
                    database.migrate(store._writer)
                    store._identify(store._writer, new_id)
                store.raise_fence()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def read(cls, url: str) -> Self:
        """Open a ledger for reading only, beside whoever works on it.

        Raises:
            StoreError: there is none, or it is not of this version.
        """
        parsed = database.parse(url)
        file = database.file_of(parsed)
        if parsed.get_backend_name() == "sqlite" and (file is None or not file.exists()):
            raise StoreError(f"There is no ledger at {url}; check --db.")
        store = cls(database.connect(parsed, read_only=True))
        store._closing.callback(store._engine.dispose)
        try:
            with database.translated(), store._reading() as connection:
                database.require_current(connection)
                store._recall(connection)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give the database back."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last journal line; (0, 64 zeros) before the first."""
        return self._head

    def _identify(self, connection: sa.Connection, new_id: NewId) -> None:
        if connection.scalar(sa.select(sa.func.count()).select_from(schema.identity)) == 0:
            first = {"id": 1, "uuid": new_id(), "fence": 0, "head_seq": 0, "head_hash": GENESIS}
            connection.execute(sa.insert(schema.identity), [first])
        self._recall(connection)

    def _recall(self, connection: sa.Connection) -> None:
        """Read what the writer keeps in mind between commits."""
        row = connection.execute(sa.select(schema.identity)).one()
        self.identity, self._head = row.uuid, (row.head_seq, row.head_hash)
        self._checkpoint = connection.scalar(sa.select(sa.func.max(schema.checkpoints.c.seq))) or 0
        keys = connection.execute(sa.select(schema.accounts.c.queue, schema.accounts.c.resource))
        self._known_accounts = {(key.queue, key.resource) for key in keys}

    def raise_fence(self) -> int:
        """Make this the only writer: every commit of an older fence fails from now on. Returns the new fence."""
        assert self._writer is not None, "opened for reading"
        with self._guard, database.translated(), self._writer.begin():
            self._writer.execute(sa.update(schema.identity).values(fence=schema.identity.c.fence + 1))
            self.fence = int(self._writer.scalar(sa.select(schema.identity.c.fence)) or 0)
            self._recall(self._writer)
        return self.fence

    # reading

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """Give a connection that sees one state of the database for as long as it is held."""
        with self._guard, self._engine.connect() as connection:
            if self._engine.dialect.name == "postgresql":
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    def load(self) -> tuple[dict[str, Row], dict[str, Credit]]:
        """Return the live rows and the last ended ones, by id, and the credits, by workload."""
        table = schema.requests
        ended = table.c.state.in_(_TERMINAL)
        last = sa.select(table).where(ended).order_by(table.c.updated_us.desc(), table.c.id).limit(TERMINAL_KEPT)
        with database.translated(), self._reading() as connection:
            live = [read_row(found) for found in connection.execute(sa.select(table).where(~ended))]
            kept = [read_row(found) for found in connection.execute(last)]
            credits_ = [Credit(**found._asdict()) for found in connection.execute(sa.select(schema.credits_))]
        rows = sorted([*live, *kept], key=lambda row: (row.arrival_us, row.id))
        return {row.id: row for row in rows}, {credit.workload: credit for credit in credits_}

    def row(self, request: str) -> Row | None:
        """Return one row, also one that ended long ago and is no longer held in memory."""
        with database.translated(), self._reading() as connection:
            found = connection.execute(sa.select(schema.requests).where(schema.requests.c.id == request)).one_or_none()
        return None if found is None else read_row(found)

    def accounts(self) -> Accounts:
        """Return the stored accounts: {(queue, resource): (pending, posted)} without zeros."""
        with database.translated(), self._reading() as connection:
            return read_accounts(connection)

    def journal(self, start_seq: int = 1) -> Iterator[Line]:
        """Yield the journal's lines from this number on; lines that are committed meanwhile come too."""
        while True:
            with database.translated(), self._reading() as connection:
                page = read_page(connection, start_seq)
            yield from page
            if len(page) < PAGE:
                return
            start_seq = page[-1]["seq"] + 1

    def verify(self) -> Verified:
        """Check every journal line there is, and that rows and accounts are what the journal says.

        Lines before a checkpoint may have been archived: then the check starts from that checkpoint.
        """
        with database.translated(), self._reading() as connection:
            first = connection.scalar(sa.select(sa.func.min(schema.journal.c.seq))) or self._next_after_all(connection)
            return verify_from(connection, first - 1)

    def verify_tail(self) -> Verified:
        """Check the journal from its last checkpoint on, and that rows and accounts are what it says."""
        with database.translated(), self._reading() as connection:
            return verify_from(connection, connection.scalar(sa.select(sa.func.max(schema.checkpoints.c.seq))) or 0)

    def _next_after_all(self, connection: sa.Connection) -> int:
        return (connection.scalar(sa.select(sa.func.max(schema.checkpoints.c.seq))) or 0) + 1

    # writing

    def commit(self, batch: Sequence[tuple[Change, ...]]) -> list[Exception | None]:
        """Write a group of transactions durably; per transaction None, or why nothing of it was written.

        All of them share one database transaction; a group without any change only
        proves that the database takes writes. If one does not fit (ConflictError), each is written on its own, in
        order, so that only the guilty one fails. Any other failure (StoreError) fails them all.
        """
        try:
            self._write(batch)
        except ConflictError as error:
            return [error] if len(batch) == 1 else [self._alone(changes) for changes in batch]
        except StoreError as error:
            return [error] * len(batch)
        return [None] * len(batch)

    def _alone(self, changes: tuple[Change, ...]) -> Exception | None:
        return self.commit([changes])[0]

    def _write(self, batch: Sequence[tuple[Change, ...]]) -> None:
        assert self._writer is not None, "opened for reading"
        changes = [change for transaction in batch for change in transaction]
        if any(change.after.fence != self.fence for change in changes):
            raise ConflictError("A change carries the fence of another writer.")
        lines = self._lines(changes)
        if not lines:
            with self._guard, database.translated(), self._writer.begin():
                _prove(self._writer)
            return
        checkpoint = self._checkpoint
        with self._guard, database.translated(), self._writer.begin():
            self._move_head(self._writer, lines[-1])
            self._write_rows(self._writer, changes)
            self._statements.insert_line.run(self._writer, lines)
            new = self._write_accounts(self._writer, account_lines(lines))
            _write_credits(self._writer, changes)
            if lines[-1]["seq"] - checkpoint >= CHECKPOINT_EVERY:
                checkpoint = _write_checkpoint(self._writer, lines[-1])
        self._head, self._checkpoint = (lines[-1]["seq"], lines[-1]["hash"]), checkpoint
        self._known_accounts |= new

    def _lines(self, changes: Sequence[Change]) -> list[Line]:
        seq, prev = self._head
        lines: list[Line] = []
        for change in changes:
            seq += 1
            lines.append(line(change.entry, seq, prev))
            prev = lines[-1]["hash"]
        return lines

    def _move_head(self, connection: sa.Connection, last: Line) -> None:
        """Take the journal's end from the line we know to the new last one; this is the fence check, too."""
        given = {"my_fence": self.fence, "was_seq": self._head[0], "seq": last["seq"], "hash": last["hash"]}
        if self._statements.update_head.run(connection, [given]) != 1:
            raise ConflictError("Another Tessera has taken this ledger over; this one must stop writing and restart.")

    def _write_accounts(self, connection: sa.Connection, more: Accounts) -> set[tuple[str, str]]:
        """Add to the accounts; the database refuses a sum below zero. Returns keys that are new."""
        new = more.keys() - self._known_accounts
        if new:
            zeros = [{"queue": queue, "resource": name, "pending": 0, "posted": 0} for queue, name in sorted(new)]
            connection.execute(sa.insert(schema.accounts), zeros)
        if more:
            given = [
                {"of_queue": queue, "of_resource": name, "more_pending": pending, "more_posted": posted}
                for (queue, name), (pending, posted) in sorted(more.items())
            ]
            self._statements.update_account.run(connection, given)
        return new

    def _write_rows(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """Write rows, each only over the row it was made from."""
        born = [_columns(change.after) for change in changes if change.before is None]
        if born:
            self._statements.insert_row.run(connection, born)
        moved = [
            {
                "was_id": change.before.id,
                "was_epoch": change.before.epoch,
                "was_state": change.before.state.value,
                **_columns(change.after),
            }
            for change in changes
            if change.before is not None
        ]
        if moved and self._statements.update_row.run(connection, moved) != len(moved):
            raise ConflictError("The row has changed since this change was made from it.")


def _prove(connection: sa.Connection) -> None:
    """Write a line and take it back: what is not written is not proven, and what is the same is not written."""
    connection.execute(sa.insert(schema.accounts), [{"queue": "", "resource": "", "pending": 0, "posted": 0}])
    connection.execute(sa.delete(schema.accounts).where(schema.accounts.c.queue == ""))


def _write_credits(connection: sa.Connection, changes: Sequence[Change]) -> None:
    last = {change.credit.workload: change.credit for change in changes if change.credit is not None}
    if not last:
        return
    gone = sa.delete(schema.credits_).where(schema.credits_.c.workload == sa.bindparam("of_workload"))
    connection.execute(gone, [{"of_workload": workload} for workload in last])
    left = [{field.name: getattr(credit, field.name) for field in fields(Credit)} for credit in last.values()]
    if any(credit["count"] for credit in left):
        connection.execute(sa.insert(schema.credits_), [credit for credit in left if credit["count"]])


def _write_checkpoint(connection: sa.Connection, last: Line) -> int:
    values = {"seq": last["seq"], "hash": last["hash"], "accounts": accounts_digest(read_accounts(connection))}
    connection.execute(sa.insert(schema.checkpoints), [values])
    return int(last["seq"])


def _columns(row: Row) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _ROW_COLUMNS}
    values["state"], values["borrowed"] = row.state.value, int(row.borrowed)
    return values
