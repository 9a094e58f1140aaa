"""The composition root: the only place that builds the parts and joins them.

Start: open the ledger, verify its tail, list the cluster, book what is held, settle what was in flight, then be ready.
Stop: refuse new work, let binds in flight end, flush, give the lease back.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import structlog

from scheduler import geometry
from scheduler.binding import Binder
from scheduler.clock import Clock
from scheduler.config import Settings
from scheduler.crew import Crew
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.guarded import guarded
from scheduler.kube.port import Cluster
from scheduler.kube.reflector import Reflector
from scheduler.ledger.ledger import Book
from scheduler.loops import Audit, NodeSink, PodSink, Reconcile, follow, forever
from scheduler.metrics import Metrics
from scheduler.notices import Notices
from scheduler.queues import QueueFeed
from scheduler.settling import Settler, Writer
from scheduler.store.store import Store
from scheduler.turning import Turner
from scheduler.web.extender import Extender
from scheduler.web.views import Views

log = structlog.get_logger(__name__)

STALE_S = 60.0
VERSION = "0.1.0"


class App:
    """One Tessera: everything that runs, joined."""

    def __init__(  # noqa: PLR0917 - the outside world, part by part
        self, settings: Settings, clock: Clock, cluster: Cluster, store: Store, writer: Writer, rng: Random
    ) -> None:
        """Join the parts; nothing runs yet. `rng` spreads time-outs and waits."""
        self.settings, self.clock, self.store = settings, clock, store
        self.metrics = Metrics(clock, VERSION)
        extend, reserve_s = settings.extender, settings.queue.reservationTimeout
        self.desk = desk = Desk(clock, settings.policy.policies(), store.fence, extend.k, reserve_s)
        self.cluster, self.writer = cluster, writer = guarded(cluster, self.metrics.counting(writer), desk.dependencies)
        self.settler = Settler(self.desk, cluster, writer, clock, store.row)
        self.turner = Turner.of(self.desk, cluster, writer, self.settler, clock, settings)
        self.binder = Binder(self.desk, cluster, writer, self.settler, clock, settings.extender.bindDeadline)
        self.audit, self.reconcile = Audit(self.desk, self.settler, clock), Reconcile(self.desk, self.settler, clock)
        self.crew, self.recovered = Crew(), False
        self.missing: Callable[[], str] = str  # why the cluster is not ours, a sentence or empty; the process says
        nodes, pods = NodeSink(self.desk, geometry.products()), PodSink(self.desk, self.settler, self.turner)
        self.reflectors = [Reflector(cluster, "nodes", clock, nodes, rng=rng)]  # nodes first: pods need their rows
        self.reflectors += [Reflector(cluster, "pods", clock, pods, rng=rng)]
        self.queues = QueueFeed(self.desk, cluster, clock, rng, self.unready, store, settings.queue.halfLife)
        self.metrics.watch(self.desk, self.age_s, lambda: self.audit.findings)
        self.extender = Extender(self.desk, clock, self.metrics, self.unready, self.binder.bind, extend.filterDeadline)
        self.views = Views(self.desk, self.metrics, self.unready)

    async def start(self) -> None:
        """Recover, start the loops and return when ready."""
        began = self.clock.monotonic()
        verified = self.store.verify_tail()
        if not verified.ok:
            raise StoreError(f"the journal does not verify at row {verified.first_bad}: {verified.text}")
        at_verified = self.clock.monotonic()
        self.desk.book = Book(*self.store.load())
        await self.queues.start(self.crew)  # first of all: they say who may have what
        for reflector in self.reflectors:
            await follow(reflector, self.crew, self.clock)
        at_listed = self.clock.monotonic()
        await self.reconcile.recover()
        verify_s, list_s = round(at_verified - began, 3), round(at_listed - at_verified, 3)
        log.info("recovered", verify_s=verify_s, list_s=list_s, rebuild_s=round(self.clock.monotonic() - at_listed, 3))
        self.crew.spawn(forever("reconcile", self.reconcile.step, self.clock, 1.0, self.settler.bell))
        self.crew.spawn(forever("turn", self.turner.step, self.clock, 0.5, self.turner.bell))
        self.crew.spawn(forever("release", self.turner.releaser.run, self.clock, 0.5))
        notices = Notices(self.desk, self.cluster, self.clock, self.metrics.noticed)
        self.crew.spawn(forever("audit", self.audit.step, self.clock, 1.0))
        self.crew.spawn(forever("notices", notices.step, self.clock, 1.0))
        self.recovered = True

    async def stop(self) -> None:
        """Refuse new work, let what is in flight end, flush and let go."""
        self.recovered = False
        await self.binder.drain()
        await self.crew.dismiss()
        await self.writer.close()

    def age_s(self) -> float:
        """Return how long ago the quieter of the two watches was heard."""
        return max(reflector.age_s(self.clock.monotonic()) for reflector in self.reflectors)

    def unready(self) -> str:
        """Return why no decision may be made now; empty = ready."""
        if not self.recovered:
            trouble = next((f": {found.last_error}" for found in self.reflectors if found.last_error), "")
            return self.missing() or f"starting: the inventory is being rebuilt{trouble}"
        late = f"the API server was last heard {age_s:.0f} s ago" if (age_s := self.age_s()) > STALE_S else ""
        return self.missing() or self.desk.dependencies.trouble() or late
