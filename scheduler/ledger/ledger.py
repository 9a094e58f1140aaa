"""One step of a Request's life as a value, and the image of all rows that the event loop works on. Pure.

Invariant: a Change is made by `advance` alone, so each one follows the table, stays inside the bounds, and carries the
journal entry that tells of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from scheduler.ledger.accounts import Accounts, account_rows
from scheduler.ledger.lifecycle import ATTEMPTS_MAX, HOLDING, RECLAIMS_MAX, TERMINAL, step
from scheduler.model.reservation import Change, Credit, Entry, Event, Row, State

AMOUNT_MAX = 1 << 40
"""Largest amount of one Request, in milli-GPU, milli-CPU or MiB."""

BACKOFF_S_MAX = 300
DECISION_BYTES_MAX = 2048
TERMINAL_KEPT = 10_000

HELD_MAX, HELD_MAX_OF_NAMESPACE = 10_000, 500
"""Requests that are HELD at a time, in all and of one namespace."""

NOBODY_THERE, NOT_LET_GO = "SchedulerNotRunning", "NotLetGo"
SPARED = frozenset({NOBODY_THERE, NOT_LET_GO})
"""Reasons of a void that spend no attempt: nobody has tried the reservation. A deadline bounds how often they come."""

_ARRIVALS = frozenset({Event.SUBMIT, Event.HOLD})
_BOUND = frozenset({State.BOUND, State.RUNNING, State.RECLAIMING})

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def void_or_fail(row: Row, reason: str = "") -> Event:
    """Return VOID, or FAIL when voiding this reservation for this reason would spend the last attempt."""
    return Event.FAIL if row.attempts + 1 >= ATTEMPTS_MAX and reason not in SPARED else Event.VOID


def advance(
    row: Row | None,
    event: Event,
    *,
    now_us: int,
    fence: int,
    reason: str = "",
    node: str | None = None,
    allocation: str | None = None,
    decision: str = "",
    deadline_us: int | None = None,
    borrowed: bool | None = None,
    born: Row | None = None,
    credit: Credit | None = None,
) -> Change:
    """Return the change that this event makes; nothing is modified.

    Args:
        row: the Request's row; None or a terminal one starts a new life, which needs `born`.
        event: what happened; VOID only where `void_or_fail` says so.
        now_us: wall time in microseconds.
        fence: the writer's fence epoch.
        reason: word shown to people; replaces the old one.
        node: new node name; None keeps it.
        allocation: new allocation as compact JSON; None keeps it.
        decision: decision record, JSON text of at most 2,048 bytes.
        deadline_us: new deadline; None keeps it while RESERVED or BINDING and clears it elsewhere.
        borrowed: quota class; None keeps it.
        born: the new life's identity, queue, priority and amounts; its epoch and counters are set here.
        credit: the workload's present credit, if it has one. SUBMIT or HOLD takes one pod's worth of it; losing
            a bound pod adds to it; other events leave it alone.

    Raises:
        IllegalTransition: the table has no such edge.
        AssertionError: an amount, counter or text is out of bounds, or the budget of the workload is spent.
    """
    state = step(row.state if row else None, event)
    if row is None or row.state in TERMINAL:
        after = _beginning(row, event, born, credit, now_us)
    else:
        after = _spend(row, event, reason, now_us)
    after = replace(
        after,
        state=state,
        fence=fence,
        reason=reason,
        updated_us=now_us,
        node=after.node if node is None else node,
        allocation=after.allocation if allocation is None else allocation,
        borrowed=after.borrowed if borrowed is None else borrowed,
        deadline_us=_deadline(state, after.deadline_us if deadline_us is None else deadline_us),
    )
    _check(after, decision)
    left = _credit(row, after, event, credit)
    return Change(row, after, _entry(row, after, event, decision), left, credit if left else None)


def _beginning(row: Row | None, event: Event, born: Row | None, credit: Credit | None, now_us: int) -> Row:
    """Return the first row of a life, with what the workload's credit passes on."""
    assert born is not None, f"{event} starts a new life and needs its template"
    assert row is None or row.id == born.id, "a new life keeps its id"
    epoch = row.epoch + 1 if row else 1
    new = replace(born, epoch=epoch, created_us=now_us, attempts=0, reclaims=0, not_before_us=0, deadline_us=0)
    if event not in _ARRIVALS or credit is None:
        return new
    assert credit.workload == born.workload, "a credit belongs to one workload"
    assert credit.count > 0, "an empty credit passes nothing on"
    return replace(
        new,
        arrival_us=min(credit.arrival_us, born.arrival_us),
        attempts=credit.attempts,
        reclaims=credit.reclaims,
        not_before_us=credit.not_before_us,
    )


