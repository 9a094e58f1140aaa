"""The whole program on an embedded cluster, with a Tessera that can be stopped, killed and started again.

Between Tessera and the API server lies a line: what was sent before a kill still arrives, and may arrive late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from scheduler import ALLOCATION, GPU, SCHEDULER_NAME, faults
from scheduler.app import App
from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.embedded import audit
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.injected import Faults
from scheduler.embedded.witness import Witness
from scheduler.embedded.world import World
from scheduler.ids import seeded_ids
from scheduler.kube.port import Kind, Object, PatchBody, PatchType, WatchEvent
from scheduler.model.reservation import Row, State
from scheduler.settling import Writer
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter

LIVE_BOUND = {State.BOUND, State.RUNNING}


class Killed(BaseException):
    """Tessera was killed here, as by SIGKILL: no handler of its own may catch it."""


@dataclass
class Line:
    """Tessera's connection: a request that was sent goes on without its sender.

    Attributes:
        late_s: verb -> how much later its next requests leave, one number each.
        sent: (verb, name) of every write.
        repeats: says of a watch event whether it comes a second time.
    """

    cluster: EmbeddedCluster
    clock: LoopClock
    late_s: dict[str, list[float]] = field(default_factory=dict)
    sent: list[tuple[str, str]] = field(default_factory=list)
    repeats: Callable[[], bool] = bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)

    async def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncIterator[WatchEvent]:
        async with aclosing(self.cluster.watch(kind, resource_version, timeout_s=timeout_s)) as events:
            async for event in events:
                yield event
                if self.repeats():
                    yield event

    async def bind(self, namespace: str, name: str, body: Object) -> None:
        await self._send("bind", name, lambda: self.cluster.bind(namespace, name, body))

    async def patch(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: PatchBody,
        *,
        patch_type: PatchType = "merge",
        subresource: str = "",
    ) -> Object:
        return await self._send(
            "patch",
            name,
            lambda: self.cluster.patch(kind, namespace, name, body, patch_type=patch_type, subresource=subresource),
        )

    async def _send(self, verb: str, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        self.sent.append((verb, name))
        late_s = self.late_s[verb].pop(0) if self.late_s.get(verb) else 0.0

        async def travel() -> Any:
            if late_s:
                await self.clock.sleep(late_s)
            return await call()

        task = asyncio.ensure_future(travel())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)


@dataclass
class Town:
    """World, ledger and the Tessera of the moment."""

    clock: LoopClock
    world: World
    line: Line
    store: Store
    witness: Witness
    app: App | None = None
    seed: int = 1
    settings: Settings = field(default_factory=Settings)
    writer: Callable[[Store], Writer] = InlineWriter
    _hooks: list[Callable[[], None]] = field(default_factory=list)

    # Tessera

    @property
    def tessera(self) -> App:
        assert self.app is not None, "Tessera is down"
        return self.app

    async def start(self) -> None:
        """Start a Tessera on the same ledger, as a new process would."""
        self.store.raise_fence()
        writer = self.writer(self.store)
        self.app = App(self.settings, self.clock, self.line, self.store, writer, Random(self.seed))
        await self.app.start()
        self.world.extender = Switch(self.app)

    async def stop(self) -> None:
        self.world.extender = None
        await self.tessera.stop()
        self.app = None

    def kill(self) -> None:
        """End it between two instructions: nothing more of it runs, what it sent is on its way."""
        app, self.app, self.world.extender = self.tessera, None, None
        mine = [*app.crew, *(task for _, task, _ in app.binder._running.values())]
        for task in mine:
            task.cancel()
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def kill_at(self, point: str, *, time: int = 1) -> None:
        """Kill it when it comes to this fault point for the n-th time."""
        left = time

        async def hook(name: str) -> None:
            nonlocal left
            if name != point or self.app is None:
                return
            left -= 1
            if left == 0:
                self.kill()
                raise Killed(point)

        self._hooks.append(faults.install(hook))

    def stall_at(self, point: str, seconds: float) -> None:
        """Hold it at this fault point, the first time it comes there."""
        waits = [seconds]

        async def hook(name: str) -> None:
            if name == point and waits:
                await self.clock.sleep(waits.pop())

        self._hooks.append(faults.install(hook))

    def spare(self) -> None:
        """Take every hook away."""
        while self._hooks:
            self._hooks.pop()()

    # people

    async def node(self, name: str, *, gpus: int = 8, mode: str = "exact", cpu: str = "64") -> Object:
        return await self.world.cluster.create("nodes", "", machine(name, gpus=gpus, mode=mode, cpu=cpu))

    async def pod(self, name: str, **more: Any) -> Object:
        return await self.world.cluster.create("pods", "default", job(name, **more))

    async def get(self, name: str) -> Object:
        return await self.world.cluster.get("pods", "default", name)

    async def delete(self, name: str, *, grace_s: int = 0) -> None:
        await self.world.cluster.delete("pods", "default", name, grace_s=grace_s)

    async def node_of(self, name: str) -> str:
        node: str = (await self.get(name))["spec"].get("nodeName", "")
        return node

    async def wait(self, seconds: float) -> None:
        await self.clock.sleep(seconds)

    async def until(self, what: Callable[[], bool], within_s: float) -> float:
        """Wait until something is so and return how long it took."""
        began = self.clock.monotonic()
        while not what():
            assert self.clock.monotonic() - began < within_s, f"not within {within_s} s"
            await self.clock.sleep(0.01)
        return self.clock.monotonic() - began

    def bound(self) -> dict[str, str]:
        """Names and nodes of the pods that are bound and live."""
        return {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in self.witness.bound()}

    # judgement

    def state(self, pod: Object) -> State | None:
        row = self.store.row(pod["metadata"]["uid"])
        return row.state if row else None

    def row(self, pod: Object) -> Row:
        row = self.store.row(pod["metadata"]["uid"])
        assert row is not None, "the ledger does not know this pod"
        return row

    async def check(self) -> None:
        """Nothing lost, nothing doubled, no room used twice at any moment, and every record agrees."""
        nodes, pods = self.world.cluster.snapshot("nodes"), self.world.cluster.snapshot("pods")
        assert audit.look(nodes, pods) == []
        assert self.witness.over_allocations == []
        assert self.witness.slice_overlaps == []
        assert self.witness.unannotated == []
        verified = self.store.verify()
        assert verified.ok, verified
        assert await self.tessera.audit.look() == []
        for pod in pods:
            if pod["spec"].get("schedulerName") == SCHEDULER_NAME:
                row = self.row(pod)
                assert (row.state in LIVE_BOUND) == bool(pod["spec"].get("nodeName")), (row.state, pod["metadata"])
        live = {row.id for row in self.tessera.desk.book.live()}
        assert live <= {pod["metadata"]["uid"] for pod in pods}


@dataclass
class Switch:
    """The extender of one Tessera behind its socket: when it is killed in a call, the connection breaks.

    Attributes:
        silence_s: how long after that; a machine that vanished sends nothing.
    """

    app: App
    silence_s: float = 0.0

    async def filter(self, body: bytes) -> tuple[int, bytes]:
        return await self.app.extender.filter(body)

    async def prioritize(self, body: bytes) -> tuple[int, bytes]:
        return await self.app.extender.prioritize(body)

    async def bind(self, body: bytes) -> tuple[int, bytes]:
        try:
            return await self.app.extender.bind(body)
        except (Killed, asyncio.CancelledError):
            await self.app.clock.sleep(self.silence_s)
            raise ConnectionResetError("the extender was killed") from None


@asynccontextmanager
async def town(
    *nodes: str, seed: int = 1, started: bool = True, before: Callable[[Town], None] | None = None, **more: Any
) -> AsyncIterator[Town]:
    """Open a town with exact nodes of 8 GPUs; `before` sees it before anything runs."""
    clock = LoopClock(asyncio.get_running_loop())
    world = World(clock, seeded_ids(Random(seed)), Random(seed))
    world.cluster.faults = Faults(Random(seed))
    store = Store.open("sqlite://", new_id=seeded_ids(Random(seed + 1)))
    place = Town(clock, world, Line(world.cluster, clock), store, Witness(world.cluster, clock), seed=seed)
    for name in nodes:
        await place.node(name, **more)
    if before is not None:
        before(place)
    watching = asyncio.ensure_future(place.witness.run())
    try:
        async with world.running():
            if started:
                await place.start()
            yield place
            if place.app is not None:
                await place.stop()
    finally:
        place.spare()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        store.close()


def machine(name: str, *, gpus: int = 8, mode: str = "exact", cpu: str = "64") -> Object:
    amounts = {"cpu": cpu, "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "110", GPU: str(gpus)}
    labels = {"kubernetes.io/hostname": name, "tessera.dev/mode": mode, "nvidia.com/gpu.count": str(gpus)}
    labels["nvidia.com/gpu.product"] = "NVIDIA-H100-80GB-HBM3"
    status = {"capacity": amounts, "allocatable": amounts, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"name": name, "labels": labels}, "spec": {}, "status": status}


def job(name: str, *, gpus: int = 1, cpu: str = "1", **spec: Any) -> Object:
    limits = {GPU: str(gpus)} if gpus else {}
    resources = {"requests": {"cpu": cpu, "memory": "1Gi"}, "limits": limits}
    container = {"name": "main", "image": "x", "resources": resources}
    return {
        "metadata": {"name": name},
        "spec": {"schedulerName": SCHEDULER_NAME, "containers": [container], **spec},
    }


def annotation(pod: Object) -> str:
    text: str = pod["metadata"]["annotations"][ALLOCATION]
    return text
