"""What has to be done about one Request, from its row and its pod alone. Pure, and the only place that compensates.

Invariants: a bound pod beats the ledger; nothing is given back on a stale view; a Binding that may be in flight is void
only after a touch, because the API server then refuses every Binding made from an older resourceVersion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import orjson

from scheduler.intake.allocation import write_allocation
from scheduler.ledger.ledger import void_or_fail
from scheduler.ledger.lifecycle import TERMINAL
from scheduler.model.pod import Pod
from scheduler.model.reservation import Event, Row, State


@dataclass(frozen=True, slots=True)
class Advance:
    """Let this event happen to the row; node and allocation (compact JSON) are those of the pod, None = keep."""

    event: Event
    reason: str = ""
    node: str | None = None
    allocation: str | None = None


@dataclass(frozen=True, slots=True)
class Touch:
    """Write this epoch into the pod's `tessera.dev/touch`, then decide again with the pod that the write returned."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Read the pod from the API server, then decide again with what it says."""


Action: TypeAlias = Advance | Touch | ReadBack


class Door(StrEnum):
    """What becomes of who comes: queued, held until an outage is over, or left outside because too many are held."""

    OPEN = "open"
    HOLDING = "holding"
    FULL = "full"


HELD_US_MAX = 24 * 3600 * 1_000_000
"""How long a request stays HELD at most."""

HELD_UP, HELD_TOO_LONG = "AllocatorUnavailable", "HeldTooLong"

_BOUND = frozenset({State.BOUND, State.RUNNING, State.RECLAIMING})
_WAITING = frozenset({State.HELD, State.QUEUED})


def decide(
    row: Row | None,
    pod: Pod | None,
    *,
    now_us: int,
    fresh: bool,
    in_flight: bool,
    refused: str = "",
    door: Door = Door.OPEN,
) -> list[Action]:
    """Say what has to be done, in this order; an empty list means that row and pod agree.

    Args:
        row: the ledger's row; None = there is none.
        pod: the pod with the row's id; None = there is none.
        now_us: wall time in microseconds.
        fresh: the pod (or its absence) was just read from the API server, or a DELETED event told of it.
        in_flight: a Binding POST of this very Request is being waited for.
        refused: why a reservation of this epoch must be given up; empty = it need not before its time is over.
        door: what becomes of who comes, or is held.
    """
    if in_flight and row is not None and row.state is State.BINDING:
        return []
    if pod is None:
        return _without_pod(row, fresh=fresh)
    if not pod.ours:
        return []
    if row is None or row.state in TERMINAL:
        return _without_life(row, pod, door)
    if row.state is State.HELD and not pod.node:
        return _held(row, pod, now_us, door)
    return _living(row, pod, now_us=now_us, fresh=fresh, refused=refused)


def _living(row: Row, pod: Pod, *, now_us: int, fresh: bool, refused: str) -> list[Action]:
    if row.state in _BOUND:
        return _bound(row, pod)
    if row.state is State.BINDING:
        return _binding(row, pod, fresh=fresh)
    if pod.node:
        return _ended(pod) if pod.terminal else _adopt(pod)
    return _reserved(row, pod, now_us, refused) if row.state is State.RESERVED else _waiting(pod)


def _without_pod(row: Row | None, *, fresh: bool) -> list[Action]:
    if row is None or row.state in TERMINAL:
        return []
    if row.state in _WAITING:
        return [Advance(Event.CANCEL, "PodGone")]
    if not fresh:
        return [ReadBack()]
    return [Advance(Event.FINISH if row.state in _BOUND else Event.CANCEL, "PodGone")]


def _without_life(row: Row | None, pod: Pod, door: Door) -> list[Action]:
    """No row, or one that ended: book what is bound, take in what is new."""
    if pod.terminal:
        return []
    if pod.node:
        return _adopt(pod)
    if pod.deleting:
        return []
    refusal = pod.request.refusal
    if row is None and refusal is not None:
        return [Advance(Event.REJECT, refusal.reason)]
    welcome = row is None or (row.state is State.REJECTED and refusal is None)
    if not welcome or door is Door.FULL:
        return []
    return [Advance(Event.SUBMIT)] if door is Door.OPEN else [Advance(Event.HOLD, HELD_UP)]