def _spend(row: Row, event: Event, reason: str, now_us: int) -> Row:
    """Take the event's cost from the budget; a void also clears what was reserved and backs off 1, 2, 4, .. s."""
    if event is Event.VOID:
        assert void_or_fail(row, reason) is Event.VOID, f"{row.id}: the last attempt is spent by fail, not by void"
        wait_us = min(1 << row.attempts, BACKOFF_S_MAX) * 1_000_000
        return replace(
            row,
            epoch=row.epoch + 1,
            attempts=row.attempts + (reason not in SPARED),
            not_before_us=now_us + wait_us,
            node="",
            allocation="",
            deadline_us=0,
        )
    if event is Event.RECLAIM:
        assert row.reclaims < RECLAIMS_MAX, f"{row.id}: reclaimed {row.reclaims} times already"
        return replace(row, reclaims=row.reclaims + 1)
    return row


def _deadline(state: State, deadline_us: int) -> int:
    return deadline_us if state in {State.RESERVED, State.BINDING} else 0


def _check(row: Row, decision: str) -> None:
    for amount in (row.gpu_milli, row.cpu_milli, row.memory_mib):
        assert 0 <= amount <= AMOUNT_MAX, f"{row.id}: amount {amount} is out of bounds"
    assert row.epoch > 0, f"{row.id}: epochs start at 1"
    assert 0 <= row.attempts <= ATTEMPTS_MAX, f"{row.id}: {row.attempts} attempts"
    assert 0 <= row.reclaims <= RECLAIMS_MAX, f"{row.id}: {row.reclaims} reclaims"
    assert row.node or row.state not in HOLDING, f"{row.id}: {row.state} without a node"
    assert len(decision.encode()) <= DECISION_BYTES_MAX, f"{row.id}: decision record too long"


def _credit(row: Row | None, after: Row, event: Event, credit: Credit | None) -> Credit | None:
    """Return the workload's credit after the event; None = untouched, count 0 = used up."""
    if event in _ARRIVALS:
        return replace(credit, count=credit.count - 1) if credit else None
    lost = row is not None and (
        (event is Event.FAIL and row.state in _BOUND) or (event is Event.FINISH and row.state is State.RECLAIMING)
    )
    if not lost or after.workload == after.id:
        return None
    mine = Credit(after.workload, after.arrival_us, after.attempts, after.reclaims, after.not_before_us)
    if credit is None:
        return mine
    assert credit.workload == after.workload, "a credit belongs to one workload"
    return Credit(
        after.workload,
        min(credit.arrival_us, mine.arrival_us),
        max(credit.attempts, mine.attempts),
        max(credit.reclaims, mine.reclaims),
        max(credit.not_before_us, mine.not_before_us),
        credit.count + 1,
    )


def _entry(row: Row | None, after: Row, event: Event, decision: str) -> Entry:
    """Tell of the change; the allocation is told where it is new, the node also where it was given up."""
    allocation = after.allocation if row is None or row.allocation != after.allocation else ""
    return Entry(
        at=after.updated_us,
        request=after.id,
        workload=after.workload,
        epoch=after.epoch,
        fence=after.fence,
        event=event,
        source=row.state if row else None,
        target=after.state,
        node=after.node or (row.node if row else ""),
        queue=after.queue,
        namespace=after.namespace,
        name=after.name,
        reason=after.reason,
        allocation=allocation,
        decision=decision,
        gpu_milli=after.gpu_milli,
        cpu_milli=after.cpu_milli,
        memory_mib=after.memory_mib,
    )


