"""An extender that answers by a plain function, and a small stage around the embedded kube-scheduler."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.kube_scheduler import KubeScheduler
from scheduler.ids import seeded_ids
from scheduler.kube.port import Object, UnknownOutcome

HOLD = "tessera.dev/hold"
FULL = "no free GPU"
Reply = tuple[int, bytes]


def answer(body: Any) -> Reply:
    return 200, orjson.dumps(body)


@dataclass
class Stage:
    """Cluster, kube-scheduler and an extender whose verbs a test may replace.

    Attributes:
        calls: (seconds, verb, pod name, node names) of every extender call.
        judge: (pod, names) -> the filter answer's parts; passes everything by default.
        scores: prioritize's answer.
        hooks: verb -> what replaces the extender's own answer.
    """

    cluster: EmbeddedCluster
    clock: LoopClock
    calls: list[tuple[float, str, str, tuple[str, ...]]] = field(default_factory=list)
    judge: Callable[[Object, list[str]], Object] = lambda _, names: {"NodeNames": names}
    scores: dict[str, int] = field(default_factory=dict)
    hooks: dict[str, Callable[[Object], Awaitable[Reply]]] = field(default_factory=dict)
    kube_scheduler: KubeScheduler = field(init=False)

    async def ask(self, verb: str, body: bytes) -> Reply:
        asked = orjson.loads(body)
        pod = asked["PodName"] if verb == "bind" else asked["Pod"]["metadata"]["name"]
        names = (asked["Node"],) if verb == "bind" else tuple(asked["NodeNames"])
        self.calls.append((self.clock.monotonic(), verb, pod, names))
        if verb in self.hooks:
            return await self.hooks[verb](asked)
        if verb == "filter":
            return answer(self.judge(asked["Pod"], asked["NodeNames"]))
        if verb == "prioritize":
            return answer([{"Host": name, "Score": self.scores.get(name, 0)} for name in asked["NodeNames"]])
        return await self.bind(asked)

    async def bind(self, asked: Object) -> Reply:
        body = {
            "metadata": {"name": asked["PodName"], "uid": asked["PodUID"], "annotations": {"bound": "yes"}},
            "target": {"name": asked["Node"]},
        }
        try:
            await self.cluster.bind(asked["PodNamespace"], asked["PodName"], body)
        except UnknownOutcome as error:
            return answer({"Error": str(error)})
        return answer({"Error": ""})

    def asked(self, verb: str, pod: str | None = None) -> list[tuple[str, ...]]:
        """The node names of all calls of a verb."""
        return [names for _, called, name, names in self.calls if called == verb and pod in (None, name)]

    async def settle(self, seconds: float = 5.0) -> int:
        """Let virtual time pass and return how many filter calls that took."""
        before = len(self.asked("filter"))
        await self.clock.sleep(seconds)
        return len(self.asked("filter")) - before

    async def nodes(self, count: int, **more: Any) -> list[str]:
        names = [f"gpu-{number}" for number in range(count)]
        for name in names:
            await self.cluster.create("nodes", "", machine(name, **more))
        return names

    async def pod(self, name: str, **more: Any) -> Object:
        return await self.cluster.create("pods", "default", job(name, **more))

    async def get(self, name: str) -> Object:
        return await self.cluster.get("pods", "default", name)

    async def node_of(self, name: str) -> str:
        node: str = (await self.get(name))["spec"].get("nodeName", "")
        return node

    async def annotate(self, name: str, value: str) -> None:
        await self.cluster.patch("pods", "default", name, {"metadata": {"annotations": {"changed": value}}})

    async def nominate(self, name: str, node: str) -> None:
        body = {"status": {"nominatedNodeName": node}}
        await self.cluster.patch("pods", "default", name, body, subresource="status")

    async def ungate(self, name: str) -> None:
        body = {"spec": {"schedulingGates": [{"$patch": "delete", "name": HOLD}]}}
        await self.cluster.patch("pods", "default", name, body, patch_type="strategic")


@asynccontextmanager
async def staged(*, seed: int = 1, **settings: Any) -> AsyncIterator[Stage]:
    clock = LoopClock(asyncio.get_running_loop())
    stage = Stage(EmbeddedCluster(clock, seeded_ids(random.Random(seed))), clock)
    stage.kube_scheduler = KubeScheduler(stage.cluster, clock, stage.ask, rng=random.Random(seed), **settings)
    stage.kube_scheduler.start()
    try:
        yield stage
    finally:
        await stage.kube_scheduler.stop()


def refuse_all(text: str = FULL) -> Callable[[Object, list[str]], Object]:
    def judge(pod: Object, names: list[str]) -> Object:
        return {"NodeNames": [], "FailedAndUnresolvableNodes": dict.fromkeys(names, text)}

    return judge


def machine(name: str, *, gpus: int = 8, cpu: str = "64", **more: Any) -> Object:
    amounts = {"cpu": cpu, "memory": "512Gi", "pods": "110", "nvidia.com/gpu": str(gpus)}
    status = {"capacity": amounts, "allocatable": amounts, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": more, "status": status}


def job(name: str, *, gpus: int = 1, cpu: str = "1", gates: tuple[str, ...] = (), **spec: Any) -> Object:
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    resources = {"requests": {"cpu": cpu, "memory": "1Gi"}, "limits": limits}
    body: Object = {
        "metadata": {"name": name},
        "spec": {
            "schedulerName": "tessera",
            "containers": [{"name": "main", "image": "x", "resources": resources}],
            **spec,
        },
    }
    if gates:
        body["spec"]["schedulingGates"] = [{"name": gate} for gate in gates]
    return body
