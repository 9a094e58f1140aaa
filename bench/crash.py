"""`bench crash`: Tessera dies by SIGKILL at points between a reservation and its Binding, and must go on from there.

Each trial has a ledger, pods and queues of its own on one real control plane: held pods come, the process dies at its
point, the dump shows that it died there, it is started again, and before its time is over nobody may wait who could
run. Then the auditor reads the dump. Invariant: a trial whose process died somewhere else does not count as recovered.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.allocations import parsed
from bench.apiclient import ApiClient, ApiError
from bench.auditor import Audit, read_dump, write_dump
from bench.devices import GPU, MIG_DEVICES, SHARE
from bench.errors import BenchError
from bench.kube_objects import create_nodes, create_pods, node_object, pod_object
from bench.oracle import bound_to, observe
from bench.product import Product, ProductError
from bench.proxy import ApiProxy, Moment, Proxy, Strike
from bench.queue_oracle import GATE, QUEUE, Rule, Tree, read_queues, runnable, waiting_pods
from bench.realcluster import TESSERA, RealCluster
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]
Rows = Mapping[str, Json]

CLOCK = RealClock()
NAMESPACE = "default"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
SLICE = "nvidia.com/mig-1g.10gb"
ASKS: tuple[dict[str, str], ...] = ({GPU: "1"}, {GPU: "2"}, {SHARE: "1"}, {SLICE: "1"}, {})
PODS_EACH, WARM = 30, 3
PASSINGS = 6  # the process dies at one of the first passings of its point
TIMEOUT_S = 5.0  # of reservations
DIE_S, RECOVER_S, GONE_S = 30.0, 60.0, 30.0
LOOK_S = 0.2
SOON_S = 10.0
QUEUES = """
{apiVersion: tessera.dev/v1alpha1, kind: Queue, metadata: {name: open}, spec: {namespaceSelector: {}}}
---
apiVersion: tessera.dev/v1alpha1
kind: Queue
metadata: {name: tight}
spec: {namespaceSelector: {}, nominal: {gpu: 4, milli: 1000, "mig:1g.10gb": 1}}
"""
LEAVES = ("open", "open", "tight")  # in turn


class CrashError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where the process dies.

    Attributes:
        what: in a few words.
        faults: fault points of the product, one per trial in turn; empty = the answer to a Binding never comes.
        state: of the Request that was in flight, in the ledger.
        pod: how its pod was: `held`, `nominated` (and held), `free` (and not bound) or `bound`.
        away: kube-scheduler is away, until the reservations have timed out.
    """

    what: str
    faults: tuple[str, ...]
    state: str
    pod: str
    away: bool = False


POINTS = {
    "C3": Point("reserved, before it is nominated", ("turn.commit.after",), "RESERVED", "held"),
    "C4": Point("nominated, before the gate goes", ("release.ungate.before",), "RESERVED", "nominated"),
    "C5": Point("let go, and nobody calls", ("release.ungate.after",), "RESERVED", "free", away=True),
    "C6": Point("BINDING committed, before the Binding", ("bind.commit.after",), "BINDING", "free"),
    "C7": Point("inside the Binding: applied, no answer", (), "BINDING", "bound"),
    "C8": Point("bound, before BOUND", ("bind.post.after", "bind.confirm.before"), "BINDING", "bound"),
}
"""In the order of a pod's way. C1, C2 and C9 to C13 belong to what is not built yet, or to tests of the store."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bench crash` was asked: names in `POINTS`, trials of each, the seed of the passings, a folder for dumps."""

    points: tuple[str, ...]
    each: int
    seed: int
    dump: Path


def read_points(written: str) -> tuple[str, ...]:
    """Return the points that a list such as `C3-C5,C8` names, each once, in order.

    Raises:
        ValueError: it names none, or one that is not built; the sentence names those that are.
    """
    names = list(POINTS)
    found: set[str] = set()
    for part in written.split(","):
        ends = re.fullmatch(r"(C\d+)(?:-(C\d+))?", part.strip())
        first, last = (ends[1], ends[2] or ends[1]) if ends else ("", "")
        if first not in POINTS or last not in POINTS or names.index(first) > names.index(last):
            raise ValueError(f"--points is a list such as C3-C5,C8 of {', '.join(names)}; not {written}.")
        found |= set(names[names.index(first) : names.index(last) + 1])
    return tuple(name for name in names if name in found)


