"""Rows and steps for the ledger's tests: short to write, complete to use."""

from __future__ import annotations

from typing import Any

from scheduler.ledger.ledger import advance
from scheduler.model.reservation import Change, Event, Row, State

NOW = 1_767_225_600_000_000
SECOND = 1_000_000

WAY = {
    State.HELD: [Event.HOLD],
    State.QUEUED: [Event.SUBMIT],
    State.RESERVED: [Event.SUBMIT, Event.RESERVE],
    State.BINDING: [Event.SUBMIT, Event.RESERVE, Event.BIND],
    State.BOUND: [Event.SUBMIT, Event.RESERVE, Event.BIND, Event.POST],
    State.RUNNING: [Event.SUBMIT, Event.RESERVE, Event.BIND, Event.POST, Event.START],
    State.RECLAIMING: [Event.SUBMIT, Event.RESERVE, Event.BIND, Event.POST, Event.START, Event.RECLAIM],
    State.RELEASED: [Event.SUBMIT, Event.RESERVE, Event.BIND, Event.POST, Event.FINISH],
    State.EXPIRED: [Event.SUBMIT, Event.EXPIRE],
    State.CANCELLED: [Event.SUBMIT, Event.CANCEL],
    State.REJECTED: [Event.REJECT],
    State.FAILED: [Event.SUBMIT, Event.RESERVE, Event.BIND, Event.POST, Event.FAIL],
}
"""A shortest way to each state."""


def born(name: str = "a", **changes: Any) -> Row:
    """Return a template of a new life: one GPU, queue default, a workload of its own."""
    given: dict[str, Any] = {
        "id": name,
        "epoch": 1,
        "fence": 1,
        "state": State.QUEUED,
        "workload": f"job-{name}",
        "namespace": "team",
        "name": name,
        "queue": "default",
        "priority": 0,
        "arrival_us": NOW,
        "gpu_milli": 1000,
        "cpu_milli": 4000,
        "memory_mib": 8192,
    }
    return Row(**{**given, **changes})


def step(row: Row | None, event: Event, **given: Any) -> Change:
    """Advance at a fixed time with what the event needs."""
    if event in {Event.RESERVE, Event.ADOPT}:
        uid = row.id if row else given["born"].id
        given = {"node": "gpu-1", "allocation": f'{{"id":"{uid}"}}', **given}
    return advance(row, event, **{"now_us": NOW, "fence": 1, **given})


def history(state: State, name: str = "a", *, fence: int = 1, **changes: Any) -> list[Change]:
    """Return the changes of a Request that was led to this state by the writer of this fence."""
    row, made = None, []
    for event in WAY[state]:
        made.append(step(row, event, fence=fence, born=born(name, **changes) if row is None else None))
        row = made[-1].after
    return made


def row_in(state: State, name: str = "a", **changes: Any) -> Row:
    """Return the row of a Request in this state."""
    return history(state, name, **changes)[-1].after
