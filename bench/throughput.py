"""`bench throughput`: pods per second beside a plain kube-scheduler, all arms interleaved in one run.

Every pod is created beforehand under a gate of the driver's own. Direct way, and without Tessera: the clock runs from
the first removal of that gate to the last nodeName the driver's watch sees. Queue way: pods have Tessera's gate too and
their queue is stopped, the driver's gate goes before the clock, and the clock runs from the first reservation that
follows the start of the queue; so in every arm one removal of a gate per pod is inside, with filter, ledger commits and
Binding. Each arm starts a fresh kube-scheduler; Tessera runs, as its own process, in its arms only.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.allocations import flaw, over_held, parsed
from bench.apiclient import STRATEGIC, ApiClient, ApiError
from bench.devices import GPU, SHARE
from bench.errors import BenchError
from bench.kube_objects import (
    binding_object,
    create_nodes,
    create_pods,
    gather_bounded,
    node_object,
    pod_object,
    pod_path,
)
from bench.oracle import bound_to, demand
from bench.product import Product, ProductError
from bench.queue_oracle import GATE as HOLD
from bench.queue_oracle import QUEUE as LABEL
from bench.realcluster import TESSERA, RealCluster
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]
CLOCK = RealClock()

GATE = "bench.tessera.dev/hold"
QUEUE = "throughput"
QUEUES = "/apis/tessera.dev/v1alpha1/queues"
IN_FLIGHT = 24
WARM = 16
GPUS = 8
SIZES = (1, 1, 2, 1, 4, 0)  # GPUs of the pods, in turn
ARM_MAX_S = 300.0
NAMESPACE = "default"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class ThroughputError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant: with Tessera or without, and kube-scheduler's percentageOfNodesToScore (None = its default)."""

    name: str
    tessera: bool
    percentage: int | None


