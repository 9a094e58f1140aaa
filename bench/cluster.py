"""`bench cluster`: Tessera beside a real kube-scheduler, under load, under SIGKILL, then audited from outside.

The driver only makes load, kills and a dump; whether the run was good is said by `bench.auditor` from the dump alone.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.apiclient import ApiClient, ApiError, Json
from bench.auditor import QUIET_S, audit
from bench.errors import BenchError
from bench.kube_objects import create_nodes, create_pods, gather_bounded, set_phase
from bench.life import PODS, Life
from bench.product import Product, ProductError
from bench.proxy import Moment, Proxy, Strike
from bench.queue_oracle import GATE, QUEUE, read_queues
from bench.realcluster import TESSERA, RealCluster
from bench.workload import CLASSES, KINDS_OF_ASK, NAMESPACE, Plan, plan
from scheduler.clock import RealClock

CLOCK = RealClock()
TICK_S = 0.045  # with the write of each pod about 20 pods arrive a second
DOWN_TICKS = 20  # pods that may arrive around a kill before the next has to wait for Tessera
DRAIN_TICKS = 200
SETTLED_S = 12.0  # kube-scheduler backs off for up to 10 s after an error
SETTLE_MAX_S = 180.0
IN_FLIGHT_S = 30.0
DURING_S = (0.0, 0.03)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bench cluster` was asked.

    Attributes:
        nodes, pods: sizes of the cluster and of the load.
        seed: of nodes, pods, their lives and the moments of the kills.
        kills: SIGKILLs, spread evenly over the arrivals.
        dump: folder for the dump and the logs; it is made when absent.
        kinds: which kinds of ask the pods are drawn from.
        held: pods are created under Tessera's gate.
        queues: documents of the queues; pods are dealt out over the leaves in turn.
    """

    nodes: int
    pods: int
    seed: int
    kills: int
    dump: Path
    kinds: tuple[str, ...] = KINDS_OF_ASK
    held: bool = False
    queues: Path | None = None


Say = Callable[[str], None]


async def run_cluster(settings: Settings, say: Say) -> Json:
    """Run everything and return the auditor's report.

    Args:
        settings: what to run.
        say: takes one line of progress.

    Raises:
        BenchError: the run could not be finished.
        UnavailableError: there is no real control plane on this machine.
        UnreachableError: the pods cannot ask for 90 % of the cluster.
    """
    planned = plan(nodes=settings.nodes, pods=settings.pods, seed=settings.seed, kinds=settings.kinds)
    deal(planned.pods, read_queues(settings.queues).leaves(), held=settings.held)
    settings.dump.mkdir(parents=True, exist_ok=True)
    if settings.queues:
        shutil.copy(settings.queues, settings.dump / "queues.yaml")
    begun = time.monotonic()
    asked = f"{planned.asked / 1000:.1f} of {planned.gpus / 1000:.0f} GPUs"
    say(f"{settings.pods} pods ask for {asked} on {settings.nodes} nodes")
    async with RealCluster() as cluster, cluster.client() as api, Proxy() as proxy:
        flags = [f"--queues={settings.queues}"] if settings.queues else []
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA), flags=flags)
        try:
            run = _Run(settings, planned, cluster, api, proxy, product, say)
            await run.everything()
        except (ProductError, ApiError) as error:
            raise BenchError(str(error)) from error
        except ExceptionGroup as group:
            raise BenchError("; ".join(str(error) or repr(error) for error in _leaves(group))) from group
        finally:
            await product.kill()
            _keep_logs(cluster.folder, settings.dump)
    say("auditing")
    report = await asyncio.to_thread(audit, settings.dump)
    return {**report, "seconds": round(time.monotonic() - begun, 1)}


def deal(pods: list[Json], queues: list[str], *, held: bool) -> None:
    """Give the pods their queues in turn, and Tessera's gate where they are to be held."""
    for number, pod in enumerate(pods):
        if queues:
            pod["metadata"].setdefault("labels", {})[QUEUE] = queues[number % len(queues)]
        if held:
            pod["spec"]["schedulingGates"] = [{"name": GATE}]


def _leaves(group: ExceptionGroup[Exception]) -> list[Exception]:
    leaves: list[Exception] = []
    for error in group.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, ExceptionGroup) else [error])
    return leaves


def _keep_logs(folder: Path, dump: Path) -> None:
    (dump / "logs").mkdir(exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, dump / "logs" / log.name)