def _held(row: Row, pod: Pod, now_us: int, door: Door) -> list[Action]:
    """Let it in when the outage is over; it may end before, and is not held for ever."""
    if ended := _waiting(pod):
        return ended
    if door is Door.OPEN:
        return [Advance(Event.JUDGE)]
    return [Advance(Event.EXPIRE, HELD_TOO_LONG)] if now_us - row.created_us >= HELD_US_MAX else []


def _waiting(pod: Pod) -> list[Action]:
    if pod.terminal or pod.deleting:
        return _ended(pod)
    refusal = pod.request.refusal
    return [Advance(Event.REJECT, refusal.reason)] if refusal is not None else []


def _reserved(row: Row, pod: Pod, now_us: int, refused: str) -> list[Action]:
    if pod.terminal or pod.deleting:
        return _ended(pod)
    if row.deadline_us and now_us >= row.deadline_us:
        refused = refused or "ReservationTimedOut"
    return [Advance(void_or_fail(row, refused), refused)] if refused else []


def _binding(row: Row, pod: Pod, *, fresh: bool) -> list[Action]:
    if pod.node:
        mine = pod.allocation
        if mine is not None and (pod.node, mine.id, mine.epoch) == (row.node, row.id, row.epoch):
            return [Advance(Event.POST), *_start(pod)]
        return _ended(pod) if pod.terminal else _adopt(pod)
    if not fresh:
        return [ReadBack()]
    if pod.terminal or pod.deleting:
        return _ended(pod)
    if pod.touch >= row.epoch:
        return [Advance(void_or_fail(row), "BindingVoided")]
    return [Touch(row.epoch)]


def _bound(row: Row, pod: Pod) -> list[Action]:
    if not pod.node:
        return []  # a stale view: nodeName never goes away again
    if pod.terminal:
        succeeded = pod.phase == "Succeeded"
        return [Advance(Event.FINISH, "PodSucceeded") if succeeded else Advance(Event.FAIL, "PodFailed")]
    return _start(pod) if row.state is State.BOUND else []


def _ended(pod: Pod) -> list[Action]:
    return [Advance(Event.CANCEL, "PodEnded" if pod.terminal else "PodDeleted")]


def _adopt(pod: Pod) -> list[Action]:
    text = write_allocation(pod.allocation) if pod.allocation else ""
    return [Advance(Event.ADOPT, "FoundBound", pod.node, text), *_start(pod)]


def _start(pod: Pod) -> list[Action]:
    return [Advance(Event.START)] if pod.phase == "Running" else []


def drift(rows: Mapping[str, Row], pods: Mapping[str, Pod]) -> list[str]:
    """Say in sentences where rows and pods (by uid) disagree; both must be whole, and no commit in flight."""
    found = [text for uid in sorted(rows) for text in _row_drift(rows[uid], pods.get(uid))]
    for uid in sorted(pods):
        pod, row = pods[uid], rows.get(uid)
        holds = pod.ours and pod.node and not pod.terminal
        if holds and (row is None or row.state not in _BOUND):
            found.append(
                f"Pod {_name(pod)} is bound to {pod.node}, but the ledger has {row.state if row else 'no row'}."
            )
    return found


def _row_drift(row: Row, pod: Pod | None) -> Iterator[str]:
    if row.state not in _BOUND:
        return
    if pod is None or pod.terminal:
        yield f"Request {row.namespace}/{row.name} is {row.state} on {row.node}, but its pod is gone or has ended."
        return
    if pod.node != row.node:
        yield f"Pod {_name(pod)} is bound to {pod.node or 'no node'}, but the ledger says {row.node}."
    written = write_allocation(pod.allocation) if pod.allocation else ""
    if _content(written) != _content(row.allocation):
        yield f"Pod {_name(pod)} carries {'another' if written else 'no'} allocation; the ledger knows it differently."


def _content(text: str) -> object:
    """Read an allocation without what only orders it."""
    return orjson.loads(text) if text else None


def _name(pod: Pod) -> str:
    return f"{pod.request.namespace}/{pod.request.name}"
