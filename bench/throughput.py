"""`bench throughput`: pods per second beside a plain kube-scheduler, all arms interleaved in one run.

Every pod is created beforehand under a gate of the driver's own. The clock runs from the first removal of that gate to
the last nodeName the driver's watch sees, so filter, ledger commit and Binding are all inside. Each arm starts a fresh
kube-scheduler; Tessera runs, as its own process on its own ledger, in its arms only.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.allocations import flaw, over_held, parsed
from bench.apiclient import STRATEGIC, ApiClient, ApiError
from bench.devices import GPU, SHARE
from bench.errors import BenchError
from bench.kube_objects import create_nodes, create_pods, gather_bounded, node_object, pod_object, pod_path
from bench.oracle import bound_to, demand
from bench.product import Product, ProductError
from bench.realcluster import TESSERA, RealCluster

Json = dict[str, Any]
Say = Callable[[str], None]

GATE = "bench.tessera.dev/hold"
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


ARMS = (
    Arm("tessera", tessera=True, percentage=None),
    Arm("plain", tessera=False, percentage=None),
    Arm("tessera_100", tessera=True, percentage=100),
    Arm("plain_100", tessera=False, percentage=100),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bench throughput` was asked; `pods` per arm and round."""

    nodes: int
    pods: int
    rounds: int


async def run_throughput(settings: Settings, say: Say) -> Json:
    """Run all arms and return the report.

    Raises:
        ThroughputError: the run could not be finished.
        UnavailableError: there is no real control plane on this machine.
    """
    async with RealCluster(audit_writes_of=TESSERA) as cluster, cluster.client() as api:
        nodes = [_node(number) for number in range(settings.nodes)]
        await create_nodes(api, nodes)
        say(f"{settings.nodes} nodes; {settings.rounds} rounds of {len(ARMS)} arms with {settings.pods} pods each")
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA))
        bench = _Bench(settings, cluster, api, product, {node["metadata"]["name"]: node for node in nodes}, say)
        try:
            for number in range(settings.rounds):
                for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
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


def _pods(prefix: str, count: int) -> list[Json]:
    made = []
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        requests = {"cpu": "1", "memory": "4Gi", **({GPU: str(size)} if size else {})}
        made.append(pod_object(f"{prefix}-{number:05}", requests=requests, gates=[GATE]))
    return made


@dataclass(slots=True)
class _Watch:
    """What the driver's own watch has seen: pods by name, when they were bound, and which are gone."""

    api: ApiClient
    bound_s: dict[str, float] = field(default_factory=dict)
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
                self.changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is so. Raises TimeoutError after five minutes."""
        async with asyncio.timeout(ARM_MAX_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


@dataclass(slots=True)
class _Bench:
    """The run: its parts and what was measured."""

    settings: Settings
    cluster: RealCluster
    api: ApiClient
    product: Product
    nodes: dict[str, Json]
    say: Say
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    writes: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    checked: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self, arm: Arm, number: int) -> None:
        """Run one arm of one round from its pods' creation to their end."""
        watch = _Watch(self.api)
        version = (await self.api.get(f"{PODS}?limit=1"))["metadata"]["resourceVersion"]
        following = asyncio.create_task(watch.follow(version))
        try:
            prefix = f"{arm.name.replace('_', '-')}-{number}"
            warm = await create_pods(self.api, _pods(f"{prefix}-warm", WARM))
            pods = await create_pods(self.api, _pods(prefix, self.settings.pods))
            if arm.tessera:
                await self.product.start()
            url = self.product.extender if arm.tessera else None
            await self.cluster.start_kube_scheduler(url, arm.percentage)
            await self._bind(warm, watch)
            written, spent_s = len(self._audited()), _cpu_s(self.product.pid) if arm.tessera else 0.0
            self.rates[arm.name].append(await self._bind(pods, watch))
            if arm.tessera:
                self._note(len(pods), _cpu_s(self.product.pid) - spent_s, self._audited()[written:])
            self._check(arm, [watch.there[pod["metadata"]["name"]] for pod in pods])
            self.say(f"{arm.name}: {self.rates[arm.name][-1]:.0f} pods/s")
        finally:
            await self._clear(watch)
            following.cancel()

    async def _bind(self, pods: Sequence[Json], watch: _Watch) -> float:
        """Let these pods go and return pods per second until the last is seen bound."""
        names = [pod["metadata"]["name"] for pod in pods]
        begun = time.monotonic()
        await gather_bounded([self._ungate(pod) for pod in pods], in_flight=IN_FLIGHT)
        await watch.until(lambda: len(watch.bound_s) >= len(names) and all(name in watch.bound_s for name in names))
        return len(names) / (max(watch.bound_s[name] for name in names) - begun)

    async def _ungate(self, pod: Json) -> Json:
        body = {"spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]}}
        return await self.api.patch(pod_path(pod), body, content_type=STRATEGIC)

    def _note(self, pods: int, spent_s: float, written: Sequence[str]) -> None:
        """Note what Tessera spent and wrote for so many pods."""
        self.cpu_ms.append(1000 * spent_s / pods)
        self.writes.append(len(written) / pods)
        self.say(f"Tessera spent {self.cpu_ms[-1]:.2f} ms of CPU a pod and wrote {dict(Counter(written))}")

    def _audited(self) -> list[str]:
        """Return Tessera's writes so far as `verb resource`; its Lease, which time renews and no pod, is left out."""
        found = []
        for line in self.cluster.audit_log.read_text().splitlines():
            event = json.loads(line)
            of = event["objectRef"]
            if of["resource"] != "leases":
                found.append(f"{event['verb']} {of['resource']}/{of.get('subresource', '')}".rstrip("/"))
        return found

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
        medians = {arm.name: round(statistics.median(self.rates[arm.name]), 1) for arm in ARMS}
        writes = round(statistics.mean(self.writes), 3)
        return {
            **medians,
            "ratio": round(medians["tessera"] / medians["plain"], 3),
            "ratio_100": round(medians["tessera_100"] / medians["plain_100"], 3),
            "api_writes_per_pod": writes,
            "tessera_cpu_ms_per_pod": round(statistics.median(self.cpu_ms), 2),
            "rounds": {name: [round(rate, 1) for rate in rates] for name, rates in self.rates.items()},
            "checked": self.checked,
            "wrong": self.wrong[:20],
            "notes": [
                "pods/s; the limit of a ratio is 1: the plain kube-scheduler of the same run",
                "inside the clock: removal of the gate, filter, ledger commit (SQLite, FULL), Binding; not creation",
                "writes are counted by kube-apiserver's audit log, without Events and the Lease",
            ],
            "seed": None,
            "ok": not self.wrong and writes == 1.0,
        }


def _cpu_s(pid: int) -> float:
    """Return the processor time that a process has used so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
