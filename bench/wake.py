"""`bench wake`: a full cluster, pods held in queues, running pods that end; how soon does the next one have its place?

Each queue has nodes of its own, so that whoever comes next when a pod ends is known from the published rules alone: a
model of the cluster is freed pod by pod and the oracle names the only one who may run. The clock runs from before the
status patch that ends a pod until the driver's watch shows the nodeName of that one. Invariant: what Tessera says of
itself is never used, and a pod that nobody expected to be bound fails the run.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.allocations import parsed
from bench.apiclient import STRATEGIC, ApiClient, ApiError
from bench.auditor import Audit, read_dump, write_dump
from bench.devices import GPU, MIG_DEVICES, SHARE
from bench.errors import BenchError
from bench.kube_objects import (
    binding_object,
    create_nodes,
    create_pods,
    gather_bounded,
    node_object,
    pod_object,
    pod_path,
    set_phase,
)
from bench.oracle import bound_to, observe
from bench.product import Product, ProductError
from bench.proxy import Proxy
from bench.queue_oracle import GATE, QUEUE, Rule, runnable
from bench.realcluster import TESSERA, RealCluster
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]

CLOCK = RealClock()
NAMESPACE = "default"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
POOL = "bench.tessera.dev/pool"
SLICE = "nvidia.com/mig-1g.10gb"
HIGH, FIRST_EVERY = "bench-high", 7  # every so many held pods have a higher priority than those before
GAP_S = 0.1  # between two ends, drawn around it
P99_MS = 1000.0
FILL_S, LAST_S = 180.0, 60.0
CHAINS = 20


class WakeError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One queue and the nodes that only its pods may use: what a pod asks, and how many fit on a node."""

    name: str
    asks: Mapping[str, str]
    fit: int
    labels: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