def nodes_of() -> list[Json]:
    """Return four nodes: two exact ones with whole GPUs and shares, one in MIG mode, one observed."""
    product = {f"{GPU}.product": "NVIDIA-H100-80GB-HBM3", f"{GPU}.count": "8", f"{GPU}.memory": "81559"}
    exact = {"tessera.dev/mode": "exact", **product}
    kinds: list[tuple[dict[str, str], dict[str, str]]] = [
        (exact, {GPU: "8", SHARE: "512"}),
        (exact, {GPU: "8", SHARE: "512"}),
        ({**exact, MIG_DEVICES: "all"}, {GPU: "8", SLICE: "56"}),
        (product, {GPU: "8"}),
    ]
    return [
        node_object(f"node-{number}", extended=extended, labels=labels)
        for number, (labels, extended) in enumerate(kinds, start=1)
    ]


def pods_of(prefix: str, count: int) -> list[Json]:
    """Return held pods of every kind of ask, two of three in a queue without a limit."""
    return [
        pod_object(
            f"{prefix}-{number:02}",
            requests={"cpu": "1", "memory": "1Gi", **(ask := ASKS[number % len(ASKS)])},
            labels={QUEUE: LEAVES[number % len(LEAVES)]},
            annotations={"tessera.dev/gpu-milli": "500"} if SHARE in ask else {},
            gates=[GATE],
        )
        for number in range(count)
    ]


def in_flight(point: Point, pods: Sequence[Json], rows: Rows) -> list[str]:
    """Return the names of the pods that were at this very point when the process died.

    Args:
        point: where it should have died.
        pods: as the API server has them, Tessera being dead.
        rows: the last journal line of each Request.
    """
    return [
        pod["metadata"]["name"]
        for pod in pods
        if _stage(pod) == point.pod and rows.get(pod["metadata"]["uid"], {}).get("to") == point.state
    ]


def _stage(pod: Json) -> str:
    if bound_to(pod):
        return "bound"
    if not pod["spec"].get("schedulingGates"):
        return "free"
    return "nominated" if _nominated(pod) else "held"


def _nominated(pod: Json) -> bool:
    return bool((pod.get("status") or {}).get("nominatedNodeName"))


