"""Why one Request is where it is, for people and `tessera why`: reasons, place in line, funnel, what would help."""

from __future__ import annotations

from typing import Any

from scheduler.decision import explain
from scheduler.decision.changes import ideas
from scheduler.decision.explain import Cause, Why
from scheduler.decision.reasons import REASONS
from scheduler.desk import Desk
from scheduler.model.pod import Pod
from scheduler.model.reservation import Row, State

SHOWN = {State.BINDING: State.RESERVED, State.RECLAIMING: State.RUNNING}
"""Inner states as people see them."""

WAITING = frozenset({State.HELD, State.QUEUED})
CAPACITY = "WaitingForCapacity"
SETTLED = frozenset({State.BOUND, State.RUNNING, State.RECLAIMING, State.RELEASED})
"""Nobody need act: it runs, or it ran."""


def explanation(desk: Desk, row: Row) -> dict[str, Any]:
    """Return the explanation of one Request as the API shows it.

    `class` is that of the first reason; null once the Request was bound, and for one that was withdrawn. `position`
    counts from 1 over all that wait, in the order in which Tessera wakes them; null for what does not wait.
    """
    pod = desk.registry.pods.get(row.id)
    found = _why(desk, row, pod)
    position, waiting = _position(desk, row)
    kind: str | None = found["reasons"][0]["class"] if found["reasons"] else None
    if row.state in {State.RESERVED, State.BINDING}:
        kind = "wait"
    return {
        "state": SHOWN.get(row.state, row.state).value,
        "class": kind,
        "reasons": found["reasons"],
        "position": position,
        "waiting": waiting,
        "warnings": list(pod.warnings) if pod is not None else [],
        "funnel": found["funnel"],
        "changes": _changes(desk, pod) if row.state is State.QUEUED and found["funnel"] and pod is not None else [],
    }


def _why(desk: Desk, row: Row, pod: Pod | None) -> Why:
    if row.state in SETTLED or row.state in {State.RESERVED, State.BINDING}:
        return _alone()
    if pod is not None and pod.request.refusal is not None:
        return explain.why_refused(pod.request.refusal)
    if row.state is not State.QUEUED:
        lost = row.state is State.FAILED and row.reason != "PodFailed"
        return _alone("AllocatorUnavailable" if row.state is State.HELD else "AttemptsSpent" if lost else row.reason)
    if pod is None or desk.intents.get(row.id) is not None:
        return _alone("PendingEvaluation")
    found = explain.why(desk.fits(pod), desk.asks.nearest(pod.request))
    if row.not_before_us > desk.clock.wall_us():
        found["reasons"].insert(0, explain.cause("BackingOff"))
    elif (word := desk.order.words.get(row.id, CAPACITY)) != CAPACITY:  # of capacity the masks tell more
        others = [one for one in found["reasons"] if one["code"] not in {word, "PendingEvaluation"}]
        found["reasons"] = [explain.cause(word), *others]
    return found


def _alone(word: str = "") -> Why:
    """Return one reason without a funnel; a word that is no reason of waiting, such as PodGone, gives none."""
    causes: list[Cause] = [explain.cause(word)] if word in REASONS else []
    return {"funnel": [], "reasons": causes}


def _position(desk: Desk, row: Row) -> tuple[int | None, int]:
    waiting = [(-one.priority, one.arrival_us, one.namespace, one.name, one.id) for one in _waiting(desk)]
    if row.state not in WAITING:
        return None, len(waiting)
    mine = (-row.priority, row.arrival_us, row.namespace, row.name, row.id)
    return 1 + sum(one < mine for one in waiting), len(waiting)


def _waiting(desk: Desk) -> list[Row]:
    return [one for one in desk.book.rows.values() if one.state in WAITING]


def _changes(desk: Desk, pod: Pod) -> list[dict[str, Any]]:
    found = ideas(desk.registry.snapshot(), desk.asks.ask(pod.request), desk.mix(), desk.policies)
    return [dict(idea) for idea in found]
