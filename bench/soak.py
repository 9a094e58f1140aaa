"""`bench soak`: the mix of `bench cluster` on many small clusters in memory and virtual time, audited from outside.

What runs is the program itself on the embedded cluster; what judges it is `bench.auditor`, which knows nothing of it. A
seed repeats exactly, whatever the machine and the hash seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

import orjson

from bench.auditor import FILTER_CALLS_MAX, QUIET_S, ZERO, Audit, Dump
from bench.oracle import bound_to, terminal
from bench.workload import CLASSES, KINDS_OF_ASK, NAMESPACE, Plan, UnreachableError, plan
from scheduler import logs
from scheduler.app import App
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.config import Settings
from scheduler.embedded.world import Verbs, World
from scheduler.ids import seeded_ids
from scheduler.kube.port import NotFound
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter

Json = dict[str, Any]

TICK_S = 0.5  # one pod arrives per tick
DRAIN_TICKS = 20
SETTLE_S = 90.0  # longer than any back-off of kube-scheduler and of waking
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Size:
    """Of each cluster.

    Attributes:
        nodes, pods: how many.
        kinds: of ask, of those that `bench.workload` knows.
    """

    nodes: int = 8
    pods: int = 48
    kinds: tuple[str, ...] = KINDS_OF_ASK


@dataclass(slots=True)
class Recorder:
    """Passes kube-scheduler's calls on to Tessera and notes when which pod was asked about."""

    clock: LoopClock
    tessera: Verbs | None = None
    calls: list[Json] = field(default_factory=list)

    async def filter(self, body: bytes) -> tuple[int, bytes]:
        """Pass on POST /filter."""
        meta = orjson.loads(body)["Pod"]["metadata"]
        self.calls.append({"t": self.clock.monotonic(), "verb": "filter", "pod": f"{meta['namespace']}/{meta['name']}"})
        return await self._behind().filter(body)

    async def prioritize(self, body: bytes) -> tuple[int, bytes]:
        """Pass on POST /prioritize."""
        return await self._behind().prioritize(body)

    async def bind(self, body: bytes) -> tuple[int, bytes]:
        """Pass on POST /bind."""
        return await self._behind().bind(body)

    def _behind(self) -> Verbs:
        if self.tessera is None:
            raise ConnectionRefusedError("Tessera is being started again")
        return self.tessera


