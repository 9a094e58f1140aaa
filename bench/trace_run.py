"""`bench cluster --trace`: a trace's pods on a real control plane; they stay, and whoever is refused is deleted.

Pods are created in the order of their arrival, a bounded number of them undecided at a time. Direct way: kube-scheduler
takes them in the same order, and each counts as placed or refused by what the API server said of it first. Queue way:
they come held, Tessera's list of requests tells of whom a turn found no node, and such a pod is deleted unless anything
has been written to it since it came.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.apiclient import ApiClient, ApiError
from bench.auditor import ZERO, audit
from bench.errors import BenchError
from bench.kube_objects import create_nodes, delete_pod, pod_path
from bench.oracle import bound_to
from bench.product import Product, ProductError
from bench.queue_oracle import GATE
from bench.realcluster import TESSERA, RealCluster
from bench.trace import Task, Trace, arrivals, at, load, node_of, pod_of
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]

CLOCK = RealClock()
NAMESPACE = "default"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
UNDECIDED_MAX = 32
STUCK_S = 60.0
SAY_EVERY = 1000
LOOK_S = 0.05
WAITING = f"/api/v1/requests?state=QUEUED&namespace={NAMESPACE}&limit={UNDECIDED_MAX}"
NO_NODE = frozenset({"WaitingForCapacity", "ExceedsNodeSize", "NoSuchGpuModel", "ExceedsGpuMemory", "NoMatchingNode"})
"""Reasons of a request that had its turn while nobody stood before it, and found no node."""
CHANGED = 409


class TraceRunError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked.

    Attributes:
        trace: such as `openb:default`.
        folder: where traces lie; None takes the built-in stand-in.
        seed: of the arrivals.
        dump: folder for the dump; it is made when absent.
        most: arrivals at most; 0 = all.
        held: pods are created under Tessera's gate.
    """

    trace: str
    folder: Path | None
    seed: int
    dump: Path
    most: int = 0
    held: bool = False


async def run_trace(settings: Settings, say: Say) -> Json:
    """Run a trace and return the report.

    Raises:
        TraceRunError: the run could not be finished.
        TraceError: there is no such trace.
        UnavailableError: there is no real control plane on this machine.
    """
    trace = load(settings.trace, settings.folder)
    tasks = arrivals(trace, settings.seed)[: settings.most or None]
    settings.dump.mkdir(parents=True, exist_ok=True)
    say(f"{trace.source}: {len(tasks)} pods on {len(trace.machines)} nodes")
    begun = time.monotonic()
    async with RealCluster() as cluster, cluster.client() as api:
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA))
        run = _Run(api, tasks, product, say, cluster.ca_file, held=settings.held)
        try:
            await create_nodes(api, [node_of(machine) for machine in trace.machines])
            await product.start()
            await cluster.start_kube_scheduler(product.extender)
            await run.play()
            await run.dump(settings)
        except (ProductError, ApiError, TimeoutError) as error:
            raise TraceRunError(str(error) or f"no pod was decided for {STUCK_S:.0f} s") from error
        finally:
            await product.kill()
    say("auditing")
    report = await asyncio.to_thread(_report, settings, trace, run)
    return {**report, "seconds": round(time.monotonic() - begun, 1)}


