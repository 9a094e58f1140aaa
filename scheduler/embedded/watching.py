"""What happened to the objects of one kind, kept for a while, and those who follow it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import orjson

from scheduler.clock import Clock
from scheduler.kube.port import Gone, WatchEvent

from .injected import Faults

BOOKMARK_S = 60.0
LAST_BOOKMARK_S = 2.0  # before the end of a watch


@dataclass(frozen=True, slots=True)
class Happening:
    """One event: the object's bytes after it (before it, where it was deleted), with the event's resourceVersion."""

    resource_version: int
    type: str
    raw: bytes


@dataclass(eq=False, slots=True)
class Follower:
    """One open watch: what it has yet to deliver."""

    pending: deque[Happening] = field(default_factory=deque)
    overrun: bool = False
    waiter: asyncio.Future[None] | None = None

    def put(self, event: Happening, limit: int) -> None:
        """Hand over an event, unless too many wait already: then the watch is cut off, for it would have a gap."""
        if len(self.pending) >= limit:
            self.overrun = True
            self.pending.clear()
        if not self.overrun:
            self.pending.append(event)
        self.wake()

    def wake(self) -> None:
        """Let the watch look again."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self, clock: Clock, seconds: float) -> None:
        """Return at the next `wake`, or after this long."""
        self.waiter = asyncio.get_running_loop().create_future()
        timer = clock.call_later(max(seconds, 0.0), self.wake)
        try:
            await self.waiter
        finally:
            timer.cancel()


class History:
    """The last events of one kind, at most `limit`; older ones are forgotten and a watch from there is refused."""

    def __init__(self, limit: int) -> None:
        """Start with nothing."""
        self._limit = limit
        self._events: deque[Happening] = deque()
        self._followers: list[Follower] = []
        self.floor = 0  # highest resourceVersion that was forgotten

    def add(self, event: Happening) -> None:
        """Keep an event and hand it to all who follow."""
        self._events.append(event)
        if len(self._events) > self._limit:
            self.floor = self._events.popleft().resource_version
        for follower in self._followers:
            follower.put(event, self._limit)

    def forget(self, resource_version: int) -> None:
        """Forget all events up to this resourceVersion."""
        while self._events and self._events[0].resource_version <= resource_version:
            self._events.popleft()
        self.floor = max(self.floor, resource_version)

    def follow(self, resource_version: int) -> Follower:
        """Open a watch for what happened after this resourceVersion.

        Raises:
            Gone: part of it was forgotten.
        """
        if resource_version < self.floor:
            raise Gone(410, "Expired", f"too old resource version: {resource_version} ({self.floor})")
        later: deque[Happening] = deque()
        for event in reversed(self._events):
            if event.resource_version <= resource_version:
                break
            later.appendleft(event)
        follower = Follower(later)
        self._followers.append(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        """Close a watch."""
        self._followers.remove(follower)


async def stream(
    follower: Follower,
    *,
    clock: Clock,
    faults: Faults | None,
    bookmark: Callable[[], WatchEvent],
    timeout_s: float,
) -> AsyncGenerator[WatchEvent, None]:
    """Yield a follower's events as they come, and a bookmark each minute and shortly before the end.

    Raises:
        Gone: the reader was so slow that events were dropped.
    """
    end = clock.monotonic() + timeout_s
    last_bookmark = end - min(LAST_BOOKMARK_S, timeout_s / 2)
    next_bookmark = min(clock.monotonic() + BOOKMARK_S, last_bookmark)
    while (now := clock.monotonic()) < end:
        while follower.pending and clock.monotonic() < end:
            event = follower.pending.popleft()
            if faults is not None:
                await clock.sleep(faults.lateness_s())
                if faults.ends_watch():
                    return
            yield WatchEvent(event.type, orjson.loads(event.raw))
        if follower.overrun:
            raise Gone(410, "Expired", "too old resource version: the watch was read too slowly")
        if now >= next_bookmark:
            yield bookmark()
            next_bookmark = min(now + BOOKMARK_S, last_bookmark) if now < last_bookmark else end + BOOKMARK_S
        if not follower.pending:
            await follower.wait(clock, min(end, next_bookmark) - clock.monotonic())