POOLS = (
    Pool("one", {GPU: "1"}, 8),
    Pool("two", {GPU: "2"}, 4),
    Pool("share", {SHARE: "1"}, 16, tokens={SHARE: "512"}, notes={"tessera.dev/gpu-milli": "500"}),
    Pool("slice", {SLICE: "1"}, 56, labels={MIG_DEVICES: "all"}, tokens={SLICE: "56"}),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bench wake` was asked: pods that wait, pods that end, the seed of which and when."""

    held: int
    freed: int
    seed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The cluster, the pods that fill it, those that wait, and how many of each pool are to end."""

    nodes: list[Json]
    runners: list[Json]
    waiters: list[Json]
    ends: Counter[str]


@dataclass(frozen=True, slots=True)
class End:
    """One pod that ended: its uid, and when its patch was sent, on the monotonic clock."""

    uid: str
    at_s: float


def plan(settings: Settings) -> Plan:
    """Return as many nodes of each pool as the pods that will end need, all full."""
    ends = Counter({pool.name: len(range(place, settings.freed, len(POOLS))) for place, pool in enumerate(POOLS)})
    nodes = [_node(pool, number) for pool in POOLS for number in range(max(1, -(-ends[pool.name] // pool.fit)))]
    pools = {pool.name: pool for pool in POOLS}
    runners = [
        _pod(pool, f"run-{pool.name}-{node['metadata']['name'][-2:]}-{number:02}")
        for node in nodes
        for pool in [pools[node["metadata"]["labels"][POOL]]]
        for number in range(pool.fit)
    ]
    waiters = [_pod(POOLS[number % len(POOLS)], f"wait-{number:05}") for number in range(settings.held)]
    for pod in waiters[FIRST_EVERY - 1 :: FIRST_EVERY]:
        pod["spec"]["priorityClassName"] = HIGH
    return Plan(nodes, runners, waiters, ends)


def _node(pool: Pool, number: int) -> Json:
    labels = {
        POOL: pool.name,
        "tessera.dev/mode": "exact",
        f"{GPU}.product": "NVIDIA-H100-80GB-HBM3",
        f"{GPU}.count": "8",
        f"{GPU}.memory": "81559",
        **pool.labels,
    }
    return node_object(f"{pool.name}-{number:02}", cpu="128", extended={GPU: "8", **pool.tokens}, labels=labels)


def _pod(pool: Pool, name: str) -> Json:
    requests = {"cpu": "1", "memory": "1Gi", **pool.asks}
    made = pod_object(name, requests=requests, labels={QUEUE: pool.name}, annotations=pool.notes, gates=[GATE])
    made["spec"]["nodeSelector"] = {POOL: pool.name}
    return made


def queues_text() -> str:
    """Return the queues' documents: one for each pool, without a limit."""
    documents = [
        {
            "apiVersion": "tessera.dev/v1alpha1",
            "kind": "Queue",
            "metadata": {"name": pool.name},
            "spec": {"namespaceSelector": {}},
        }
        for pool in POOLS
    ]
    return "\n---\n".join(json.dumps(one) for one in documents)


class Succession:
    """A model of the full cluster in which pods end one by one; the oracle says who comes next.

    Attributes:
        wrong: ends after which the rules name nobody, or more than one, and whoever could run before the first.
    """

    def __init__(self, nodes: Sequence[Json], pods: Sequence[Json]) -> None:
        """Take the objects as the API server has them before the first pod ends."""
        self._nodes = {pool.name: [one for one in nodes if _pool(one) == pool.name] for pool in POOLS}
        self._pods = {pool.name: {p["metadata"]["uid"]: p for p in pods if _pool(p) == pool.name} for pool in POOLS}
        self._held = parsed(list(pods))
        self._rules = {name: Rule({n["metadata"]["name"]: n for n in some}) for name, some in self._nodes.items()}
        self._of = {pod["metadata"]["uid"]: _pool(pod) for pod in pods}
        self.wrong = [f"{uid} could run before a pod ended" for pool in POOLS for uid in self._able(pool.name)]

    def next(self, uid: str) -> str:
        """Let a pod end, and return who has its place then; empty = the rules do not name one."""
        pool = self._of[uid]
        pods = self._pods[pool]
        ended = pods[uid]
        pods[uid] = {**ended, "status": {"phase": "Succeeded"}}
        able = self._able(pool)
        if len(able) != 1:
            self.wrong.append(f"after the end of {ended['metadata']['name']} the rules let {len(able)} pods run")
            return ""
        heir = pods[able[0]]
        spec = {key: value for key, value in heir["spec"].items() if key != "schedulingGates"}
        pods[able[0]] = {**heir, "spec": {**spec, "nodeName": bound_to(ended)}}
        self._held[able[0]] = self._held.pop(uid)
        return able[0]

    def _able(self, pool: str) -> list[str]:
        pods = list(self._pods[pool].values())
        return list(runnable(pods, observe(self._nodes[pool], pods, self._held), self._rules[pool], self._held))


def _pool(thing: Json) -> str:
    labels = thing["metadata"]["labels"]
    return str(labels.get(POOL) or labels[QUEUE])


def waits_ms(
    ends: Sequence[End], succession: Succession, bound_s: Mapping[str, float], names: Mapping[str, str]
) -> tuple[list[float], list[str]]:
    """Return how long each place stayed empty, in milliseconds, and what was wrong.

    Args:
        ends: the pods that ended, in order.
        succession: the model, before any of them ended.
        bound_s: when waiting pods were seen bound, by uid, on the monotonic clock.
        names: of all pods, by uid.
    """
    waits, heirs, wrong = list[float](), set[str](), list[str]()
    for end in ends:
        heir = succession.next(end.uid)
        if not heir:
            continue
        heirs.add(heir)
        if heir in bound_s:
            waits.append(1000 * (bound_s[heir] - end.at_s))
        else:
            wrong.append(f"{names[heir]} was never bound, though {names[end.uid]} had ended")
    wrong += [f"{names[uid]} was bound and it was not its turn" for uid in sorted(bound_s.keys() - heirs)]
    wrong += [f"a place was taken {-one:.0f} ms before it was free" for one in waits if one < 0]
    return waits, [*succession.wrong, *wrong]


async def run_wake(settings: Settings, say: Say) -> Json:
    """Run it and return the report.

    Raises:
        WakeError: the run could not be finished.
        UnavailableError: there is no real control plane on this machine.
    """
    begun = time.monotonic()
    async with RealCluster() as cluster, cluster.client() as api, Proxy() as extender:
        queues = cluster.folder / "queues.yaml"
        queues.write_text(queues_text())
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA), flags=[f"--queues={queues}"])
        bench = _Bench(settings, plan(settings), cluster, api, extender, product, say)
        try:
            report = await bench.everything()
        except (ProductError, ApiError, TimeoutError) as error:
            raise WakeError(str(error) or "the cluster was not full in time") from error
        finally:
            await product.kill()
    return {**report, "seconds": round(time.monotonic() - begun, 1)}


@dataclass(slots=True)
class _Bench:
    """The run on parts that are open; what the driver's own watch has seen is by uid."""

    settings: Settings
    plan: Plan
    cluster: RealCluster
    api: ApiClient
    extender: Proxy
    product: Product
    say: Say
    pods: dict[str, Json] = field(default_factory=dict)
    bound_s: dict[str, float] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def everything(self) -> Json:
        version = (await self.api.get(f"{PODS}?limit=1"))["metadata"]["resourceVersion"]
        following = asyncio.create_task(self._follow(version))
        try:
            limit_ms = await self._chains()
            nodes = await self._fill()
            ends = await self._end()
            return await self._report(nodes, ends, limit_ms)
        finally:
            following.cancel()

    async def _follow(self, version: str) -> None:
        while True:
            async for event in self.api.watch(PODS, version):
                pod = event["object"]
                version, uid = pod["metadata"]["resourceVersion"], pod["metadata"]["uid"]
                self.pods[uid] = pod
                if bound_to(pod):
                    self.bound_s.setdefault(uid, time.monotonic())
                self.changed.set()

    async def _until(self, holds: Callable[[], bool], within_s: float) -> bool:
        """Wait until something is so, and say whether it came to be."""
        try:
            async with asyncio.timeout(within_s):
                while not holds():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            return False
        return True

    async def _chains(self) -> float:
        """Return the median of what cannot be less: the same four writes in a row, without anybody who decides."""
        await create_nodes(self.api, [node_object("idle")])
        took = []
        for number in range(CHAINS):
            old = pod_object(f"old-{number}", scheduler="nobody")
            old["spec"]["nodeName"] = "idle"
            new = pod_object(f"new-{number}", scheduler="nobody", gates=[GATE])
            ending, coming = await create_pods(self.api, [old, new])
            gone, uid = ending["metadata"]["uid"], coming["metadata"]["uid"]
            begun = time.monotonic()
            await set_phase(self.api, ending, "Succeeded")
            await self._until(lambda gone=gone: _ended(self.pods.get(gone)), FILL_S)  # type: ignore[misc]
            await self.api.patch(pod_path(coming, "status"), {"status": {"nominatedNodeName": "idle"}})
            body = {"spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]}}
            await self.api.patch(pod_path(coming), body, content_type=STRATEGIC)
            await self.api.post(pod_path(coming, "binding"), binding_object(coming, "idle"))
            await self._until(lambda uid=uid: uid in self.bound_s, FILL_S)  # type: ignore[misc]
            took.append(1000 * (time.monotonic() - begun))
        await self.api.delete(PODS, {"gracePeriodSeconds": 0})
        await self.api.delete("/api/v1/nodes/idle")
        self.pods.clear()
        self.bound_s.clear()
        return float(np.median(took))

    async def _fill(self) -> list[Json]:
        """Fill the cluster, line up who waits, and return the nodes."""
        high = {"metadata": {"name": HIGH}, "value": 1000}
        await self.api.post("/apis/scheduling.k8s.io/v1/priorityclasses", high)
        nodes = await create_nodes(self.api, self.plan.nodes)
        await self.product.start()
        self.extender.upstream = self.product.extender
        await self.cluster.start_kube_scheduler(self.extender.url)
        runners = await create_pods(self.api, self.plan.runners)
        if not await self._until(lambda: len(self.bound_s) >= len(runners), FILL_S):
            raise WakeError(f"only {len(self.bound_s)} of {len(runners)} pods were bound in {FILL_S:.0f} s")
        await gather_bounded([set_phase(self.api, pod, "Running") for pod in runners])
        await create_pods(self.api, self.plan.waiters)
        await self._until(lambda: len(self.pods) == len(runners) + len(self.plan.waiters), FILL_S)
        await CLOCK.sleep(2.0)  # everybody has been looked at, in vain
        self.product.check()
        self.say(f"{len(runners)} pods run on {len(nodes)} full nodes, {len(self.plan.waiters)} are held")
        return nodes

    async def _end(self) -> list[End]:
        """Let pods end one after the other, whether or not the places before are taken again."""
        rng = Random(self.settings.seed)
        chosen: list[Json] = []
        for name, count in self.plan.ends.items():
            chosen += rng.sample([pod for pod in self.pods.values() if _pool(pod) == name and bound_to(pod)], count)
        rng.shuffle(chosen)
        ends, writes = list[End](), list[asyncio.Task[Json]]()
        for pod in chosen:
            ends.append(End(pod["metadata"]["uid"], time.monotonic()))
            writes.append(asyncio.create_task(set_phase(self.api, pod, "Succeeded")))
            await CLOCK.sleep(rng.uniform(0.5, 1.5) * GAP_S)
        await asyncio.gather(*writes)
        ran = len(self.plan.runners)
        await self._until(lambda: len(self.bound_s) - ran >= len(ends), LAST_S)
        await CLOCK.sleep(1.0)  # one too many would show itself now
        self.say(f"{len(ends)} pods ended, {len(self.bound_s) - ran} took their places")
        return ends

    async def _report(self, nodes: list[Json], ends: Sequence[End], limit_ms: float) -> Json:
        """Compare with the oracle and return the bench's keys."""
        before = [self._before(pod) for pod in self.pods.values()]
        names = {uid: str(pod["metadata"]["name"]) for uid, pod in self.pods.items()}
        heirs_s = {uid: at_s for uid, at_s in self.bound_s.items() if names[uid].startswith("wait-")}
        still = {uid for uid in self.pods if uid not in self.bound_s}
        calls = sum(call["verb"] == "filter" and call["uid"] in still for call in self.extender.calls)
        audit = await self._audited(self.cluster.folder / "dump")
        self.say("comparing with the oracle")
        waits, wrong = waits_ms(ends, Succession(nodes, before), heirs_s, names)
        wrong += [] if audit.report()["journal_ok"] else ["the journal's chain is broken"]
        wrong += [text for told in audit.findings.values() for text in told.values()]
        p50, p99 = (round(float(np.percentile(waits or [float("inf")], at)), 1) for at in (50, 99))
        return {
            "filter_calls": calls,
            "freed_to_bound_ms_p50": p50 if waits else None,
            "freed_to_bound_ms_p99": p99 if waits else None,
            "freed_to_bound_ms_max": round(max(waits), 1) if waits else None,
            "limit_ms_p50": round(limit_ms, 1),
            "held": len(still),
            "freed": len(ends),
            "checked": len(ends) + len(still) + audit.checked,
            "wrong": wrong[:20],
            "notes": ["limit: the same four API writes in a row, without kube-scheduler, ledger and decision"],
            "seed": self.settings.seed,
            "ok": not wrong and calls == 0 and len(waits) == self.settings.freed and p99 <= P99_MS,
        }

    def _before(self, pod: Json) -> Json:
        """Return a pod as it was before the first one ended."""
        if pod["metadata"]["name"].startswith("run-"):
            return {**pod, "status": {**pod["status"], "phase": "Running"}}
        spec = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
        return {**pod, "spec": {**spec, "schedulingGates": [{"name": GATE}]}, "status": {"phase": "Pending"}}

    async def _audited(self, folder: Path) -> Audit:
        """End Tessera and let the auditor look at everything at the end."""
        nodes, pods = await self.api.get("/api/v1/nodes"), await self.api.get(PODS)
        run = {"seed": self.settings.seed, "pods": len(self.pods), "exit_status": await self.product.stop()}
        write_dump(folder, nodes, pods, calls=self.extender.calls, run=run, queues=queues_text())
        await self.product.export_journal(folder / "journal.jsonl")
        return Audit(read_dump(folder))


def _ended(pod: Json | None) -> bool:
    return pod is not None and pod["status"].get("phase") == "Succeeded"


def show(report: Json) -> None:
    """Print the table for people to stderr."""
    table = Table("held", "freed", "/filter for held pods", "freed to bound p50", "p99", "most", "limit")
    figures = [report[f"freed_to_bound_ms_{key}"] for key in ("p50", "p99", "max")]
    texts = ["-" if value is None else f"{value:.0f} ms" for value in [*figures, report["limit_ms_p50"]]]
    table.add_row(str(report["held"]), str(report["freed"]), str(report["filter_calls"]), *texts)
    console = Console(stderr=True)
    console.print(table)
    console.print("limit: the same four API writes in a row, without kube-scheduler, ledger and decision.")