PLAIN = Arm("plain", tessera=False, percentage=None)
PLAIN_100 = Arm("plain_100", tessera=False, percentage=100)
TESSERA_100 = Arm("tessera_100", tessera=True, percentage=100)
ARMS = {
    "direct": (Arm("tessera", tessera=True, percentage=None), PLAIN, TESSERA_100, PLAIN_100),
    "queue": (TESSERA_100, PLAIN, PLAIN_100),
}
"""The contestants by way of the pods; in the queue way Tessera always looks at all nodes."""
REFUSED, FIRST_ERROR, REFUSED_MAX = "refused ", 400, 0.1
BINDING = "create pods/binding"
NOTED_S = 5.0
WRITES = {"direct": 1.0, "queue": 3.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bench throughput` was asked; `pods` per arm and round, `way` direct or queue."""

    nodes: int
    pods: int
    rounds: int
    way: str = "direct"

    @property
    def held(self) -> bool:
        """Pods of Tessera's arms wait in a queue."""
        return self.way == "queue"


async def run_throughput(settings: Settings, say: Say) -> Json:
    """Run all arms and return the report.

    Raises:
        ThroughputError: the run could not be finished.
        UnavailableError: there is no real control plane on this machine.
    """
    async with RealCluster(audit_writes_of=TESSERA) as cluster, cluster.client() as api:
        nodes = [_node(number) for number in range(settings.nodes)]
        await create_nodes(api, nodes)
        arms = ARMS[settings.way]
        say(f"{settings.nodes} nodes; {settings.rounds} rounds of {len(arms)} arms with {settings.pods} pods each")
        if settings.held:
            await api.post(QUEUES, _queue())
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA))
        bench = _Bench(settings, cluster, api, product, {node["metadata"]["name"]: node for node in nodes}, say)
        try:
            for number in range(settings.rounds):
                await bench.write_alone(number)
                for arm in arms if number % 2 == 0 else arms[::-1]:
                    await bench.run(arm, number)
        except (ProductError, ApiError, TimeoutError) as error:
            raise ThroughputError(str(error) or "pods were not bound in time") from error
        finally:
            await product.kill()
    return bench.report()


def _node(number: int) -> Json:
    labels = {
        "tessera.dev/mode": "exact",
        f"{GPU}.product": "NVIDIA-H100-80GB-HBM3",
        f"{GPU}.count": str(GPUS),
        f"{GPU}.memory": "81559",
    }
    extended = {GPU: str(GPUS), SHARE: str(64 * GPUS)}
    return node_object(f"node-{number:05}", cpu="128", memory="1Ti", extended=extended, labels=labels)


def _queue() -> Json:
    """Return the queue in which the pods of an arm wait for the clock."""
    spec = {"namespaceSelector": {}, "stopped": True}
    return {"apiVersion": "tessera.dev/v1alpha1", "kind": "Queue", "metadata": {"name": QUEUE}, "spec": spec}


def pods_of(prefix: str, count: int, *, held: bool = False, queue: str = "") -> list[Json]:
    """Return pods of mixed sizes under the driver's gate, and under Tessera's too where they are held."""
    made = []
    gates, labels = [GATE, HOLD] if held else [GATE], {LABEL: queue} if queue else {}
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        requests = {"cpu": "1", "memory": "4Gi", **({GPU: str(size)} if size else {})}
        made.append(pod_object(f"{prefix}-{number:05}", requests=requests, labels=labels, gates=gates))
    return made


def written_as(event: Json) -> str:
    """Return an audit event as `verb resource`, marked where the API server refused it."""
    of = event["objectRef"]
    refused = event["responseStatus"]["code"] >= FIRST_ERROR
    return f"{REFUSED if refused else ''}{event['verb']} {of['resource']}/{of.get('subresource', '')}".rstrip("/")


def concerns(event: Json, names: Container[str], before: Container[str]) -> bool:
    """Say whether a write counts: to one of these pods, or to something that is no pod and not before.

    The Lease, which time renews and no pod, is left out.
    """
    of = event["objectRef"]
    if of["resource"] == "pods":
        return of["name"] in names
    return of["resource"] != "leases" and event["auditID"] not in before


def first_reservation_s(lines: Iterable[Json], names: Collection[str]) -> float:
    """Return when the first of these pods was reserved, in seconds of wall time.

    Raises:
        ThroughputError: none was.
    """
    found = [line["at"] for line in lines if line.get("event") == "reserve" and line.get("name") in names]
    if not found:
        raise ThroughputError("the journal tells of no reservation")
    return float(min(found)) / 1_000_000


@dataclass(slots=True)
class _Watch:
    """What the driver's own watch has seen: pods by name, when they were bound, and which are gone."""

    api: ApiClient
    bound_s: dict[str, float] = field(default_factory=dict)
    nominated_s: dict[str, float] = field(default_factory=dict)
    there: dict[str, Json] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, version: str) -> None:
        """Watch until cancelled."""
        while True:
            async for event in self.api.watch(PODS, version):
                pod = event["object"]
                version, name = pod["metadata"]["resourceVersion"], pod["metadata"]["name"]
                if event["type"] == "DELETED":
                    self.there.pop(name, None)
                else:
                    self.there[name] = pod
                    if bound_to(pod):
                        self.bound_s.setdefault(name, time.monotonic())
                    if (pod.get("status") or {}).get("nominatedNodeName"):
                        self.nominated_s.setdefault(name, time.monotonic())
                self.changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is so. Raises TimeoutError after five minutes."""
        async with asyncio.timeout(ARM_MAX_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


@dataclass(slots=True)
class _Bench:
    """The run: its parts and what was measured; `kinds` counts Tessera's writes as `verb resource`."""

    settings: Settings
    cluster: RealCluster
    api: ApiClient
    product: Product
    nodes: dict[str, Json]
    say: Say
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    limits: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    cpu_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    checked: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self, arm: Arm, number: int) -> None:
        """Run one arm of one round from its pods' creation to their end."""
        watch = _Watch(self.api)
        version = (await self.api.get(f"{PODS}?limit=1"))["metadata"]["resourceVersion"]
        following = asyncio.create_task(watch.follow(version))
        try:
            held = arm.tessera and self.settings.held
            prefix = f"{arm.name.replace('_', '-')}-{number}"
            warm = await create_pods(self.api, pods_of(f"{prefix}-warm", WARM, held=held))
            wanted = pods_of(prefix, self.settings.pods, held=held, queue=QUEUE if held else "")
            pods = await create_pods(self.api, wanted)
            if arm.tessera:
                await self.product.start()
            url = self.product.extender if arm.tessera else None
            await self.cluster.start_kube_scheduler(url, arm.percentage)
            if held:
                await self._ungate(pods)
            await self._bind(warm, watch)
            spent_s = self._spent_s() if arm.tessera else {}
            before = {event["auditID"] for event in self._events()}
            self.rates[arm.name].append(await (self._admit(pods, watch) if held else self._bind(pods, watch)))
            if arm.tessera:
                spent_s = {name: at_s - spent_s[name] for name, at_s in self._spent_s().items()}
                self._note(len(pods), spent_s, await self._written(pods, before))
            self._check(arm, [watch.there[pod["metadata"]["name"]] for pod in pods])
            self.say(f"{arm.name}: {self.rates[arm.name][-1]:.0f} pods/s")
        finally:
            await self._clear(watch)
            following.cancel()

    async def write_alone(self, number: int) -> None:
        """Measure the limit: the driver itself does the writes of a pod, and nobody filters, decides or commits."""
        pods = await create_pods(self.api, pods_of(f"alone-{number}", self.settings.pods))
        places = list(self.nodes)
        begun = time.monotonic()
        writes = [self._write_one(pod, places[at % len(places)]) for at, pod in enumerate(pods)]
        await gather_bounded(writes, in_flight=IN_FLIGHT)
        self.limits.append(len(pods) / (time.monotonic() - begun))
        await self.api.delete(PODS, {"gracePeriodSeconds": 0})
        self.say(f"writes alone: {self.limits[-1]:.0f} pods/s")

    async def _write_one(self, pod: Json, node: str) -> None:
        if self.settings.held:
            await self.api.patch(pod_path(pod, "status"), {"status": {"nominatedNodeName": node}})
        await self._ungate([pod])
        await self.api.post(pod_path(pod, "binding"), binding_object(pod, node))

    async def _bind(self, pods: Sequence[Json], watch: _Watch) -> float:
        """Let these pods go and return pods per second until the last is seen bound."""
        begun = time.monotonic()
        await self._ungate(pods)
        return len(pods) / (await self._last_s(pods, watch) - begun)

    async def _admit(self, pods: Sequence[Json], watch: _Watch) -> float:
        """Start the queue and return pods per second from the first reservation until the last is seen bound."""
        asked, ahead_s = time.monotonic(), time.time() - time.monotonic()
        await self._stop_queue(stopped=False)
        last_s = await self._last_s(pods, watch)
        await self._stop_queue(stopped=True)
        names = {pod["metadata"]["name"] for pod in pods}
        journal = self.cluster.folder / "journal.jsonl"
        await self.product.export_journal(journal)
        lines = map(json.loads, journal.read_text().splitlines())
        first_s = first_reservation_s(lines, names) - ahead_s
        seen_s = min((at_s for name, at_s in watch.nominated_s.items() if name in names), default=0.0)
        if not asked <= first_s <= seen_s:
            raise ThroughputError("the journal's first reservation is not between the queue's start and a nomination")
        return len(pods) / (last_s - first_s)

    async def _stop_queue(self, *, stopped: bool) -> None:
        await self.api.patch(f"{QUEUES}/{QUEUE}", {"spec": {"stopped": stopped}})

    async def _last_s(self, pods: Sequence[Json], watch: _Watch) -> float:
        """Return when the last of these pods was seen bound."""
        names = [pod["metadata"]["name"] for pod in pods]
        await watch.until(lambda: len(watch.bound_s) >= len(names) and all(name in watch.bound_s for name in names))
        return max(watch.bound_s[name] for name in names)

    async def _ungate(self, pods: Sequence[Json]) -> None:
        """Take the driver's own gate away."""
        body = {"spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]}}
        patches = [self.api.patch(pod_path(pod), body, content_type=STRATEGIC) for pod in pods]
        await gather_bounded(patches, in_flight=IN_FLIGHT)

    def _spent_s(self) -> dict[str, float]:
        """Return the processor time that each program has used so far."""
        cluster = self.cluster
        running = (cluster.etcd, cluster.api_server, cluster.kube_scheduler)
        pids = {child.name: child.pid for child in running if child} | {"driver": os.getpid()}
        return {name: _cpu_s(pid) for name, pid in {TESSERA: self.product.pid, **pids}.items()}

    def _note(self, pods: int, spent_s: Mapping[str, float], written: Sequence[str]) -> None:
        """Note what was spent and written for so many pods; what the API server refused wrote nothing."""
        for name, at_s in spent_s.items():
            self.cpu_ms[name].append(1000 * at_s / pods)
        done = [what for what in written if not what.startswith(REFUSED)]
        self.writes.append(len(done) / pods)
        self.refused.append((len(written) - len(done)) / pods)
        self.kinds.update(written)
        self.say(f"Tessera spent {self.cpu_ms[TESSERA][-1]:.2f} ms of CPU a pod and wrote {dict(Counter(written))}")

    def _events(self) -> list[Json]:
        """Return what kube-apiserver has noted of Tessera's writes so far."""
        return [json.loads(line) for line in self.cluster.audit_log.read_text().splitlines()]

    async def _written(self, pods: Sequence[Json], before: Container[str]) -> list[str]:
        """Return Tessera's writes to these pods, and to other things since; an answer may come before its note."""
        names = {pod["metadata"]["name"] for pod in pods}
        deadline = time.monotonic() + NOTED_S
        while True:
            found = [written_as(event) for event in self._events() if concerns(event, names, before)]
            if found.count(BINDING) >= len(names) or time.monotonic() > deadline:
                return found
            await CLOCK.sleep(NOTED_S / 10)

    def _check(self, arm: Arm, pods: Sequence[Json]) -> None:
        """Compare every answer with the oracle: no GPU twice, and in Tessera's arms the right devices in writing."""
        self.checked += len(pods)
        on_node: dict[str, list[Json]] = defaultdict(list)
        for pod in pods:
            on_node[bound_to(pod)].append(pod)
        for name, here in on_node.items():
            node = self.nodes[name]
            if sum(demand(pod)[GPU] for pod in here) > GPUS:
                self.wrong.append(f"{arm.name}: more than {GPUS} GPUs of {name}")
            if arm.tessera:
                self.wrong += [f"{arm.name}: {fault}" for fault in self._faults(node, here)]

    def _faults(self, node: Json, pods: Sequence[Json]) -> Iterator[str]:
        for pod in pods:
            if wrong := flaw(pod, node):
                yield f"{pod['metadata']['name']} {wrong}"
        for what, sentence in over_held(node, parsed(list(pods))):
            yield f"{node['metadata']['name']} {what} {sentence}"

    async def _clear(self, watch: _Watch) -> None:
        """Stop kube-scheduler, remove the pods, and stop Tessera once it has seen them go."""
        await self.cluster.stop_kube_scheduler()
        await self.api.delete(PODS, {"gracePeriodSeconds": 0})
        await watch.until(lambda: not watch.there)
        await self.product.stop()

    def report(self) -> Json:
        """Return the bench's keys."""
        medians = {arm.name: statistics.median(self.rates[arm.name]) for arm in ARMS[self.settings.way]}
        medians.setdefault("tessera", medians[TESSERA_100.name])
        cpu_ms = {name: round(statistics.median(spent), 2) for name, spent in self.cpu_ms.items()}
        held, refused = self.settings.held, statistics.mean(self.refused)
        writes = round(statistics.mean(self.writes), 1 if held else 3)  # a queue's status is written now and then
        return {
            **{name: round(rate, 1) for name, rate in medians.items()},
            "ratio": round(medians["tessera"] / medians["plain"], 3),
            "ratio_100": round(medians["tessera_100"] / medians["plain_100"], 3),
            "limit": round(statistics.median(self.limits), 1),
            "api_writes_per_pod": writes,
            "refused_writes_per_pod": round(refused, 3),
            "writes": dict(sorted(self.kinds.items())),
            "tessera_cpu_ms_per_pod": cpu_ms[TESSERA],
            "cpu_ms_per_pod": cpu_ms,
            "rounds": {name: [round(rate, 1) for rate in rates] for name, rates in self.rates.items()},
            "checked": self.checked,
            "wrong": self.wrong[:20],
            "notes": [
                "pods/s; limit: the writes of a pod alone, by the driver, without filter, decision and commit",
                "inside the clock: removal of a gate, filter, ledger commits (SQLite, FULL), Binding; not creation",
                "writes are counted by kube-apiserver's audit log, without Events and the Lease; refused ones apart",
                *(["tessera is tessera_100: the queue way looks at all nodes"] if held else []),
            ],
            "seed": None,
            "ok": not self.wrong and writes == WRITES[self.settings.way] and refused <= REFUSED_MAX,
        }


def _cpu_s(pid: int) -> float:
    """Return the processor time that a process has used so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(report: Json) -> None:
    """Print the table for people to stderr."""
    console, table = Console(stderr=True), Table("arm", "pods/s", "over plain", "over plain, all nodes", "limit")
    for name in ("tessera", "tessera_100", "plain", "plain_100"):
        over = [f"{report[name] / report[plain]:.2f}" for plain in ("plain", "plain_100")]
        table.add_row(name, f"{report[name]:.0f}", *over, f"{report['limit']:.0f}")
    console.print(table)
    spent = ", ".join(f"{name} {one}" for name, one in report["cpu_ms_per_pod"].items())
    console.print(f"processor time a pod in Tessera's arms, milliseconds: {spent}", highlight=False)
    for note in [*report["notes"], f"writes: {report['api_writes_per_pod']} a pod, in all {report['writes']}"]:
        console.print(note, highlight=False)
