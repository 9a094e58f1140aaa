"""One episode: a small cluster, people, bad weather and kills for virtual minutes; then calm and everybody's turn.

A step is one callback that the event loop runs, or one event that is injected here. The same seed plays the same steps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from bench.oracle import ours, terminal
from bench.soak import _admitted
from bench.workload import Plan, UnreachableError, plan
from scheduler import GATE, faults
from scheduler.config import Settings
from scheduler.embedded.injected import Rates
from scheduler.kube.port import ApiError, Conflict, NotFound, Object, UnknownOutcome
from scheduler.model.reservation import State
from scheduler.settling import LATEST_S
from scheduler.store.store import Store
from tests.simulation.inspector import Inspector, require
from tests.simulation.liveness import unexplained
from tests.simulation.shuffled import ShuffledLoop
from tests.simulation.slow_disk import SlowDisk
from tests.simulation.town import Killed, Town, town

CALM_S = 660.0  # ten minutes, and what a pod was taught of nodes lives for ten itself
LOOK_S = 10.0
VERIFY_EVERY = 20  # injected events between two checks of the whole ledger
VERBS, WRITES = ("bind", "patch", "get", "list", "watch"), ("bind", "patch")
TROUBLE = (Rates(failed=1.0), Rates(throttled=1.0), Rates(lost_reply=1.0))
QUEUES = ("root", "team", "a", "b", "free")
NAMESPACE = "default"
LEASE = "tessera-kube-scheduler"


@dataclass
class Report:
    """What an episode came to."""

    seed: int
    steps: int = 0
    looks: int = 0
    pods: int = 0
    bound: int = 0
    events: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    violation: str = ""
    head: str = ""


@dataclass
class Episode:
    """Its parts and its fate.

    Attributes:
        leave: names of injected events that are left out, to see which ones a finding needs.
    """

    seed: int
    loop: ShuffledLoop
    report: Report
    leave: frozenset[str] = frozenset()
    place: Town = field(init=False)
    inspector: Inspector = field(init=False)
    rng: Random = field(init=False)
    disk: SlowDisk | None = None
    queues: dict[str, dict[str, Any]] = field(default_factory=dict)
    deadly: float = 0.0  # probability that a fault point kills
    stalling: float = 0.0
    _asleep: bool = False  # kube-scheduler is
    _restart: asyncio.Event = field(default_factory=asyncio.Event)
    _calm: bool = False
    _pods: list[Object] = field(default_factory=list)
    _number: int = 0

    async def play(self) -> None:
        """Play it to its end. Raises Violation, or whatever breaks the program."""
        self.rng = Random(f"{self.seed}.fate")
        planned = _planned(self.seed, self.rng)
        self._pods = [_admitted(pod) for pod in planned.pods]
        settings = Settings.model_validate(
            {
                "queue": {"reservationTimeout": f"{self.rng.choice((20, 60, 120))}s"},
                "extender": {"k": self.rng.choice((1, 1, 4))},
            }
        )

        def found(place: Town) -> None:
            self._found(place, planned, settings)

        async with town(seed=self.seed, started=False, before=found) as place:
            take_away = faults.install(self._point)
            try:
                await self._rule()
                await self._start()
                await self._storm()
                await self._rest()
            finally:
                self.loop.between = bool
                take_away()
                await self._end()
        self.report.head = place.store.head[1]

    def _found(self, place: Town, planned: Plan, settings: Settings) -> None:
        self.place, place.settings, place.writer = place, settings, self._disk
        place.world.cluster.preload("nodes", planned.nodes)
        place.world.cluster.preload("pods", planned.strangers)
        place.line.repeats = lambda: not self._calm and self.rng.random() < 0.05
        place.world.cluster.latency_s = self.rng.choice((0.001, 0.005, 0.02))
        work = place.world.kube_scheduler.run
        place.world.kube_scheduler.run = lambda: self._kube_scheduler(work)  # type: ignore[method-assign]
        self.inspector = Inspector(place)
        self.loop.between = self.inspector.look

    def _disk(self, store: Store) -> SlowDisk:
        self.disk = SlowDisk(store, self.place.clock, self.rng, late_s=self.rng.choice((0.002, 0.02, 0.3)))
        if not self._calm:
            self.disk.failing = self.rng.choice((0.0, 0.0, 0.02, 0.1))
        return self.disk

    async def _kube_scheduler(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run it, and let it be stopped, be away for a while and come back with nothing in its memory."""
        while True:
            running = asyncio.ensure_future(work())
            again = asyncio.ensure_future(self._restart.wait())
            try:
                await asyncio.wait((running, again), return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
            finally:
                for task in (running, again):
                    task.cancel()
                await asyncio.gather(running, again, return_exceptions=True)
            self._restart.clear()
            while self._asleep:
                await self.place.wait(0.5)

    # Tessera

    async def _start(self) -> None:
        """Start one, again and again: the weather may be bad, and it may be killed on the way."""
        while True:
            try:
                async with asyncio.timeout(60):
                    await self.place.start()
            except (Killed, BaseExceptionGroup, TimeoutError, ApiError, UnknownOutcome):
                self._kill()
                self.report.events["start again"] += 1
                await self.place.wait(1)
            else:
                if self.place.app is not None:
                    self.inspector.up_s = self.place.clock.monotonic()
                    return

    def _kill(self) -> None:
        if self.place.app is not None:
            self.place.kill()
            self.inspector.up_s = None
            if self.disk is not None:
                self.disk.die()

    async def _point(self, name: str) -> None:
        self.report.points[name] += 1
        if self._calm or self.place.app is None:
            return
        fate = self.rng.random()
        if fate < self.deadly:
            self.report.points["killed " + name] += 1
            self._kill()
            raise Killed(name)
        if fate < self.deadly + self.stalling:
            await self.place.wait(self.rng.uniform(0, 3))

    # what happens

    async def _rule(self) -> None:
        """Make the queues: a tree that borrows and lends, and one that limits nothing."""
        rng = self.rng

        def some() -> int:
            return rng.choice((0, 1, 2, 4, 8, 16))

        self.queues = {
            "root": {"nominal": {"gpu": some(), "cpu": "400"}},
            "team": {"parent": "root", "nominal": {"gpu": some()}, "borrowLimit": {"gpu": some()}},
            "a": {"parent": "team", "nominal": {"gpu": some()}, "lendLimit": {"gpu": some() // 2}},
            "b": {
                "parent": "team",
                "nominal": {"gpu": some(), "cpu": "64"},
                "borrowLimit": {"gpu": some(), "cpu": "32"},
            },
            "free": {},
        }
        for name, spec in self.queues.items():
            body = {"metadata": {"name": name}, "spec": {**spec, "namespaceSelector": {}}}
            await self._insist(lambda body=body: self.place.world.cluster.create("queues", "", body))

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Do what people do when the API server fails: try again."""
        while True:
            try:
                return await call()
            except (NotFound, Conflict) as error:
                if "injected" not in str(error):
                    return None
                await self.place.wait(0.2)
            except (ApiError, UnknownOutcome):
                await self.place.wait(0.2)

    async def _storm(self) -> None:
        """Inject events until all pods have come and for a while after."""
        rng = self.rng
        self.stalling, self.deadly = rng.choice((0.0, 0.02)), rng.choice((0.0, 0.0, 0.01, 0.03))
        rare = {
            self._weather: 6, self._clear: 6, self._compact: 2, self._cordon: 4, self._node_dies: 1, self._quota: 3,
            self._delete: 10, self._finish: 8, self._be_killed: 3, self._sleep: 2, self._slow: 2, self._outage: 3,
            self._break_disk: 3, self._patch: 4, self._stop_queue: 1,
        }  # fmt: skip
        chosen = {event: weight for event, weight in rare.items() if rng.random() < 0.6}
        total, count = len(self._pods), 0
        while self._pods or count < 2 * total:
            count += 1
            if self._pods and (not chosen or rng.random() < 0.5):
                await self._arrive()
            elif chosen:
                event = rng.choices(list(chosen), list(chosen.values()))[0]
                await self._inject(event)
            if self.place.app is None:
                await self.place.wait(rng.choice((0.0, 0.5, 5.0, 30.0)))
                await self._start()
            if count % VERIFY_EVERY == 0:
                verified = self.place.store.verify()
                require(verified.ok, "I5 the ledger", verified)
            await self.place.wait(rng.choice((0.0, 0.01, 0.2, 1.0, 3.0)))

    async def _inject(self, event: Callable[[], Awaitable[None]]) -> None:
        name = event.__name__.strip("_")
        if name in self.leave:
            return
        self.report.events[name] += 1
        self.loop.steps += 1
        await event()

    async def _arrive(self) -> None:
        self.report.events["arrive"] += 1
        self.loop.steps += 1
        gang = self.rng.choice((0, 0, 0, 0, 0, 2, 3))
        queue, held = self.rng.choice((*QUEUES, "")), self.rng.random() < 0.6
        self._number += 1
        pods, self._pods = self._pods[: max(gang, 1)], self._pods[max(gang, 1) :]
        for pod in pods:
            metadata, spec = pod["metadata"], pod["spec"]
            if queue:
                metadata.setdefault("labels", {})["tessera.dev/queue"] = queue
            if gang:
                notes = metadata.setdefault("annotations", {})
                notes |= {"tessera.dev/gang": f"g{self._number}", "tessera.dev/gang-size": str(gang)}
            if held:
                spec["schedulingGates"] = [{"name": GATE}]
            await self._insist(lambda pod=pod: self.place.world.cluster.create("pods", NAMESPACE, pod))
            self.report.pods += 1

    def _some(self, *, bound: bool) -> Object | None:
        pods = self.place.world.cluster.snapshot("pods")
        fit = [pod for pod in pods if ours(pod) and not terminal(pod) and bool(pod["spec"].get("nodeName")) == bound]
        return self.rng.choice(fit) if fit else None

    async def _delete(self) -> None:
        pod = self._some(bound=self.rng.random() < 0.7)
        if pod is not None:
            grace_s = self.rng.choice((0, 1, 5))
            meta = pod["metadata"]
            await self._insist(
                lambda: self.place.world.cluster.delete("pods", NAMESPACE, meta["name"], grace_s=grace_s)
            )

    async def _finish(self) -> None:
        pod = self._some(bound=True)
        if pod is not None:
            body = {"status": {"phase": self.rng.choice(("Succeeded", "Failed"))}}
            await self._patch_of(pod, body, subresource="status")

    async def _patch(self) -> None:
        pod = self._some(bound=False)
        if pod is not None:
            await self._patch_of(pod, {"metadata": {"labels": {"stranger": f"n{self.rng.randrange(100)}"}}})

    async def _patch_of(self, pod: Object, body: Object, **more: Any) -> None:
        name = pod["metadata"]["name"]
        await self._insist(lambda: self.place.world.cluster.patch("pods", NAMESPACE, name, body, **more))

    async def _weather(self) -> None:
        faults_ = self.place.world.cluster.faults
        assert faults_ is not None
        bad = self.rng.choice((0.01, 0.03, 0.1))
        for verb in VERBS:
            reads = verb in {"list", "watch"}
            faults_.rates[verb] = Rates(  # type: ignore[index]
                conflict=0.0 if reads or verb == "get" else bad,
                throttled=bad,
                failed=bad,
                lost_reply=0.0 if reads else bad,
                gone=bad if reads else 0.0,
            )
        faults_.watch_delay_s, faults_.watch_end = self.rng.choice((0.0, 0.2, 2.0)), self.rng.choice((0.0, 0.02))

    async def _clear(self) -> None:
        assert self.place.world.cluster.faults is not None
        self.place.world.cluster.faults.calm()

    async def _outage(self) -> None:
        """Let the API server be away, or tell of everything and take no write; some arrive meanwhile."""
        faults_ = self.place.world.cluster.faults
        assert faults_ is not None
        verbs, bad = self.rng.choice((VERBS, WRITES)), self.rng.choice(TROUBLE)
        faults_.rates.update(dict.fromkeys(verbs, bad if verbs is WRITES else TROUBLE[0]))  # type: ignore[arg-type]
        up_s, self.inspector.up_s = self.inspector.up_s, None
        for _ in range(self.rng.randint(1, 4)):
            await self.place.wait(self.rng.uniform(1, 20))
            if self._pods and verbs is WRITES:
                await self._arrive()
        faults_.calm()
        if up_s is not None and self.place.app is not None:
            self.inspector.up_s = self.place.clock.monotonic()

    async def _compact(self) -> None:
        self.place.world.cluster.compact()

    async def _cordon(self) -> None:
        nodes = self.place.world.cluster.snapshot("nodes")
        node = self.rng.choice(nodes)
        body = {"spec": {"unschedulable": not node["spec"].get("unschedulable", False)}}
        await self._insist(lambda: self.place.world.cluster.patch("nodes", "", node["metadata"]["name"], body))

    async def _node_dies(self) -> None:
        """Remove a node with its pods, and bring it back under its name."""
        cluster = self.place.world.cluster
        node = self.rng.choice(cluster.snapshot("nodes"))
        name = node["metadata"]["name"]
        await self._insist(lambda: cluster.delete("nodes", "", name))
        await self.place.wait(self.rng.uniform(0, 3))
        for pod in cluster.snapshot("pods"):
            if pod["spec"].get("nodeName") == name:
                meta = pod["metadata"]
                await self._insist(lambda meta=meta: cluster.delete("pods", meta["namespace"], meta["name"], grace_s=0))
        await self.place.wait(self.rng.uniform(0, 5))
        for pod in cluster.snapshot("pods"):
            if pod["spec"].get("nodeName") == name:  # bound meanwhile
                meta = pod["metadata"]
                await self._insist(lambda meta=meta: cluster.delete("pods", meta["namespace"], meta["name"], grace_s=0))
        fresh = {**node, "metadata": {key: node["metadata"][key] for key in ("name", "labels")}}
        await self._insist(lambda: cluster.create("nodes", "", fresh))
        status = {"status": node["status"]}
        await self._insist(lambda: cluster.patch("nodes", "", name, status, subresource="status"))

    async def _quota(self) -> None:
        name = self.rng.choice(("root", "team", "a", "b"))
        spec = {"nominal": {"gpu": self.rng.choice((0, 2, 4, 8, 16))}}
        self.queues[name] = {**self.queues[name], **spec}
        await self._insist(lambda: self.place.world.cluster.patch("queues", "", name, {"spec": spec}))

    async def _stop_queue(self) -> None:
        name = self.rng.choice(("a", "free"))
        stopped = self.queues[name]["stopped"] = not self.queues[name].get("stopped", False)
        await self._insist(lambda: self.place.world.cluster.patch("queues", "", name, {"spec": {"stopped": stopped}}))

    async def _be_killed(self) -> None:
        self._kill()

    async def _sleep(self) -> None:
        """Restart kube-scheduler, at once or after a while."""
        self._asleep = True
        self._restart.set()
        self.place.clock.call_later(self.rng.choice((0.0, 3.0, 30.0, 150.0)), self._wake)

    def _wake(self) -> None:
        self._asleep = False

    async def _slow(self) -> None:
        self.place.world.kube_scheduler._extender._latency_s = self.rng.choice((0.002, 0.1, 1.0, 2.5))

    async def _break_disk(self) -> None:
        """Let no commit succeed for a while, or none end."""
        if self.disk is not None:
            disk, how, lasts_s = self.disk, self.rng.choice(("broken", "hung")), self.rng.choice((1.0, 15.0, 65.0))
            setattr(disk, how, True)
            self.place.clock.call_later(lasts_s, lambda: setattr(disk, how, False))

    # the end

    async def _rest(self) -> None:
        """End all trouble; within ten minutes whoever can run does, and who waits has a reason that is true."""
        self._calm, self._asleep, self.deadly = True, False, 0.0
        place = self.place
        await self._clear()
        place.world.kube_scheduler._extender._latency_s = 0.002
        if self.disk is not None:
            self.disk.broken, self.disk.hung, self.disk.failing = False, False, 0.0
        for node in place.world.cluster.snapshot("nodes"):
            if node["spec"].get("unschedulable"):
                await place.world.cluster.patch(
                    "nodes", "", node["metadata"]["name"], {"spec": {"unschedulable": None}}
                )
        if place.app is None:
            await self._start()
        began_s, found = place.clock.monotonic(), ["not looked yet"]
        while found and place.clock.monotonic() - began_s < CALM_S:
            await place.wait(LOOK_S)
            found = unexplained(place, self.queues)
        require(not found, "liveness", found[:5])
        await self._settled()
        self.report.bound = len(place.bound())

    async def _settled(self) -> None:
        """Every record agrees: memory, ledger, cluster."""
        place = self.place
        verified = place.store.verify()
        require(verified.ok, "I5 the ledger", verified)
        for name in ("over_allocations", "slice_overlaps", "unannotated"):
            require(not getattr(place.witness, name), "I1 " + name, getattr(place.witness, name))
        drift, began_s = ["not looked yet"], place.clock.monotonic()
        while drift and place.clock.monotonic() - began_s < LATEST_S + 2 * LOOK_S:  # what failed is tried so late
            drift = [*await place.tessera.audit.look(), *self._unbooked()]
            if drift:
                await place.wait(LOOK_S)
        require(not drift, "audit", drift)
        stored = {row.id: row for row in place.store.load()[0].values()}
        for row in place.tessera.desk.book.live():
            require(stored.get(row.id) == row, "memory and ledger differ", (row, stored.get(row.id)))

    def _unbooked(self) -> list[str]:
        """Return the pods that run and are not booked, or the other way round."""
        rows = self.place.store.load()[0]
        live = {uid for uid, row in rows.items() if row.state in {State.BOUND, State.RUNNING}}
        return [
            f"{pod['metadata']['name']} runs and is not booked, or is booked and does not run"
            for pod in self.place.world.cluster.snapshot("pods")
            if ours(pod)
            and (bool(pod["spec"].get("nodeName")) and not terminal(pod)) != (pod["metadata"]["uid"] in live)
        ]

    async def _end(self) -> None:
        self._calm = True
        if self.place.world.cluster.faults is not None:
            self.place.world.cluster.faults.calm()
        if self.place.app is not None:
            self._kill()


def _planned(seed: int, rng: Random) -> Plan:
    nodes, pods = rng.randint(2, 5), rng.randint(12, 40)
    while True:
        try:
            return plan(nodes=nodes, pods=pods, seed=seed)
        except UnreachableError as error:
            pods = max(pods + 1, int(str(error).split()[-1]))


def play(seed: int, leave: frozenset[str] = frozenset()) -> Report:
    """Play one seed; a violation, or whatever broke, is told in the report."""
    report = Report(seed)
    loop = ShuffledLoop(Random(f"{seed}.order"))
    asyncio.set_event_loop(None)
    try:
        episode = Episode(seed, loop, report, leave)
        loop.run_until_complete(episode.play())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        report.violation = _told(error)
    finally:
        report.steps = loop.steps
        with contextlib.suppress(BaseException):
            report.looks = episode.inspector.looks
        _wind_up(loop)
    return report


def _told(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(one) for one in error.exceptions)
    return f"{type(error).__name__}: {error}"


def _wind_up(loop: ShuffledLoop) -> None:
    """End what is left and close the loop."""
    loop.between = bool
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        with contextlib.suppress(BaseException):
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()