@dataclass(slots=True)
class _Run:
    """Arrivals and what became of each."""

    api: ApiClient
    tasks: list[Task]
    product: Product
    say: Say
    ca_file: Path
    held: bool
    waiting: dict[str, Json] = field(default_factory=dict)  # held pods that are not decided, as they were created
    placed: dict[str, bool] = field(default_factory=dict)  # by name; False = refused
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    created: int = 0

    async def play(self) -> None:
        """Create all pods and wait until each is decided and each refused one is deleted."""
        version = (await self.api.get(f"{PODS}?limit=1"))["metadata"]["resourceVersion"]
        refused: asyncio.Queue[Json] = asyncio.Queue()
        dropping = self._drop() if self.held else self._delete(refused)
        helpers = [asyncio.create_task(self._follow(version, refused)), asyncio.create_task(dropping)]
        try:
            for number, task in enumerate(self.tasks, start=1):
                await self._until(UNDECIDED_MAX - 1)
                await self._create(pod_of(task, f"pod-{number:05}"))
                self.created = number
                if number % SAY_EVERY == 0:
                    self.product.check()
                    self.say(f"{number} pods came, {sum(self.placed.values())} placed")
            await self._until(0)
            await refused.join()
        finally:
            for helper in helpers:
                helper.cancel()

    async def _create(self, pod: Json) -> None:
        if self.held:
            pod["spec"]["schedulingGates"] = [{"name": GATE}]
        made = await self.api.post(PODS, pod)
        if self.held:
            self.waiting[made["metadata"]["name"]] = made

    async def _until(self, undecided: int) -> None:
        """Wait until no more pods than this are undecided. Raises TimeoutError when nothing happens for a minute."""
        while self.created - len(self.placed) > undecided:
            self.changed.clear()
            async with asyncio.timeout(STUCK_S):
                await self.changed.wait()

    async def _follow(self, version: str, refused: asyncio.Queue[Json]) -> None:
        while True:
            async for event in self.api.watch(PODS, version):
                pod = event["object"]
                version, name = pod["metadata"]["resourceVersion"], pod["metadata"]["name"]
                if name in self.placed:
                    continue
                if bound_to(pod):
                    self.placed[name] = True
                    self.waiting.pop(name, None)
                elif _unschedulable(pod) and not self.held:
                    self.placed[name] = False
                    refused.put_nowait(pod)
                else:
                    continue
                self.changed.set()

    async def _delete(self, refused: asyncio.Queue[Json]) -> None:
        while True:
            pod = await refused.get()
            await delete_pod(self.api, pod)
            refused.task_done()

    async def _drop(self) -> None:
        """Delete held pods for which a turn found no node."""
        async with ApiClient(self.product.api, "", self.ca_file) as people:
            while True:
                listed = (await people.get(WAITING))["items"]
                for name in [one["name"] for one in listed if one["reason"] in NO_NODE]:
                    if name in self.waiting and await self._deleted(self.waiting[name]):
                        del self.waiting[name]
                        self.placed[name] = False
                        self.changed.set()
                await CLOCK.sleep(LOOK_S)

    async def _deleted(self, pod: Json) -> bool:
        """Delete a pod as it was created; False = it has been written since, so it is not refused any more."""
        meta = pod["metadata"]
        options = {"gracePeriodSeconds": 0, "preconditions": {key: meta[key] for key in ("uid", "resourceVersion")}}
        reply = await self.api.ask("DELETE", pod_path(pod), options)
        if reply.status not in {200, CHANGED}:
            raise ApiError(reply, f"DELETE {pod_path(pod)}")
        return reply.status == 200

    async def dump(self, settings: Settings) -> None:
        """Write what the auditor reads; Tessera ends first, in good order."""
        folder = settings.dump
        await CLOCK.sleep(2.0)  # the ledger hears of the last deletions
        nodes, pods = await self.api.get("/api/v1/nodes"), await self.api.get(PODS)
        status = await self.product.stop()
        (folder / "nodes.json").write_text(json.dumps(nodes))
        (folder / "pods.json").write_text(json.dumps(pods))
        (folder / "calls.jsonl").write_text("")
        (folder / "run.json").write_text(json.dumps({"seed": settings.seed, "exit_status": status}))
        await self.product.export_journal(folder / "journal.jsonl")


def _unschedulable(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "PodScheduled" and one.get("reason") == "Unschedulable" for one in conditions)


def _report(settings: Settings, trace: Trace, run: _Run) -> Json:
    """Return the bench's keys: allocation after each arrival, and what the auditor found."""
    found = audit(settings.dump)
    asked = list(accumulate(task.gpu_milli for task in run.tasks))
    got = [run.placed[f"pod-{number:05}"] for number in range(1, len(run.tasks) + 1)]
    allocated = list(accumulate(task.gpu_milli * has for task, has in zip(run.tasks, got, strict=True)))
    wrong = {kind: found[kind] for kind in ZERO}
    return {
        "trace": settings.trace,
        "source": trace.source,
        "nodes": len(trace.machines),
        "pods": len(run.tasks),
        "at_100": at(100, asked, allocated, trace.gpu_milli),
        "at_130": at(130, asked, allocated, trace.gpu_milli),
        "refused": got.count(False),
        **wrong,
        "offline_at_100": None,
        "journal_ok": found["journal_ok"],
        "checked": found["checked"],
        "findings": found["findings"],
        "seed": settings.seed,
        "ok": not any(wrong.values()) and bool(found["journal_ok"]),
    }
