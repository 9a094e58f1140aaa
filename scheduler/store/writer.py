"""Commits for the event loop: on a thread that groups whatever waits, or inline for runs in virtual time.

Invariant: transactions are written in the order in which they were submitted; whoever awaits `commit` goes on only when
the transaction is durable or certainly not written.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from dataclasses import dataclass

from scheduler.errors import BusyError, StoreError
from scheduler.model.reservation import Change, Event
from scheduler.store.store import Store

GROUP_MAX = 64
WAITING_MAX = 4096
PATIENT = frozenset({Event.POST, Event.START})
"""Steps that tell of what the cluster shows by itself: nobody's decision or answer waits until they are written."""
PATIENCE_S = 0.005
SWITCH_S = 0.0005


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One transaction and the future of whoever waits for it."""

    changes: tuple[Change, ...]
    done: asyncio.Future[None]


class InlineWriter:
    """Writes at once, on the caller's own thread."""

    def __init__(self, store: Store) -> None:
        """Write to this store; it stays the caller's to close."""
        self._store = store

    async def commit(self, changes: tuple[Change, ...]) -> None:
        """Make one transaction durable.

        Raises:
            ConflictError: a row is not the one its change was made from.
            StoreError: the database failed; nothing was written.
        """
        error = self._store.commit([changes])[0]
        if error is not None:
            raise error

    async def close(self) -> None:
        """Do nothing: nothing can be waiting."""


class ThreadedWriter:
    """One thread that writes: each database transaction takes everything that waits, until it has 64 transactions.

    A transaction of patient steps alone goes along with the next one, or by itself after some milliseconds.
    """

    def __init__(self, store: Store) -> None:
        """Start the thread; the store stays the caller's to close, after this writer."""
        self._store = store
        self._waiting: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._patient: list[_Job] = []  # before any that is handed over later
        self._unanswered = 0
        self._closed = False
        # SQLite lets go of the interpreter at every row; with Python's 5 ms, a busy loop would let the thread starve.
        sys.setswitchinterval(SWITCH_S)
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    async def commit(self, changes: tuple[Change, ...]) -> None:
        """Make one transaction durable, together with others that wait.

        Raises:
            ConflictError: a row is not the one its change was made from.
            BusyError: 4,096 transactions wait already.
            StoreError: the database failed, or this writer is closed; nothing was written.
        """
        if self._closed:
            raise StoreError("The ledger is closed: Tessera is stopping.")
        if self._unanswered >= WAITING_MAX:
            raise BusyError(f"{WAITING_MAX} commits wait already; try again in a moment.")
        loop = asyncio.get_running_loop()
        urgent = not changes or any(change.entry.event not in PATIENT for change in changes)
        job = _Job(changes, loop.create_future())
        self._patient.append(job)
        if urgent or len(self._patient) == GROUP_MAX:
            self._hand_over()
        elif len(self._patient) == 1:
            loop.call_later(PATIENCE_S, self._hand_over)
        self._unanswered += 1
        try:
            await job.done  # the commit happens even when its caller goes away; only the waiting can be cancelled
        finally:
            self._unanswered -= 1

    async def close(self) -> None:
        """Write what waits, then end the thread."""
        if not self._closed:
            self._closed = True
            self._hand_over()
            self._waiting.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _hand_over(self) -> None:
        """Let the thread have what waits, in order."""
        if self._patient:
            self._waiting.put(self._patient)
            self._patient = []

    def _run(self) -> None:
        while group := self._take():
            try:
                results = self._store.commit([job.changes for job in group])
            except Exception as error:  # noqa: BLE001 - a bug must reach the callers, not end the thread
                results = [error] * len(group)
            self._answer(list(zip(group, results, strict=True)))

    def _take(self) -> list[_Job]:
        """Return what waits, at least one job; an empty list when closed and nothing waits before that."""
        group: list[_Job] = []
        more = self._waiting.get()
        while more is not None:
            group += more
            if len(group) >= GROUP_MAX or self._waiting.empty():
                return group
            more = self._waiting.get()
        if group:
            self._waiting.put(None)
        return group

    @staticmethod
    def _answer(results: list[tuple[_Job, Exception | None]]) -> None:
        for loop in {job.done.get_loop() for job, _ in results}:
            mine = [(job.done, error) for job, error in results if job.done.get_loop() is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, mine)


def _resolve(results: list[tuple[asyncio.Future[None], Exception | None]]) -> None:
    for done, error in results:
        if done.cancelled():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
