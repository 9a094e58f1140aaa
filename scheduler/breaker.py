"""A circuit breaker: whether something that Tessera depends on is asked at all. Pure: (breaker, event, now) -> breaker.

    closed ──too many failures or slow calls──► open ──its time is over, somebody asks──► half-open
      ▲                                          ▲                                           │
      └──────────── three probes succeed ────────┼───────────────────────────────────────────┤
                                                 └──────────── a probe fails or hangs ───────┘

Whoever holds the breaker says how slow a call was, and tells of those that still hang: five that hang open the breaker
before any of them ends. Invariant: what ended says nothing of a phase that began after its call; whoever
holds the breaker leaves such ends out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

FAILURES_MAX = 5
WINDOW_S = 10
SLOW_MAX = 5
SLOW_SHARE = 0.01
OPEN_S = 5.0
OPEN_S_MAX = 60.0
PROBES = 3
PLENTY = 1 << 20
"""Calls that may begin while the breaker is closed: no bound."""


class Phase(StrEnum):
    """What becomes of a call."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Begun:
    """A call is sent; only where `room` is above zero."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A call has ended.

    Attributes:
        slow: how much it counts as slow; 0 = it came in time.
        failed: what was asked did not do its work.
        wait_s: for how long it asked to be left alone.
    """

    slow: int = 0
    failed: bool = False
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A call was given up by whoever made it, and says nothing but how slow it was."""

    slow: int = 0


@dataclass(frozen=True, slots=True)
class Hanging:
    """So many calls are on their way, and count so much as slow already."""

    calls: int
    slow: int


Event: TypeAlias = Begun | Ended | Dropped | Hanging


@dataclass(frozen=True, slots=True)
class Tally:
    """What ended in one second: calls, those that failed, and how slow they were."""

    second: int
    calls: int = 0
    failed: int = 0
    slow: int = 0


@dataclass(frozen=True, slots=True)
class Breaker:
    """One breaker.

    Attributes:
        phase: what it does with calls.
        until_s: open: when the first probe may go, monotonic.
        sent: half-open: probes on their way or back.
        proven: half-open: probes that succeeded.
        lately: closed: the last ten seconds and a bit, oldest first, none without a call.
    """

    phase: Phase = Phase.CLOSED
    until_s: float = 0.0
    sent: int = 0
    proven: int = 0
    lately: tuple[Tally, ...] = ()


def room(breaker: Breaker, now_s: float) -> int:
    """Return how many calls may begin now: `PLENTY` while closed, the probes left while half-open, else 0."""
    if breaker.phase is Phase.CLOSED:
        return PLENTY
    if breaker.phase is Phase.OPEN:
        return PROBES if now_s >= breaker.until_s else 0
    return PROBES - breaker.sent


def step(breaker: Breaker, event: Event, now_s: float) -> Breaker:
    """Return the breaker after an event; `now_s` is monotonic and never falls."""
    if breaker.phase is Phase.CLOSED:
        return _closed(breaker, event, now_s)
    if breaker.phase is Phase.HALF_OPEN:
        return _half_open(breaker, event, now_s)
    if isinstance(event, Begun):
        assert now_s >= breaker.until_s, "an open breaker lets nothing through"
        return Breaker(Phase.HALF_OPEN, sent=1)
    return breaker


def _opened(now_s: float, wait_s: float = 0.0) -> Breaker:
    return Breaker(Phase.OPEN, until_s=now_s + max(OPEN_S, min(wait_s, OPEN_S_MAX)))


def _closed(breaker: Breaker, event: Event, now_s: float) -> Breaker:
    if isinstance(event, Begun):
        return breaker
    if isinstance(event, Hanging):
        lately = _of_late(breaker, now_s)
        return _opened(now_s) if _broken(lately, event.calls, event.slow) else breaker
    failed = isinstance(event, Ended) and event.failed
    if isinstance(event, Dropped) and not event.slow:
        return breaker
    lately = _counted(_of_late(breaker, now_s), int(now_s), failed=failed, slow=event.slow)
    if (failed or event.slow) and _broken(lately):
        return _opened(now_s, event.wait_s if isinstance(event, Ended) else 0.0)
    return Breaker(lately=lately)


def _half_open(breaker: Breaker, event: Event, now_s: float) -> Breaker:
    if isinstance(event, Begun):
        assert breaker.sent < PROBES, "no probe is left"
        return replace(breaker, sent=breaker.sent + 1)
    if isinstance(event, Hanging):
        return _opened(now_s) if event.slow else breaker
    if event.slow:
        return _opened(now_s)
    if isinstance(event, Dropped):
        return replace(breaker, sent=breaker.sent - 1)
    if event.failed:
        return _opened(now_s, event.wait_s)
    return Breaker() if breaker.proven + 1 == PROBES else replace(breaker, proven=breaker.proven + 1)


def _of_late(breaker: Breaker, now_s: float) -> tuple[Tally, ...]:
    """Return the tallies of the last ten seconds, and of the one that was under way before them."""
    since, lately = int(now_s) - WINDOW_S, breaker.lately
    if not lately or lately[0].second >= since:
        return lately
    return tuple(one for one in lately if one.second >= since)


def _counted(lately: tuple[Tally, ...], second: int, *, failed: bool, slow: int) -> tuple[Tally, ...]:
    """Return the tallies with one more call."""
    last = lately[-1] if lately and lately[-1].second == second else None
    if last is None:
        return (*lately, Tally(second, 1, int(failed), slow))
    return (*lately[:-1], Tally(second, last.calls + 1, last.failed + failed, last.slow + slow))


def _broken(lately: tuple[Tally, ...], calls: int = 0, slow: int = 0) -> bool:
    """Say whether that is too much: five failures, or five slow calls that are more than one in a hundred."""
    for one in lately:
        calls, slow = calls + one.calls, slow + one.slow
    return sum(one.failed for one in lately) >= FAILURES_MAX or (slow >= SLOW_MAX and slow > SLOW_SHARE * calls)
