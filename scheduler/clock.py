"""Time as a value that is passed in: the real clock, and a loop whose time jumps to the next timer.

Invariant: nothing in this project reads the time, sleeps or waits but through a Clock, so that a whole run can be
repeated exactly and an hour takes a second.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """What the shell may know of time."""

    def wall_us(self) -> int:
        """Microseconds since 1970, for records people read; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back, for deadlines."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait this long."""
        ...

    def call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """Call once after this long, on the running loop."""
        ...


class RealClock:
    """The machine's clocks."""

    def wall_us(self) -> int:
        """Microseconds since 1970."""
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        """Seconds since some start."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait this long."""
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """Call once after this long."""
        return asyncio.get_running_loop().call_later(seconds, call)


class LoopClock:
    """A clock that follows its event loop: on a VirtualLoop time is virtual, wall time included."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, epoch_us: int = 1_767_225_600_000_000) -> None:
        """Start wall time at `epoch_us` (default 2026-01-01T00:00:00Z) when the loop's time is 0."""
        self._loop = loop
        self._epoch_us = epoch_us

    def wall_us(self) -> int:
        """Microseconds since 1970, as the loop has it."""
        return self._epoch_us + round(self._loop.time() * 1_000_000)

    def monotonic(self) -> float:
        """Seconds of the loop."""
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        """Wait this long in the loop's time."""
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """Call once after this long in the loop's time."""
        return self._loop.call_later(seconds, call)


class _JumpSelector(selectors.SelectSelector):
    """Where a real selector would block until a timer, time jumps to that timer, at once or at a pace to watch."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self.now = 0.0
        self._speed = speed
        self._began_s = time.monotonic()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("virtual loop: every task waits and no timer is set; the program is stuck")
        then = self.now + max(timeout, 0.0)
        wait_s = self._began_s + then / self._speed - time.monotonic() if self._speed else 0.0
        ready = super().select(max(wait_s, 0.0))
        if not ready:
            self.now = then
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time: `await asyncio.sleep(3600)` returns at once, in order, deterministically.

    Threads and sockets are not for it: what happens outside the loop takes no virtual time.
    """

    def __init__(self, *, speed: float = 0.0) -> None:
        """Start at time 0.

        Args:
            speed: virtual seconds per real one, for runs that people watch; 0 = as fast as the machine can. What runs,
                and in which order, is the same.
        """
        self._jumper = _JumpSelector(speed)
        super().__init__(self._jumper)

    def time(self) -> float:
        """Seconds since the loop was made.

        asyncio runs a timer early by the clock's resolution; where time stands still meanwhile, whoever sets it again
        for the same instant would do so for ever. So nothing is run early.
        """
        self._clock_resolution = math.ulp(self._jumper.now)
        return self._jumper.now