class Book:
    """The ledger in memory: live rows, the last terminal ones (they answer replays), and the workloads' credits.

    Attributes:
        rows: request id -> row. Read it freely; write through `apply` and `revert`.
        credits: workload -> credit, only those with a count above 0.
        held: namespace -> how many of its requests are HELD, only those with some.
    """

    def __init__(self, rows: Mapping[str, Row] | None = None, credits_: Mapping[str, Credit] | None = None) -> None:
        """Start from what a store loaded, or empty."""
        self.rows: dict[str, Row] = dict(rows or {})
        self.credits: dict[str, Credit] = dict(credits_ or {})
        ended = sorted((row for row in self.rows.values() if row.state in TERMINAL), key=lambda row: row.updated_us)
        self._ended: dict[str, None] = dict.fromkeys(row.id for row in ended)
        self.held = Counter(row.namespace for row in self.rows.values() if row.state is State.HELD)
        self._undone_rows: dict[Row, Row | None] = {}
        self._undone_credits: dict[Credit, Credit | None] = {}

    def apply(self, changes: Iterable[Change]) -> None:
        """Make the changes visible, before their commit; each must start from the row as it is now."""
        for change in changes:
            assert self.rows.get(change.after.id) == change.before, f"{change.after.id}: not made from the present row"
            self._place(change.after.id, change.after)
            if change.credit is not None:
                _put(self.credits, change.credit.workload, change.credit if change.credit.count else None)
        while len(self._ended) > TERMINAL_KEPT:
            oldest = next(iter(self._ended))
            del self._ended[oldest], self.rows[oldest]

    def revert(self, changes: Sequence[Change]) -> None:
        """Take back changes whose commit failed.

        A later change of the same row that was made meanwhile fails its commit too (it starts from a row that was never
        written); whichever of the two is reverted first, the row ends as it was before both.
        """
        for change in reversed(changes):
            key, after, before = change.after.id, change.after, change.before
            if self.rows.get(key) == after:
                self._place(key, _root(self._undone_rows, before))
            else:
                self._undone_rows[after] = before
            if change.credit is not None:
                self._revert_credit(change.credit, change.credit_before)

    def _revert_credit(self, after: Credit, before: Credit | None) -> None:
        if self.credits.get(after.workload) == (after if after.count else None):
            _put(self.credits, after.workload, _root(self._undone_credits, before))
        else:
            self._undone_credits[after] = before

    def _place(self, key: str, row: Row | None) -> None:
        for one, more in ((self.rows.get(key), -1), (row, 1)):
            if one is not None and one.state is State.HELD:
                self.held[one.namespace] += more
                self.held += Counter()  # drops those that have none
        _put(self.rows, key, row)
        self._ended.pop(key, None)
        if row is not None and row.state in TERMINAL:
            self._ended[key] = None

    def may_hold(self, namespace: str) -> bool:
        """Say whether one more request of this namespace may be HELD."""
        return self.held[namespace] < HELD_MAX_OF_NAMESPACE and self.held.total() < HELD_MAX

    def remember(self, ended: Row) -> None:
        """Take back an ended row that was dropped; a Request that is in memory is left as it is."""
        assert ended.state in TERMINAL, f"{ended.id}: only ended rows are ever dropped"
        if ended.id not in self.rows:
            self._place(ended.id, ended)

    def live(self) -> Iterator[Row]:
        """Yield the rows that are not terminal, in arrival order; equal times by namespace, name and id."""
        alive = [row for row in self.rows.values() if row.state not in TERMINAL]
        yield from sorted(alive, key=lambda row: (row.arrival_us, row.namespace, row.name, row.id))

    def accounts(self) -> Accounts:
        """Return {(queue, resource): (pending, posted)}, summed anew from the rows; zeros are left out."""
        return account_rows(self.rows.values())


def _put(mapping: dict[_Key, _Value], key: _Key, value: _Value | None) -> None:
    if value is None:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _root(undone: dict[_Value, _Value | None], value: _Value | None) -> _Value | None:
    """Follow a value back through the changes that were undone beneath it."""
    while value is not None and value in undone:
        value = undone.pop(value)
    return value