class Run:
    """One seed's cluster, Tessera and what happens to them."""

    def __init__(self, seed: int, planned: Plan, clock: LoopClock, store: Store) -> None:
        """Build the cluster; nothing runs yet."""
        self.seed, self.planned, self.clock, self.store = seed, planned, clock, store
        self.world = World(clock, seeded_ids(self._rng("cluster")), self._rng("kube-scheduler"))
        self.world.cluster.preload("nodes", planned.nodes)
        self.world.cluster.preload("pods", planned.strangers)
        self.recorder = Recorder(clock)
        self.world.extender = self.recorder
        self.app: App | None = None

    def _rng(self, part: str) -> Random:
        return Random(f"{self.seed}.{part}")

    async def play(self) -> Dump:
        """Let everything happen and return what an auditor may see."""
        async with self.world.running():
            await self._start()
            await self._load()
            await self.clock.sleep(SETTLE_S)
            facts = {
                "seed": self.seed,
                "way": "direct",
                "pods": len(self.planned.pods),
                "quiet_begin": self.clock.monotonic(),
            }
            await self.clock.sleep(QUIET_S)
            facts["quiet_end"] = self.clock.monotonic()
            await self._stop()
        snapshot, journal = self.world.cluster.snapshot, [dict(line) for line in self.store.journal()]
        return Dump(snapshot("nodes"), snapshot("pods"), journal, self.recorder.calls, facts)

    async def _start(self) -> None:
        self.app = App(
            Settings(), self.clock, self.world.cluster, self.store, InlineWriter(self.store), self._rng("tessera")
        )
        await self.app.start()
        self.recorder.tessera = self.app.extender

    async def _stop(self) -> None:
        self.recorder.tessera = None
        assert self.app is not None
        await self.app.stop()

    async def _load(self) -> None:
        """Create one pod per tick and end what is due; half-way Tessera is stopped and started again."""
        pods, cluster = self.planned.pods, self.world.cluster
        due = dict(self.planned.endings)
        for tick in range(len(pods) + max(len(pods) // 5, DRAIN_TICKS)):
            if tick == len(pods) // 2:
                await self._stop()
                self.store.raise_fence()
                await self._start()
            if tick < len(pods):
                await cluster.create("pods", NAMESPACE, _admitted(pods[tick]))
            for name in [name for name, ending in due.items() if ending.tick <= tick]:
                pod = await cluster.get("pods", NAMESPACE, name)
                if bound_to(pod) and not terminal(pod):
                    await self._end(name, due.pop(name).phase)
            await self.clock.sleep(TICK_S)

    async def _end(self, name: str, phase: str) -> None:
        with contextlib.suppress(NotFound):
            if phase == "deleted":
                await self.world.cluster.delete("pods", NAMESPACE, name, grace_s=0)
            else:
                body = {"status": {"phase": phase}}
                await self.world.cluster.patch("pods", NAMESPACE, name, body, subresource="status")


def _admitted(pod: Json) -> Json:
    """Return the pod as admission leaves it: the embedded API server resolves no priority classes."""
    spec = dict(pod["spec"])
    if "priorityClassName" in spec:
        spec["priority"] = CLASSES[spec["priorityClassName"]]
    return {**pod, "spec": spec}


def soak_one(seed: int, size: Size) -> Json:
    """Run one seed to its end and return the auditor's report, with `violations` and the journal's `head`."""
    planned = _planned(seed, size)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        dump = runner.run(_play(seed, planned))
    report = Audit(dump).report()
    violations = {kind: report[kind] for kind in ZERO if report[kind]}
    if not report["journal_ok"]:
        violations["journal"] = 1
    if report["max_filter_calls_5s"] > FILTER_CALLS_MAX:
        violations["max_filter_calls_5s"] = report["max_filter_calls_5s"]
    return {**report, "violations": violations, "head": dump.journal[-1]["hash"] if dump.journal else ""}


def _planned(seed: int, size: Size) -> Plan:
    """Draw the plan; where so few pods cannot ask for the cluster, take as many as can."""
    try:
        return plan(nodes=size.nodes, pods=size.pods, seed=seed, kinds=size.kinds)
    except UnreachableError as error:
        return plan(nodes=size.nodes, pods=int(str(error).split()[-1]), seed=seed, kinds=size.kinds)


async def _play(seed: int, planned: Plan) -> Dump:
    store = Store.open("sqlite://", new_id=seeded_ids(Random(f"{seed}.store")))
    try:
        return await Run(seed, planned, LoopClock(asyncio.get_running_loop()), store).play()
    finally:
        store.close()


def _told(task: tuple[int, Size]) -> Json:
    """Run one seed in a worker process; whatever breaks is a finding of that seed."""
    seed, size = task
    logs.configure("critical", "auto")
    began = time.process_time()
    try:
        report = soak_one(seed, size)
    except Exception as error:  # noqa: BLE001 - a seed that breaks the program must not hide the others
        report = {"seed": seed, "violations": {"crashed": 1}, "findings": {"crashed": [repr(error)]}}
    return {**report, "cpu_s": time.process_time() - began}


def soak(seeds: range, size: Size, say: Callable[[str], None], *, jobs: int = 2) -> Json:
    """Run many seeds side by side.

    Args:
        seeds: which.
        size: of each cluster.
        say: takes one line for each seed that fails, with the command that repeats it, and progress.
        jobs: processes; with 1 everything runs in this one.

    Returns:
        Totals of `seeds, pods, bound, waiting, checked, violations` (by kind), `failed` (seeds) and `ok`.
    """
    begun, totals, kinds = time.monotonic(), Counter[str](), Counter[str]()
    failed: list[int] = []
    tasks = [(seed, size) for seed in seeds]
    with contextlib.ExitStack() as stack:
        reports: Iterator[Json] = map(_told, tasks)
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context))
            reports = pool.map(_told, tasks, chunksize=max(1, min(8, len(tasks) // jobs)))
        for number, report in enumerate(reports, start=1):
            totals.update({key: report.get(key, 0) for key in ("pods", "bound", "waiting", "checked")})
            if report["violations"]:
                failed.append(report["seed"])
                kinds.update(report["violations"])
                say(_sentence(report, size))
            if number % 50 == 0:
                say(f"{number} of {len(tasks)} seeds, {len(failed)} failed")
    return {
        "seeds": len(tasks),
        **totals,
        "violations": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items())),
        "failed": failed,
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seeds.start,
        "ok": not failed and 2 * totals["bound"] >= totals["pods"] > 0,
    }


def _sentence(report: Json, size: Size) -> str:
    """Return what a seed did wrong and how to see it again."""
    again = f"python -m bench soak --seeds 1 --first {report['seed']} --nodes {size.nodes} --pods {size.pods}"
    findings = [text for texts in report["findings"].values() for text in texts]
    return f"seed {report['seed']}: {report['violations']}; again: {again}\n    " + "\n    ".join(findings[:SHOWN])
