"""What Tessera depends on, each behind a circuit breaker: the ledger's store and the API server.

Who wants to decide asks `Dependencies.closed`; who only wants to finish what is under way asks for `room`, and so is
the probe of a breaker that is half-open. All of it is memory: asking costs microseconds and never waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

import structlog

from scheduler import breaker
from scheduler.breaker import SLOW_MAX, Begun, Breaker, Dropped, Ended, Event, Hanging, Phase
from scheduler.clock import Clock
from scheduler.errors import TesseraError

log = structlog.get_logger(__name__)

SLOW_S = 1.0

Judge = Callable[[Exception], tuple[bool, float]]
"""Says of an error whether the dependency failed, and for how many seconds it asked to be left alone."""


class Dependency:
    """One of them.

    Attributes:
        name: the label in metrics: `store` or `api`.
        trouble: what is wrong while the breaker is not closed, a sentence for /readyz.
        transitions: how often the breaker came into each phase.
    """

    def __init__(self, name: str, trouble: str, clock: Clock, *, single: bool) -> None:
        """Begin closed: what was never asked is trusted.

        Args:
            name: label.
            trouble: sentence.
            clock: whose time counts.
            single: calls stand in one line, so that one which hangs for five seconds is reason enough: each whole
                second counts. Else each slow call counts once, for its connection alone may be broken.
        """
        self.name, self.trouble, self._clock, self._single = name, trouble, clock, single
        self.transitions: Counter[Phase] = Counter()
        self._breaker = Breaker()
        self._begun: dict[int, float] = {}  # calls of this phase that are on their way, oldest first
        self._number = 0

    @property
    def phase(self) -> Phase:
        """What the breaker does with calls now."""
        self._look(self._clock.monotonic())
        return self._breaker.phase

    @property
    def closed(self) -> bool:
        """Say whether all is well."""
        return self.phase is Phase.CLOSED

    def room(self) -> int:
        """Return how many calls may begin now."""
        now_s = self._clock.monotonic()
        self._look(now_s)
        return breaker.room(self._breaker, now_s)

    @contextmanager
    def asked(self, refuse: Callable[[], TesseraError], judge: Judge) -> Generator[None, None, None]:
        """Let one call through, and learn from its end; where the breaker is open it is refused.

        Args:
            refuse: makes the error of a call that is not sent.
            judge: of the errors that the call raises.
        """
        if not self.room():
            raise refuse()
        began_s = self._clock.monotonic()
        self._step(Begun(), began_s)
        self._number += 1
        number = self._number
        self._begun[number] = began_s
        try:
            yield
        except Exception as error:
            failed, wait_s = judge(error)
            self._end(number, lambda slow: Ended(slow, failed, wait_s))
            raise
        except BaseException:
            self._end(number, Dropped)
            raise
        self._end(number, Ended)

    def _end(self, number: int, event: Callable[[int], Event]) -> None:
        """Learn from the end of a call, unless it began in an earlier phase."""
        now_s = self._clock.monotonic()
        began_s = self._begun.pop(number, None)
        if began_s is not None:
            self._step(event(self._slow(now_s - began_s)), now_s)

    def _slow(self, took_s: float) -> int:
        return min(int(took_s / SLOW_S), SLOW_MAX if self._single else 1)

    def _look(self, now_s: float) -> None:
        """Count the calls that hang; the oldest come first."""
        slow = 0
        for began_s in self._begun.values():
            if now_s - began_s < SLOW_S:
                break
            slow += self._slow(now_s - began_s)
        if slow:
            self._step(Hanging(len(self._begun), slow), now_s)

    def _step(self, event: Event, now_s: float) -> None:
        before, self._breaker = self._breaker.phase, breaker.step(self._breaker, event, now_s)
        after = self._breaker.phase
        if after is not before:
            self._begun.clear()
            self.transitions[after] += 1
            say = log.warning if after is Phase.OPEN else log.info
            say("breaker", dependency=self.name, phase=after.value, was=before.value)


class Dependencies:
    """Both of them."""

    def __init__(self, clock: Clock) -> None:
        """Begin with trust."""
        trouble = "{} fails or is too slow: requests are held"
        self.store = Dependency("store", trouble.format("the ledger's store"), clock, single=True)
        self.api = Dependency("api", trouble.format("the API server"), clock, single=False)

    @property
    def closed(self) -> bool:
        """Say whether something new may be decided."""
        return self.store.closed and self.api.closed

    def trouble(self) -> str:
        """Return why nothing new is decided now, a sentence; empty = it is."""
        return next((one.trouble for one in (self.store, self.api) if not one.closed), "")
