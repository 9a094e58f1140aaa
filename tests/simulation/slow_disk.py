"""A writer whose disk takes time, in virtual time: groups form, commits fail, and a kill finds some in flight."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

from scheduler.clock import Clock
from scheduler.errors import BusyError, StoreError
from scheduler.model.reservation import Change
from scheduler.store.store import Store

_Job = tuple[tuple[Change, ...], "asyncio.Future[None]"]


@dataclass
class SlowDisk:
    """Keeps the order, as the thread does.

    Attributes:
        late_s: a group takes up to so long.
        failing: probability that a commit fails with nothing written.
        broken: nothing is written any more; every commit fails.
        hung: nothing is written, and nobody is told; what waits is written when it ends.
    """

    store: Store
    clock: Clock
    rng: Random
    late_s: float = 0.01
    failing: float = 0.0
    broken: bool = False
    hung: bool = False
    _waiting: list[_Job] = field(default_factory=list)
    _timer: asyncio.TimerHandle | None = None

    async def commit(self, changes: tuple[Change, ...]) -> None:
        """Make one transaction durable."""
        if self.broken or self.rng.random() < self.failing:
            await self.clock.sleep(self.rng.uniform(0, self.late_s))
            raise BusyError("injected: the disk is busy")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((changes, done))
        if self._timer is None:
            self._timer = self.clock.call_later(self.rng.uniform(0, self.late_s), self._flush)
        await done

    async def close(self) -> None:
        """Write what waits."""
        self._flush()

    def die(self) -> None:
        """Lose the process: what waits was written in the last moment, or never."""
        if self._timer is not None:
            self._timer.cancel()
        if self.rng.random() < 0.5:
            self.store.commit([changes for changes, _ in self._waiting])
        self._waiting.clear()

    def _flush(self) -> None:
        if self.hung:
            self._timer = self.clock.call_later(0.1, self._flush)
            return
        self._timer, jobs, self._waiting = None, self._waiting, []
        if not jobs:
            return
        for (_, done), error in zip(jobs, self.store.commit([changes for changes, _ in jobs]), strict=True):
            if done.cancelled():
                continue
            if error is None:
                done.set_result(None)
            else:
                assert isinstance(error, StoreError)
                done.set_exception(error)
