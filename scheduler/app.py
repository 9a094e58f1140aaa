"""The composition root: the only place that builds the parts and joins them.

Start: open the ledger, verify its tail, list the cluster, book what is held, settle what was in flight, then be ready.
Stop: refuse new work, let binds in flight end, flush, give the lease back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from random import Random

import structlog

from scheduler import geometry
from scheduler.binding import Binder
from scheduler.clock import Clock
from scheduler.config import Settings
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.intake.allocation import read_allocation
from scheduler.kube.port import Cluster
from scheduler.kube.reflector import Reflector
from scheduler.ledger.ledger import Book
from scheduler.ledger.lifecycle import HOLDING
from scheduler.loops import Audit, NodeSink, PodSink, Reconcile, forever
from scheduler.metrics import Metrics
from scheduler.model.reservation import State
from scheduler.settling import Settler
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter, ThreadedWriter
from scheduler.waking import Waker
from scheduler.web.extender import Extender
from scheduler.web.views import Views

log = structlog.get_logger(__name__)

STALE_S = 60.0
VERSION = "0.1.0"


@dataclass(slots=True)
class App:
    """One Tessera: everything that runs, joined. `step`-less; the loops live in `loops`."""

    settings: Settings
    clock: Clock
    cluster: Cluster
    store: Store
    writer: ThreadedWriter | InlineWriter
    rng: Random
    desk: Desk = field(init=False)
    settler: Settler = field(init=False)
    waker: Waker = field(init=False)
    binder: Binder = field(init=False)
    audit: Audit = field(init=False)
    reconcile: Reconcile = field(init=False)
    reflectors: tuple[Reflector, ...] = field(init=False)
    metrics: Metrics = field(init=False)
    extender: Extender = field(init=False)
    views: Views = field(init=False)
    recovered: bool = field(init=False, default=False)
    _tasks: list[asyncio.Task[None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Join the parts; nothing runs yet."""
        settings, clock = self.settings, self.clock
        self.desk = Desk(
            clock, settings.policy.policies(), self.store.fence, settings.extender.k, settings.queue.reservationTimeout
        )
        self.settler = Settler(self.desk, self.cluster, self.writer, clock)
        self.waker = Waker(self.desk, self.cluster, clock)
        self.binder = Binder(self.desk, self.cluster, self.writer, self.settler, clock, settings.extender.bindDeadline)
        self.audit, self.reconcile = Audit(self.desk, clock), Reconcile(self.desk, self.settler, clock)
        nodes = NodeSink(self.desk, dict(geometry.products()))
        pods = PodSink(self.desk, self.settler, self.waker)
        self.reflectors = (
            Reflector(self.cluster, "nodes", clock, nodes, rng=self.rng),
            Reflector(self.cluster, "pods", clock, pods, rng=self.rng),
        )
        self.metrics = Metrics(clock, VERSION)
        self.metrics.watch(self.desk, self.age_s, lambda: self.audit.findings)
        self.extender = Extender(
            self.desk,
            clock,
            self.metrics,
            lambda: not self.unready(),
            self.binder.bind,
            settings.extender.filterDeadline,
        )
        self.views = Views(self.desk, self.metrics, self.unready)

    async def start(self) -> None:
        """Recover, start the loops and return when ready."""
        verified = self.store.verify_tail()
        if not verified.ok:
            raise StoreError(f"the journal does not verify at row {verified.first_bad}: run `tessera ledger verify`")
        self.desk.book = Book(*self.store.load())
        for reflector in self.reflectors:  # nodes first, so that pods are booked on rows that are there
            self._spawn(reflector.run())
            while not reflector.synced:
                await self.clock.sleep(0.01)
        await self._recover()
        for name, step, pause_s, bell in self._loops():
            self._spawn(forever(name, step, self.clock, pause_s, bell))
        self.recovered = True

    async def stop(self) -> None:
        """Refuse new work, let what is in flight end, flush and let go."""
        self.recovered = False
        await self.binder.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.writer.close()

    def age_s(self) -> float:
        """Return how long ago the quieter of the two watches was heard."""
        return max(reflector.age_s(self.clock.monotonic()) for reflector in self.reflectors)

    def unready(self) -> str:
        """Return why no decision may be made now; empty = ready."""
        if not self.recovered:
            return "starting: the inventory is being rebuilt"
        age_s = self.age_s()
        return f"the API server was last heard {age_s:.0f} s ago" if age_s > STALE_S else ""

    async def _recover(self) -> None:
        """Book what the ledger holds, and settle what the last process left in flight."""
        for row in self.desk.book.live():
            pod = self.desk.registry.pods.get(row.id)
            if row.state in HOLDING and pod is not None:
                self.desk.hold_claim(row, pod, read_allocation(row.allocation))
        while pending := [row.id for row in self.desk.book.live() if row.state is State.BINDING]:
            await asyncio.gather(*(self.settler.settle(uid) for uid in pending))
            if any(row.state is State.BINDING for row in self.desk.book.live()):
                await self.clock.sleep(0.5)
        await self.reconcile.sweep()

    def _loops(self) -> tuple[tuple[str, Callable[[], Awaitable[None]], float, asyncio.Event | None], ...]:
        return (
            ("reconcile", self.reconcile.step, 1.0, self.settler.bell),
            ("wake", self.waker.step, 0.1, None),
            ("audit", self.audit.step, 1.0, None),
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))