async def run_crash(settings: Settings, say: Say) -> Json:
    """Run all trials and return the report.

    Raises:
        CrashError: the run could not be finished.
        UnavailableError: there is no real control plane on this machine.
    """
    begun = time.monotonic()
    async with RealCluster() as cluster, cluster.client() as api, Proxy() as extender:
        certificate, key = (cluster.folder / f"apiserver.{end}" for end in ("crt", "key"))
        async with ApiProxy(cluster.url, cluster.ca_file, certificate, key) as server:
            bench = _Bench(settings, cluster, api, extender, server, say)
            try:
                await bench.everything()
            except (ProductError, ApiError, TimeoutError) as error:
                raise CrashError(str(error) or "pods were not gone in time") from error
    report = report_of(bench.outcomes, each=settings.each, seed=settings.seed)
    return {**report, "seconds": round(time.monotonic() - begun, 1)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial showed.

    Attributes:
        wrong: why it does not count as recovered, a sentence; empty = it does.
        stuck: pods that waited to the end though they could run.
        violations: findings of the auditor, sentences.
        recover_s: from the new process's start until nobody waited who could run.
        ready_s: of these, until its ready line.
        checked: answers compared with the oracle.
    """

    wrong: str
    stuck: int
    violations: list[str]
    recover_s: float
    ready_s: float
    checked: int


@dataclass(slots=True)
class _Bench:
    """The run: its parts, and the outcomes by point."""

    settings: Settings
    cluster: RealCluster
    api: ApiClient
    extender: Proxy
    server: ApiProxy
    say: Say
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    tree: Tree = field(init=False)
    nodes: list[Json] = field(init=False)

    async def everything(self) -> None:
        self.nodes = await create_nodes(self.api, nodes_of())
        queues = self.cluster.folder / "queues.yaml"
        queues.write_text(QUEUES)
        self.tree = read_queues(queues)
        rng = Random(self.settings.seed)
        for name in self.settings.points:
            for number in range(self.settings.each):
                outcome = await self._trial(name, number, rng.randint(1, PASSINGS))
                self.outcomes.setdefault(name, []).append(outcome)
                self.say(_sentence(f"{name} {number + 1}/{self.settings.each}", outcome))

    async def _trial(self, name: str, number: int, passing: int) -> Outcome:
        """Run one trial in a folder of its own, from its pods' coming to their going."""
        folder = self.settings.dump / f"{name}-{number}"
        if folder.exists():
            raise CrashError(f"{folder} is there already; name a new folder with --dump")
        folder.mkdir(parents=True)
        kubeconfig = self.server.kubeconfig(self.cluster.kubeconfig(TESSERA), folder / "tessera.kubeconfig")
        product = Product(folder, kubeconfig, flags=[f"--queues={self.cluster.folder / 'queues.yaml'}"])
        trial = _Trial(self, POINTS[name], f"{name.lower()}-{number}", number, passing, folder, product)
        try:
            return await trial.run()
        finally:
            self.server.disarm()
            self.extender.upstream = ""
            await product.kill()
            await self.cluster.stop_kube_scheduler()
            await self._clear()

    async def _clear(self) -> None:
        await self.api.delete(PODS, {"gracePeriodSeconds": 0})
        async with asyncio.timeout(GONE_S):
            while (await self.api.get(PODS))["items"]:
                await CLOCK.sleep(LOOK_S)


def report_of(outcomes: Mapping[str, Sequence[Outcome]], *, each: int, seed: int) -> Json:
    """Return the bench's keys.

    Args:
        outcomes: by point.
        each: trials of each that were asked for.
        seed: of the passings.
    """
    rows = [_row(name, told) for name, told in outcomes.items()]
    good = all((row["recovered"], row["stuck"], row["violations"]) == (each, 0, 0) for row in rows)
    return {
        "rows": rows,
        "each": each,
        "checked": sum(one.checked for told in outcomes.values() for one in told),
        "notes": [
            "recover_s: the slowest, from the start of the new process until nobody waits who could run",
            "limit_s: what cannot be less: the start of a process, and at C5 the reservation's timeout",
        ],
        "seed": seed,
        "ok": bool(rows) and good,
    }


def _row(name: str, outcomes: Sequence[Outcome]) -> Json:
    point = POINTS[name]
    return {
        "point": name,
        "recovered": sum(not (one.wrong or one.stuck) for one in outcomes),
        "stuck": sum(one.stuck for one in outcomes),
        "violations": sum(len(one.violations) for one in outcomes),
        "what": point.what,
        "recover_s": round(max(one.recover_s for one in outcomes), 1),
        "limit_s": round(max(one.ready_s for one in outcomes) + (TIMEOUT_S if point.away else 0.0), 1),
        "findings": [text for one in outcomes for text in ([one.wrong] if one.wrong else []) + one.violations][:10],
    }


def _sentence(what: str, outcome: Outcome) -> str:
    if outcome.wrong or outcome.stuck or outcome.violations:
        return f"{what}: {outcome.wrong or 'FAILED'}, {outcome.stuck} stuck, violations: {outcome.violations[:3]}"
    return f"{what}: recovered in {outcome.recover_s:.1f} s"


@dataclass(slots=True)
class _Trial:
    """One death and what became of the pods."""

    bench: _Bench
    point: Point
    prefix: str
    number: int
    passing: int
    folder: Path
    product: Product

    async def run(self) -> Outcome:
        """Run it: warm up, die, start again, wait, audit."""
        bench = self.bench
        first = len(bench.extender.calls)
        await self._start(self._fault())
        await bench.cluster.start_kube_scheduler(bench.extender.url)
        await self._come(f"{self.prefix}-warm", WARM, until_bound=True)
        if self.point.away:
            await bench.cluster.stop_kube_scheduler()
        died = asyncio.create_task(self._dead())
        await self._come(self.prefix, PODS_EACH - WARM)
        if not await died:
            return Outcome("the process did not die at its point", 0, [], 0.0, 0.0, 0)
        bench.extender.upstream = ""
        await self.product.export_journal(self.folder / "journal.jsonl")
        witnesses = in_flight(self.point, await self._pods(), self._rows())
        wrong = "" if witnesses else "nobody was at the point when the process died"
        begun = time.monotonic()
        await self._start({})
        ready_s = time.monotonic() - begun
        if self.point.away:
            wrong = wrong or await self._timed_out(witnesses)
            await bench.cluster.start_kube_scheduler(bench.extender.url)
        stuck = await self._settled()
        recover_s = time.monotonic() - begun
        return await self._audited(wrong, stuck, (recover_s, ready_s), first)

    def _fault(self) -> dict[str, str]:
        if not self.point.faults:
            return {}
        fault = self.point.faults[self.number % len(self.point.faults)]
        return {"TESSERA_FAULT": f"kill:{fault}:{WARM + self.passing}"}

    async def _start(self, environment: dict[str, str]) -> None:
        await self.product.start({"TESSERA_QUEUE_RESERVATIONTIMEOUT": f"{TIMEOUT_S:.0f}s", **environment})
        self.bench.extender.upstream = self.product.extender

    async def _come(self, prefix: str, count: int, *, until_bound: bool = False) -> None:
        """Create pods, and wait until they are bound where that is wanted."""
        await create_pods(self.bench.api, pods_of(prefix, count))
        deadline = time.monotonic() + RECOVER_S
        while until_bound and not all(bound_to(pod) for pod in await self._pods()):
            if time.monotonic() > deadline:
                raise CrashError(f"the first {count} pods were not bound within {RECOVER_S:.0f} s, nobody being killed")
            self.product.check()
            await CLOCK.sleep(LOOK_S)

    async def _dead(self) -> bool:
        """Wait until the process has died; where a Binding's answer is lost, the proxy kills it."""
        if self.point.faults:
            return await self.product.died(DIE_S)
        strike = Strike(self.product.kill, Moment.AFTER, 0.0)
        self.bench.server.arm(strike)
        try:
            async with asyncio.timeout(DIE_S):
                await strike.fell.wait()
        except TimeoutError:
            return False
        return True

    async def _pods(self) -> list[Json]:
        items: list[Json] = (await self.bench.api.get(PODS))["items"]
        return items

    def _rows(self) -> dict[str, Json]:
        """Return the last line of each Request."""
        lines = [json.loads(text) for text in (self.folder / "journal.jsonl").read_text().splitlines()]
        return {line["request"]: line for line in lines}

    async def _timed_out(self, names: Sequence[str]) -> str:
        """Wait until these reservations have timed out and their nominations were taken back, while nobody calls.

        Returns:
            Who kept what, a sentence; empty = nobody did.
        """
        booked, nominated = set(names), set(names)
        deadline = time.monotonic() + TIMEOUT_S + SOON_S
        async with ApiClient(self.product.api, "", self.bench.cluster.ca_file) as people:
            while (booked or nominated) and time.monotonic() < deadline:
                listed = (await people.get("/api/v1/requests?state=RESERVED&limit=500"))["items"]
                booked &= {one["name"] for one in listed}
                nominated &= {pod["metadata"]["name"] for pod in await self._pods() if _nominated(pod)}
                await CLOCK.sleep(LOOK_S / 4)
        if booked:
            return f"{', '.join(sorted(booked))}: the reservation did not time out"
        return f"{', '.join(sorted(nominated))}: kept the nomination that had timed out" if nominated else ""

    async def _settled(self) -> int:
        """Wait until nobody waits who could run, and say how many do when the time is over."""
        deadline = time.monotonic() + RECOVER_S
        rule = Rule({node["metadata"]["name"]: node for node in self.bench.nodes}, self.bench.tree)
        while True:
            pods = await self._pods()
            allocations = parsed(pods)
            able = runnable(pods, observe(self.bench.nodes, pods, allocations), rule, allocations)
            if not able or time.monotonic() > deadline:
                return len(able)
            self.product.check()
            await CLOCK.sleep(LOOK_S)

    async def _audited(self, wrong: str, stuck: int, took_s: tuple[float, float], first: int) -> Outcome:
        """End Tessera in good order, write the dump, and read it as the auditor does."""
        nodes, pods = await self.bench.api.get("/api/v1/nodes"), await self.bench.api.get(PODS)
        status = await self.product.stop()
        run = {"seed": self.bench.settings.seed, "pods": PODS_EACH, "kills": 1, "exit_status": status}
        calls = self.bench.extender.calls[first:]
        write_dump(self.folder, nodes, pods, calls=calls, run=run, queues=QUEUES)
        await self.product.export_journal(self.folder / "journal.jsonl")
        audit = Audit(read_dump(self.folder))
        report = audit.report()
        found = [text for kind, told in audit.findings.items() if kind != "waiting_placeable" for text in told.values()]
        found += [] if report["journal_ok"] else ["the journal's chain is broken"]
        # What waits at the end waits for quota: a pod that nobody counts would make `stuck` say nothing.
        if not waiting_pods(pods["items"]):
            wrong = wrong or "nobody waited for quota at the end, though the tight queue is asked for more than it has"
        return Outcome(wrong, stuck, found, *took_s, report["checked"])


def show(report: Json) -> None:
    """Print the table for people to stderr."""
    table = Table("point", "where it dies", "recovered", "stuck", "violations", "slowest", "limit")
    for row in report["rows"]:
        counts = [f"{row['recovered']} of {report['each']}", str(row["stuck"]), str(row["violations"])]
        table.add_row(row["point"], row["what"], *counts, f"{row['recover_s']:.1f} s", f"{row['limit_s']:.1f} s")
    console = Console(stderr=True)
    console.print(table)
    for row in report["rows"]:
        for text in row["findings"]:
            console.print(f"{row['point']}: {text}", highlight=False)
    console.print("limit: the start of a process, and where kube-scheduler is away the reservation's timeout.")
