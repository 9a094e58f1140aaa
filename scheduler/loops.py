"""What the watches feed, and the loops that never end, each an async `step` of a few lines: reconcile and audit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from scheduler import breaker
from scheduler.clock import Clock
from scheduler.crew import Crew
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.intake.allocation import read_allocation
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.registry import Booking, Registry, Source
from scheduler.kube.port import Object
from scheduler.kube.reflector import Reflector
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.ledger.reconcile import Door, decide, drift
from scheduler.model.node import Node
from scheduler.model.pod import Amounts, Pod
from scheduler.model.reservation import Row, State
from scheduler.settling import Settler
from scheduler.turning import Turner

log = structlog.get_logger(__name__)

AT_ONCE = 64
SWEEP_SLICE = 1000
SECOND_LOOK_S = 5.0
AUDIT_SLICE, AUDIT_PAUSE_S = 50, 0.5  # a slice costs some 20 ms: the audit of a large cluster is 4 % of a core


@contextmanager
def barrier(registry: Registry, kind: str, obj: Object) -> Generator[None, None, None]:
    """Let no single object end the process: what raises is passed over, counted and logged.

    The reflector hands every version of an object over once, so it is named once.
    """
    meta = obj["metadata"]
    key = (kind, str(meta.get("uid", "")))
    try:
        yield
    except Exception:
        who = {name: meta.get(name, "") for name in ("namespace", "name", "uid", "resourceVersion")}
        log.exception("object.poison", kind=kind, **who)
        registry.poison.add(key)
    else:
        registry.poison.discard(key)


@dataclass(slots=True)
class PodSink:
    """Takes pods from the reflector into the inventory and says which Requests want a look."""

    desk: Desk
    settler: Settler
    turner: Turner

    def read(self, obj: Object) -> tuple[Object, Pod | None]:
        """Read one pod of a list; None where that raises."""
        pod = None
        with barrier(self.desk.registry, "pods", obj):
            pod = read_pod(obj)
        return _outline(obj), pod

    def replace(self, readings: list[tuple[Object, Pod | None]]) -> None:
        """Take a whole list; pods that are not in it are gone."""
        listed = {obj["metadata"].get("uid", "") for obj, _ in readings}
        for uid in [uid for uid in self.desk.registry.pods if uid not in listed]:
            self._gone(uid)
        for obj, pod in readings:
            if pod is not None:
                with barrier(self.desk.registry, "pods", obj):
                    self._put(pod)
            self._guard(obj)

    def upsert(self, obj: Object) -> None:
        """Take one new or changed pod."""
        with barrier(self.desk.registry, "pods", obj):
            self._put(read_pod(obj))
        self._guard(obj)

    def delete(self, obj: Object) -> None:
        """Take note that a pod is gone."""
        with barrier(self.desk.registry, "pods", obj):
            self._gone(obj["metadata"]["uid"])

    def _guard(self, obj: Object) -> None:
        """Unknown is not free: the node of a pod that could not be taken in gets no more asks for its devices."""
        registry, uid = self.desk.registry, str(obj["metadata"].get("uid", ""))
        if ("pods", uid) not in registry.poison or registry.held(uid) is not None:
            return
        seen = _outline(obj)
        node, phase = seen["spec"]["nodeName"], seen["status"]["phase"]
        if isinstance(node, str) and node and phase not in {"Succeeded", "Failed"}:
            with contextlib.suppress(Exception):  # the node is as odd as the pod, and nothing was changed
                registry.say(uid, Source.OBSERVED, Booking(node, Amounts(), named=False))

    def _put(self, pod: Pod) -> None:
        if not pod.uid:
            return
        before = self.desk.registry.pods.get(pod.uid)
        self.desk.registry.put_pod(pod)
        if before is not None and before.request != pod.request:
            self.desk.order.charging.renew(self.desk.book.rows, [pod.uid])
        if before is not None and pod.ours and pod.unschedulable > before.unschedulable:
            self.turner.parked(pod)
        self.turner.watch(pod)
        row, busy = self.desk.book.rows.get(pod.uid), pod.uid in self.settler.working  # busy: judge it when that ends
        door, now_us = self.desk.door(pod.request.namespace), self.desk.clock.wall_us()
        if busy or decide(row, pod, now_us=now_us, fresh=False, in_flight=False, door=door):
            self.settler.mark(pod.uid)

    def _gone(self, uid: str) -> None:
        self.desk.registry.remove_pod(uid)
        self.desk.drop_intent(uid)
        self.desk.forget(uid)
        self.turner.forget(uid)
        row = self.desk.book.rows.get(uid)
        if row is not None and row.state not in TERMINAL:
            self.settler.mark(uid, gone=True)


def _outline(obj: Object) -> Object:
    """Return what is still wanted of a pod when it was read: a tenth of it, so that a long list fits in memory."""
    meta, spec, status = obj["metadata"], obj.get("spec"), obj.get("status")
    return {
        "metadata": {key: meta.get(key, "") for key in ("namespace", "name", "uid", "resourceVersion")},
        "spec": {"nodeName": spec.get("nodeName") if isinstance(spec, dict) else None},
        "status": {"phase": status.get("phase") if isinstance(status, dict) else None},
    }


@dataclass(slots=True)
class NodeSink:
    """Takes nodes from the reflector into the inventory."""

    desk: Desk
    products: Mapping[str, str]

    def read(self, obj: Object) -> tuple[Object, Node | None]:
        """Read one node of a list; None where that raises, and for what is no node."""
        node = None
        with barrier(self.desk.registry, "nodes", obj):
            node = read_node(obj, self.products)
        return obj, node

    def replace(self, readings: list[tuple[Object, Node | None]]) -> None:
        """Take a whole list; nodes that are not in it are gone."""
        listed = {obj["metadata"]["name"] for obj, _ in readings}
        for known in [node for node in self.desk.registry.nodes.values() if node.name not in listed]:
            self.desk.registry.remove_node(known.name, known.uid)
        for obj, node in readings:
            if node is not None:
                with barrier(self.desk.registry, "nodes", obj):
                    self._put(node)

    def upsert(self, obj: Object) -> None:
        """Take one new or changed node."""
        with barrier(self.desk.registry, "nodes", obj):
            node = read_node(obj, self.products)
            if node is not None:
                self._put(node)

    def delete(self, obj: Object) -> None:
        """Take note that a node is gone."""
        with barrier(self.desk.registry, "nodes", obj):
            self.desk.registry.remove_node(obj["metadata"]["name"], obj["metadata"]["uid"])

    def _put(self, node: Node) -> None:
        if self.desk.registry.put_node(node):
            self.desk.order.charging.renew(self.desk.book.rows, self.desk.registry.holders(node.name))
            self.desk.asks.node_changed(node.name)
            for warning in node.warnings:
                log.warning("node.odd", node=node.name, warning=warning)


@dataclass(slots=True)
class Reconcile:
    """Settles what was marked; now and then looks at everything, in case an event was lost.

    While the store is left alone nothing is settled, and what it is for waits; its first calls after that are the
    probes. When the store or the API server is back, everything is looked at, so that who was held goes on in order.
    """

    desk: Desk
    settler: Settler
    clock: Clock
    every_s: float = 30.0
    _swept_s: float = field(default=0.0)
    _well: tuple[bool, bool] = (True, True)  # store and API server, at the last look at everything

    async def step(self) -> None:
        """Settle a batch side by side, so that their commits share one fsync."""
        now_s, behind = self.clock.monotonic(), self.desk.dependencies
        room, well = min(behind.store.room(), AT_ONCE), (behind.store.closed, behind.api.closed)
        if not room:
            return
        if now_s - self._swept_s >= self.every_s or well != self._well:
            self._swept_s, self._well = now_s, well
            await self.sweep()
        dirty, working = self.settler.dirty, self.settler.working
        free = [uid for uid in dirty if uid not in working]
        batch = [(uid, dirty.pop(uid)) for uid in free[:room]]
        due = [(uid, gone) for uid, gone in batch if self.settler.due(uid, fresh=gone)]  # a bound pod's last event: no
        await asyncio.gather(*(self.settler.settle(uid, fresh=gone) for uid, gone in due))
        if len(free) > AT_ONCE:
            self.settler.bell.set()
        for _ in range(0 if batch else min(behind.store.room(), breaker.PROBES) if not behind.store.closed else 0):
            with contextlib.suppress(StoreError):
                await self.settler.writer.commit(())  # a probe, since nobody has anything to write

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
        """Mark every Request about which something is to be done, by arrival; lets the loop turn now and then."""
        now_us, pods, rows = self.clock.wall_us(), self.desk.registry.pods, self.desk.book.rows
        found: list[tuple[tuple[int, str, str], str]] = []
        uids = dict.fromkeys(row.id for row in self.desk.book.live()) | dict.fromkeys(
            uid for uid, pod in pods.items() if pod.ours
        )
        for count, uid in enumerate(uids):
            if count % SWEEP_SLICE == SWEEP_SLICE - 1:
                await self.clock.sleep(0)
            if ("pods", uid) in self.desk.registry.poison:
                continue  # what memory has of this pod is not how it is
            row, pod, busy = rows.get(uid), pods.get(uid), uid in self.settler.working
            door = self.desk.door(pod.request.namespace) if pod is not None else Door.OPEN
            if decide(row, pod, now_us=now_us, fresh=False, in_flight=busy, door=door):
                found.append((_arrival(row or pod), uid))  # type: ignore[arg-type]  # where there is neither, nothing is to do
        dirty = self.settler.dirty
        for _, uid in sorted(found):
            self.settler.mark(uid, gone=dirty.pop(uid, False))


def _arrival(one: Row | Pod) -> tuple[int, str, str]:
    """Return what sorts by arrival: times have whole seconds, so names decide between equal ones."""
    who = one.request if isinstance(one, Pod) else one
    return who.arrival_us, who.namespace, who.name


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
        for count, wrong in enumerate(self.desk.order.charging.differences(rows, busy), start=1):
            found += [wrong] if wrong else []
            await self.clock.sleep(0 if count % AUDIT_SLICE else AUDIT_PAUSE_S / 10)
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
