"""The journal: one line per transition, numbered without gaps and chained by hash. Pure.

Invariant: a line's hash covers the line and, through `prev`, everything before it; whoever changes, drops, adds or
moves a line breaks the chain at that place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from scheduler.ledger.accounts import Accounts, post_line
from scheduler.ledger.accounts import account_lines as recompute_accounts
from scheduler.ledger.lifecycle import TERMINAL, IllegalTransition, step
from scheduler.model.reservation import Entry, Event, State

Line: TypeAlias = dict[str, Any]

GENESIS = "0" * 64
"""`prev` of the first line."""

TEXTS = frozenset("request workload event to node queue namespace name reason allocation decision prev hash".split())
NUMBERS = frozenset("seq at epoch fence gpu_milli cpu_milli memory_mib".split())

__all__ = ["GENESIS", "NUMBERS", "TEXTS", "Line", "Verified", "digest", "line", "recompute_accounts", "verify"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check of the journal found.

    Attributes:
        rows: lines read.
        ok: every line is good.
        first_bad: `seq` at which the journal stops being good; None when it is good.
        head: hash of the last good line, or what the check started from.
        seq: number of the last good line, or one less than the check started from.
        accounts: what the good lines change in the accounts.
        lives: request id -> (state, epoch) after the last good line.
        text: what is wrong beside the lines themselves, one sentence; empty = nothing.
    """

    rows: int
    ok: bool
    first_bad: int | None
    head: str
    seq: int
    accounts: Accounts = field(default_factory=dict)
    lives: dict[str, tuple[State, int]] = field(default_factory=dict)
    text: str = ""


def digest(line: Mapping[str, Any]) -> str:
    """Return sha256, in hex, of the line's compact JSON: UTF-8, sorted keys, integers only, without `hash`."""
    body = {key: value for key, value in line.items() if key != "hash"}
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def line(entry: Entry, seq: int, prev: str) -> Line:
    """Return the entry as line number `seq` (>= 1) after the line whose hash is `prev`."""
    made: Line = {
        "seq": seq,
        "at": entry.at,
        "request": entry.request,
        "workload": entry.workload,
        "epoch": entry.epoch,
        "fence": entry.fence,
        "event": entry.event.value,
        "from": entry.source.value if entry.source else None,
        "to": entry.target.value,
        "node": entry.node,
        "queue": entry.queue,
        "namespace": entry.namespace,
        "name": entry.name,
        "reason": entry.reason,
        "allocation": entry.allocation,
        "decision": entry.decision,
        "gpu_milli": entry.gpu_milli,
        "cpu_milli": entry.cpu_milli,
        "memory_mib": entry.memory_mib,
        "prev": prev,
    }
    made["hash"] = digest(made)
    return made


def verify(lines: Iterable[Line], *, prev: str = GENESIS, seq: int = 1) -> Verified:
    """Check numbers, chain, transitions, epochs and fences of the lines, from `seq` after the hash `prev`.

    From the very beginning each Request must start new; from later on its first line may come from any state.
    """
    lives: dict[str, tuple[State, int]] = {}
    accounts: Accounts = {}
    whole, rows, fence, good = seq == 1, 0, 0, True
    for row in lines:
        rows += 1
        good = good and _continues(row, seq, prev) and row["fence"] >= fence and _lives_on(row, lives, whole=whole)
        if good:
            seq, prev, fence = seq + 1, row["hash"], row["fence"]
            post_line(accounts, row)
    return Verified(rows, good, None if good else seq, prev, seq - 1, accounts, lives)


def _continues(row: Line, seq: int, prev: str) -> bool:
    """Say whether the line is well formed, the next one, and what its hash says."""
    if not (row.keys() >= TEXTS | NUMBERS | {"from"}):
        return False
    texts = all(isinstance(row[key], str) for key in TEXTS) and isinstance(row["from"], str | None)
    numbers = all(type(row[key]) is int and row[key] >= 0 for key in NUMBERS)
    try:
        return texts and numbers and row["seq"] == seq and row["prev"] == prev and row["hash"] == digest(row)
    except TypeError:  # a value that has no JSON form, or an integer beyond 64 bits
        return False


def _lives_on(row: Line, lives: dict[str, tuple[State, int]], *, whole: bool) -> bool:
    """Say whether the line is a lawful next step of its Request, and remember it."""
    try:
        source = State(row["from"]) if row["from"] is not None else None
        event, target = Event(row["event"]), State(row["to"])
        lawful = step(source, event) is target
    except (ValueError, IllegalTransition):
        return False
    epoch, known = row["epoch"], lives.get(row["request"])
    if known is None:
        lawful = lawful and (epoch == 1 if source is None else not whole)
    else:
        raised = event is Event.VOID or source in TERMINAL
        lawful = lawful and known == (source, epoch - raised)
    lives[row["request"]] = (target, epoch)
    return lawful
