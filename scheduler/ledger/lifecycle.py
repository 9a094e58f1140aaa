"""The life of a Request, as one table `(state, event) -> state`; None is "no row yet".

Every pair that is not here is illegal and changes nothing. Invariant: each cycle of this graph spends a bounded
budget (see SPENDS), so nothing can be reserved and taken back for ever.
"""

from __future__ import annotations

from scheduler.model.reservation import Event as E  # noqa: N817 - the table reads best with one letter
from scheduler.model.reservation import State as S  # noqa: N817

TRANSITIONS: dict[tuple[S | None, E], S] = {
    (None, E.HOLD): S.HELD,
    (None, E.SUBMIT): S.QUEUED,
    (None, E.REJECT): S.REJECTED,
    (None, E.ADOPT): S.BOUND,
    (S.HELD, E.JUDGE): S.QUEUED,
    (S.HELD, E.RESERVE): S.RESERVED,
    (S.HELD, E.EXPIRE): S.EXPIRED,
    (S.HELD, E.CANCEL): S.CANCELLED,
    (S.HELD, E.REJECT): S.REJECTED,
    (S.HELD, E.FAIL): S.FAILED,
    (S.HELD, E.ADOPT): S.BOUND,
    (S.QUEUED, E.RESERVE): S.RESERVED,
    (S.QUEUED, E.EXPIRE): S.EXPIRED,
    (S.QUEUED, E.CANCEL): S.CANCELLED,
    (S.QUEUED, E.REJECT): S.REJECTED,
    (S.QUEUED, E.ADOPT): S.BOUND,
    (S.RESERVED, E.BIND): S.BINDING,
    (S.RESERVED, E.VOID): S.QUEUED,
    (S.RESERVED, E.CANCEL): S.CANCELLED,
    (S.RESERVED, E.FAIL): S.FAILED,  # attempts spent
    (S.RESERVED, E.ADOPT): S.BOUND,
    (S.BINDING, E.POST): S.BOUND,
    (S.BINDING, E.VOID): S.QUEUED,  # only after a touch, or when the pod is gone
    (S.BINDING, E.CANCEL): S.CANCELLED,
    (S.BINDING, E.FAIL): S.FAILED,
    (S.BINDING, E.ADOPT): S.BOUND,
    (S.BOUND, E.START): S.RUNNING,
    (S.BOUND, E.RECLAIM): S.RECLAIMING,
    (S.BOUND, E.FINISH): S.RELEASED,
    (S.BOUND, E.FAIL): S.FAILED,
    (S.RUNNING, E.RECLAIM): S.RECLAIMING,
    (S.RUNNING, E.FINISH): S.RELEASED,
    (S.RUNNING, E.FAIL): S.FAILED,
    (S.RECLAIMING, E.FINISH): S.RELEASED,
    (S.RECLAIMING, E.SPARE): S.RUNNING,
    (S.RECLAIMING, E.FAIL): S.FAILED,
}

SPENDS: dict[E, str] = {E.VOID: "attempts", E.RECLAIM: "reclaims"}
"""Events that spend a budget of the workload, and the column that counts it."""

ATTEMPTS_MAX = 5
"""Voided reservations after which a Request is FAILED."""

RECLAIMS_MAX = 3
"""Times one workload's pod may be reclaimed; after that it is left alone."""

TERMINAL = frozenset({S.RELEASED, S.EXPIRED, S.CANCELLED, S.REJECTED, S.FAILED})
"""States that absorb: a pod that lives on gets a new life, with epoch + 1, through the edges of None."""

HOLDING = frozenset({S.RESERVED, S.BINDING, S.BOUND, S.RUNNING, S.RECLAIMING})
"""States in which devices and quota are taken."""


class IllegalTransition(AssertionError):  # noqa: N818 - a bug, named after what happened
    """An event met a state that has no edge for it: a bug, never a user's doing."""


def step(state: S | None, event: E) -> S:
    """Return the state after the event; a terminal state starts a new life like None.

    Raises:
        IllegalTransition: the table has no such edge.
    """
    start = None if state in TERMINAL else state
    try:
        return TRANSITIONS[start, event]
    except KeyError:
        raise IllegalTransition(f"{state or 'new'} has no event {event}") from None