@dataclass(slots=True)
class _Run:
    """The phases of one run, in order, on parts that are open."""

    settings: Settings
    planned: Plan
    cluster: RealCluster
    api: ApiClient
    proxy: Proxy
    product: Product
    say: Say
    life: Life = field(init=False)
    rng: np.random.Generator = field(init=False)
    facts: Json = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.life = Life(self.api, self.planned.endings)
        self.rng = np.random.default_rng([settings.seed, 1])
        way = "queue" if settings.held else "direct"
        self.facts = {"seed": settings.seed, "way": way, "nodes": settings.nodes, "pods": settings.pods, "kills": 0}

    async def everything(self) -> None:
        await self._begin()
        async with asyncio.TaskGroup() as group:
            kubelets = [group.create_task(self.life.follow()), group.create_task(self.life.play())]
            await self._load()
            await self._settle()
            await self._stay_quiet()
            for task in kubelets:
                task.cancel()
        await self._dump()

    async def _begin(self) -> None:
        classes = [{"metadata": {"name": name}, "value": value} for name, value in CLASSES.items()]
        await gather_bounded([self.api.post("/apis/scheduling.k8s.io/v1/priorityclasses", one) for one in classes])
        await create_nodes(self.api, self.planned.nodes)
        strangers = await create_pods(self.api, self.planned.strangers)
        await gather_bounded([set_phase(self.api, pod, "Running") for pod in strangers])
        await self._start_product()
        await self.cluster.start_kube_scheduler(self.proxy.url)
        self.say(f"{len(self.planned.nodes)} nodes, Tessera and kube-scheduler are ready")

    async def _start_product(self) -> None:
        await self.product.start()
        self.proxy.upstream = self.product.extender

    async def _load(self) -> None:
        """Create one pod per tick, end what is due, kill at the ticks between; then let due pods end for a while."""
        pods, kills = self.settings.pods, self.settings.kills
        at = {(number + 1) * pods // (kills + 1): number for number in range(kills)}
        strike: asyncio.Task[None] | None = None
        try:
            for tick in range(pods + max(pods // 5, DRAIN_TICKS)):
                if tick in at:
                    await _finished(strike)
                    strike = asyncio.create_task(self._strike(at[tick]))
                if tick < pods:
                    await self.api.post(f"/api/v1/namespaces/{NAMESPACE}/pods", self.planned.pods[tick])
                self.life.advance(tick)
                self.product.check()
                await CLOCK.sleep(TICK_S)
                if strike and tick - max(first for first in at if first <= tick) >= DOWN_TICKS:
                    await strike
            await _finished(strike)
        finally:
            if strike:
                strike.cancel()
        await self.life.written()
        self.say(f"{pods} pods created, {len(self.life.bound)} bound so far, {self.facts['kills']} kills")

    async def _strike(self, number: int) -> None:
        """Kill Tessera at the next bind and start it again."""
        moment = list(Moment)[number % len(Moment)]
        strike = Strike(self.product.kill, moment, float(self.rng.uniform(*DURING_S)))
        self.proxy.arm(strike)
        try:
            async with asyncio.timeout(IN_FLIGHT_S):
                await strike.fell.wait()
        except TimeoutError:
            raise BenchError(f"no pod was in flight for {IN_FLIGHT_S:.0f} s, so there was nothing to kill at") from None
        self.facts["kills"] += 1
        await self._start_product()
        self.say(f"killed {moment} a bind, ready again after {self.product.ready_s[-1]:.1f} s")

    async def _settle(self) -> None:
        """Wait until nothing has been bound for a while."""
        deadline = time.monotonic() + SETTLE_MAX_S
        begun = time.monotonic()
        while time.monotonic() - max(begun, self.life.last_bound_s) < SETTLED_S:
            if time.monotonic() > deadline:
                raise BenchError(f"pods were still being bound {SETTLE_MAX_S:.0f} s after the load had ended")
            await self._pause(1.0)
        await self.life.written()
        self.say(f"settled with {len(self.life.bound)} pods bound; {QUIET_S:.0f} quiet seconds begin")

    async def _stay_quiet(self) -> None:
        self.facts["quiet_begin"] = time.time()
        await self._pause(QUIET_S)
        self.facts["quiet_end"] = time.time()

    async def _pause(self, seconds: float) -> None:
        await CLOCK.sleep(seconds)
        self.product.check()

    async def _dump(self) -> None:
        """Write what the auditor reads; Tessera ends first, in good order, so that the journal is whole."""
        folder = self.settings.dump
        nodes, pods = await self.api.get("/api/v1/nodes"), await self.api.get(PODS)
        asked = time.monotonic()
        self.facts["exit_status"] = await self.product.stop()
        self.facts["stop_s"] = round(time.monotonic() - asked, 2)
        self.facts["ready_s"] = [round(seconds, 2) for seconds in self.product.ready_s]
        (folder / "nodes.json").write_text(json.dumps(nodes))
        (folder / "pods.json").write_text(json.dumps(pods))
        (folder / "calls.jsonl").write_text("".join(json.dumps(call) + "\n" for call in self.proxy.calls))
        (folder / "run.json").write_text(json.dumps(self.facts))
        await self.product.export_journal(folder / "journal.jsonl")


async def _finished(strike: asyncio.Task[None] | None) -> None:
    if strike:
        await strike
