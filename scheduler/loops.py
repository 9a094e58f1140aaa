"""What the watches feed, and the loops that never end, each an async `step` of a few lines: reconcile and audit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import structlog

from scheduler.clock import Clock
from scheduler.crew import Crew
from scheduler.desk import Desk
from scheduler.intake.allocation import read_allocation
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.kube.port import Object
from scheduler.kube.reflector import Reflector
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.ledger.reconcile import decide, drift
from scheduler.model.pod import Pod
from scheduler.model.reservation import State
from scheduler.settling import Settler
from scheduler.waking import Waker

log = structlog.get_logger(__name__)

AT_ONCE = 64
SWEEP_SLICE = 1000
SECOND_LOOK_S = 5.0
AUDIT_SLICE, AUDIT_PAUSE_S = 50, 0.5  # a slice costs some 20 ms: the audit of a large cluster is 4 % of a core


@dataclass(slots=True)
class PodSink:
    """Takes pods from the reflector into the inventory and says which Requests want a look."""

    desk: Desk
    settler: Settler
    waker: Waker

    def replace(self, objects: list[Object]) -> None:
        """Take a whole list; pods that are not in it are gone."""
        pods = [read_pod(raw) for raw in objects]
        listed = {pod.uid for pod in pods}
        for uid in [uid for uid in self.desk.registry.pods if uid not in listed]:
            self._gone(uid)
        for pod in pods:
            self._put(pod)

    def upsert(self, obj: Object) -> None:
        """Take one new or changed pod."""
        self._put(read_pod(obj))

    def delete(self, obj: Object) -> None:
        """Take note that a pod is gone."""
        self._gone(obj["metadata"]["uid"])

    def _put(self, pod: Pod) -> None:
        if not pod.uid:
            return
        self.desk.registry.put_pod(pod)
        self.waker.watch(pod)
        row, busy = self.desk.book.rows.get(pod.uid), pod.uid in self.settler.working  # busy: judge it when that ends
        if busy or decide(row, pod, now_us=self.desk.clock.wall_us(), fresh=False, in_flight=False):
            self.settler.mark(pod.uid)

    def _gone(self, uid: str) -> None:
        self.desk.registry.remove_pod(uid)
        self.desk.drop_intent(uid)
        self.desk.forget(uid)
        self.waker.forget(uid)
        row = self.desk.book.rows.get(uid)
        if row is not None and row.state not in TERMINAL:
            self.settler.mark(uid, gone=True)


@dataclass(slots=True)
class NodeSink:
    """Takes nodes from the reflector into the inventory."""

    desk: Desk
    products: Mapping[str, str]

    def replace(self, objects: list[Object]) -> None:
        """Take a whole list; nodes that are not in it are gone."""
        nodes = [node for raw in objects if (node := read_node(raw, self.products))]
        listed = {node.name for node in nodes}
        for known in [node for node in self.desk.registry.nodes.values() if node.name not in listed]:
            self.desk.registry.remove_node(known.name, known.uid)
        for raw in objects:
            self.upsert(raw)

    def upsert(self, obj: Object) -> None:
        """Take one new or changed node."""
        node = read_node(obj, self.products)
        if node is not None and self.desk.registry.put_node(node):
            self.desk.asks.node_changed(node.name)
            for warning in node.warnings:
                log.warning("node.odd", node=node.name, warning=warning)

    def delete(self, obj: Object) -> None:
        """Take note that a node is gone."""
        self.desk.registry.remove_node(obj["metadata"]["name"], obj["metadata"]["uid"])


@dataclass(slots=True)
class Reconcile:
    """Settles what was marked; now and then looks at everything, in case an event was lost."""

    desk: Desk
    settler: Settler
    clock: Clock
    every_s: float = 30.0
    _swept_s: float = field(default=0.0)

    async def step(self) -> None:
        """Settle a batch side by side, so that their commits share one fsync."""
        now_s = self.clock.monotonic()
        if now_s - self._swept_s >= self.every_s:
            self._swept_s = now_s
            await self.sweep()
        dirty, working = self.settler.dirty, self.settler.working
        free = [uid for uid in dirty if uid not in working]
        batch = [(uid, dirty.pop(uid)) for uid in free[:AT_ONCE]]
        await asyncio.gather(*(self.settler.settle(uid, fresh=gone) for uid, gone in batch))
        if len(free) > AT_ONCE:
            self.settler.bell.set()

    async def recover(self) -> None:
        """Book what the ledger holds, and settle what the last process left in flight, before anything is decided."""
        for row in self.desk.book.live():
            pod = self.desk.registry.pods.get(row.id)
            if row.state in HOLDING and pod is not None:
                self.desk.hold_claim(row, pod, read_allocation(row.allocation))
        while pending := [row.id for row in self.desk.book.live() if row.state is State.BINDING]:
            await asyncio.gather(*(self.settler.settle(uid) for uid in pending))
            if any(row.state is State.BINDING for row in self.desk.book.live()):
                await self.clock.sleep(0.5)
        await self.sweep()

    async def sweep(self) -> None:
        """Mark every Request about which something is to be done; lets the loop turn now and then."""
        now_us, pods, rows = self.clock.wall_us(), self.desk.registry.pods, self.desk.book.rows
        uids = dict.fromkeys(row.id for row in self.desk.book.live()) | dict.fromkeys(
            uid for uid, pod in pods.items() if pod.ours
        )
        for count, uid in enumerate(uids):
            if count % SWEEP_SLICE == SWEEP_SLICE - 1:
                await self.clock.sleep(0)
            if decide(rows.get(uid), pods.get(uid), now_us=now_us, fresh=False, in_flight=uid in self.settler.working):
                self.settler.mark(uid)


@dataclass(slots=True)
class Audit:
    """Compares what is kept in several places; a difference is shown and never repaired towards "free"."""

    desk: Desk
    settler: Settler
    clock: Clock
    every_s: float = 60.0
    findings: list[str] = field(default_factory=list)

    async def step(self) -> None:
        """Wait, then audit once; a finding counts when a second look finds it too, for a watch may lag behind."""
        await self.clock.sleep(self.every_s)
        first = await self.look()
        await self.clock.sleep(SECOND_LOOK_S)
        self.findings = [finding for finding in await self.look() if finding in first] if first else []
        for finding in self.findings[:20]:
            log.error("audit.drift", finding=finding)

    async def look(self) -> list[str]:
        """Return what does not agree, a sentence each; lets the loop turn between nodes and rests between slices."""
        busy = self.settler.dirty.keys() | self.settler.working.keys()  # about to change: no drift
        rows, pods = self.desk.book.rows, self.desk.registry.pods
        found = drift(
            {uid: row for uid, row in rows.items() if uid not in busy},
            {uid: pod for uid, pod in pods.items() if uid not in busy},
        )
        for count, name in enumerate(list(self.desk.registry.nodes), start=1):
            if name in self.desk.registry.nodes:
                found += [
                    f"node {name}: column {column} differs from a rebuild"
                    for column in self.desk.registry.differences(name)
                ]
            await self.clock.sleep(0 if count % AUDIT_SLICE else AUDIT_PAUSE_S)
        return found


async def follow(reflector: Reflector, crew: Crew, clock: Clock) -> None:
    """Let a reflector run beside the others, and return when its sink holds the first list."""
    crew.spawn(reflector.run())
    while not reflector.synced:
        crew.check()
        await clock.sleep(0.01)


async def forever(
    name: str, step: Callable[[], Awaitable[None]], clock: Clock, pause_s: float, bell: asyncio.Event | None = None
) -> None:
    """Run one step after the other; pause between, or until the bell rings. An error is logged and the loop goes on."""
    while True:
        if bell is not None:
            bell.clear()
        try:
            await step()
        except Exception:
            log.exception("loop.failed", loop=name)
            await clock.sleep(1.0)
        if bell is None:
            await clock.sleep(pause_s)
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await bell.wait()
