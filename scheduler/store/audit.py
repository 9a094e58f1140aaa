"""Reading the ledger's tables back, and checking that journal, accounts and rows tell the same story."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import sqlalchemy as sa

from scheduler.ledger.accounts import Accounts, account_rows
from scheduler.ledger.journal import GENESIS, Line, Verified, verify
from scheduler.ledger.lifecycle import HOLDING
from scheduler.model.reservation import Row, State
from scheduler.store import schema

PAGE = 1000
_LINE_KEYS = tuple(str(name) for name in schema.journal.c.keys())  # noqa: SIM118 - plain str, which orjson wants
_HOLDING = sorted(state.value for state in HOLDING)


def read_row(found: sa.Row[Any]) -> Row:
    """Return a row of `requests` as the noun it is."""
    values = found._asdict()
    values["state"], values["borrowed"] = State(values["state"]), bool(values["borrowed"])
    return Row(**values)


def read_page(connection: sa.Connection, start_seq: int) -> list[Line]:
    """Return at most 1,000 journal lines from this number on, as they were hashed."""
    table = schema.journal
    query = sa.select(table).where(table.c.seq >= start_seq).order_by(table.c.seq).limit(PAGE)
    return [dict(zip(_LINE_KEYS, found, strict=True)) for found in connection.execute(query)]


def _lines_from(connection: sa.Connection, start_seq: int) -> Iterator[Line]:
    while page := read_page(connection, start_seq):
        yield from page
        start_seq = page[-1]["seq"] + 1


def read_accounts(connection: sa.Connection) -> Accounts:
    """Return the stored accounts without zeros."""
    found = connection.execute(sa.select(schema.accounts))
    return {(row.queue, row.resource): (row.pending, row.posted) for row in found if row.pending or row.posted}


def accounts_digest(accounts: Accounts) -> str:
    """Return sha256, in hex, of the accounts in a fixed order."""
    listed = [[*key, *sums] for key, sums in sorted(accounts.items())]
    return hashlib.sha256(orjson.dumps(listed)).hexdigest()


def verify_from(connection: sa.Connection, seq: int) -> Verified:
    """Check what follows line `seq`, which must be 0 or a checkpoint; all in the caller's one view of the database."""
    checkpoints = {found.seq: found for found in connection.execute(sa.select(schema.checkpoints))}
    if seq and seq not in checkpoints:
        return Verified(0, ok=False, first_bad=1, head=GENESIS, seq=0, text=f"Lines 1 to {seq} are missing.")
    prev, sums = (checkpoints[seq].hash, checkpoints[seq].accounts) if seq else (GENESIS, accounts_digest({}))
    odd: list[int] = []

    def lines() -> Iterator[Line]:
        for found in _lines_from(connection, seq + 1):
            if found["seq"] in checkpoints and checkpoints[found["seq"]].hash != found["hash"]:
                odd.append(found["seq"])
            yield found

    found = verify(lines(), prev=prev, seq=seq + 1)
    if odd or not found.ok:
        first = min([*odd, *([found.first_bad] if found.first_bad else [])])
        return replace(found, ok=False, first_bad=first, text=f"Line {first} is not the one that was written.")
    return _check_end(connection, _check_tables(connection, found, sums))


def _check_end(connection: sa.Connection, found: Verified) -> Verified:
    """Compare the last line with the place where the writer left off."""
    head = connection.execute(sa.select(schema.identity)).one()
    if (head.head_seq, head.head_hash) == (found.seq, found.head):
        return found
    first = found.seq if head.head_seq == found.seq else min(head.head_seq, found.seq) + 1
    text = f"The journal ends at line {found.seq}; the writer left off at line {head.head_seq} with another hash."
    return replace(found, ok=False, first_bad=first, text=text)


def _check_tables(connection: sa.Connection, found: Verified, sums_before: str) -> Verified:
    """Compare accounts and rows with what the journal says of them."""
    stored = read_accounts(connection)
    before = dict(stored)
    for key, (pending, posted) in found.accounts.items():
        was = before.get(key, (0, 0))
        before[key] = (was[0] - pending, was[1] - posted)
    holding = sa.select(schema.requests).where(schema.requests.c.state.in_(_HOLDING))
    text = ""
    if accounts_digest({key: both for key, both in before.items() if any(both)}) != sums_before:
        text = "The accounts are not what the journal adds up to."
    elif account_rows(read_row(row) for row in connection.execute(holding)) != stored:
        text = "The accounts are not what the rows add up to."
    else:
        text = next(_odd_rows(connection, found), "")
    return replace(found, ok=not text, text=text)


def _odd_rows(connection: sa.Connection, found: Verified) -> Iterator[str]:
    table = schema.requests
    requests = list(found.lives)
    for start in range(0, len(requests), PAGE):
        some = requests[start : start + PAGE]
        query = sa.select(table.c.id, table.c.state, table.c.epoch).where(table.c.id.in_(some))
        rows = {row.id: (row.state, row.epoch) for row in connection.execute(query)}
        for request in some:
            state, epoch = found.lives[request]
            if rows.get(request) != (state, epoch):
                yield f"The journal leaves request {request} {state} in epoch {epoch}, and its row says otherwise."
