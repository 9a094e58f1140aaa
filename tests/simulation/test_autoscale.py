"""New nodes: who fits on none is shown to whoever adds nodes, keeps its place, and gets the node when it is there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from scheduler import GATE
from scheduler.config import NodeGroup, Settings
from scheduler.config import Queue as QueueSettings
from scheduler.kube.port import Object
from scheduler.model.reservation import State
from scheduler.web.explanation import explanation
from tests.simulation.test_queue_way import held, reserved, word
from tests.simulation.town import Town, job, machine, town

GROUP = NodeGroup(
    name="new",
    labels={
        "pool": "new",
        "tessera.dev/mode": "exact",
        "nvidia.com/gpu.count": "8",
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    },
    capacity={"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "nvidia.com/gpu": "8"},
)
H200 = GROUP.model_copy(update={"labels": {**GROUP.labels, "nvidia.com/gpu.product": "NVIDIA-H200"}})
READY = "node.kubernetes.io/not-ready"


async def queue(place: Town, name: str, **spec: Any) -> None:
    body = {"metadata": {"name": name}, "spec": {"namespaceSelector": {}, **spec}}
    await place.world.cluster.create("queues", "", body)
    await place.until(lambda: name in place.tessera.desk.queues.quota.queues, 1)


@asynccontextmanager
async def growing(
    group: NodeGroup = GROUP, *, window: int = 256, gpus: int = 2, cpu: str = "64"
) -> AsyncIterator[Town]:
    """Open a town with one node, a group of nodes, and a queue that grows."""

    def before(place: Town) -> None:
        place.settings = Settings(nodeGroups=(group,), queue=QueueSettings(releaseWindow=window))

    async with town("small", before=before, gpus=gpus, cpu=cpu) as place:
        await queue(place, "grows", autoscale=True)
        yield place


async def arrives(place: Town, name: str, product: str = "NVIDIA-H100-80GB-HBM3") -> Object:
    node = machine(name)
    node["metadata"]["labels"] |= {"pool": "new", "nvidia.com/gpu.product": product}
    return await place.world.cluster.create("nodes", "", node)


def out(place: Town) -> list[str]:
    """Return the names of the pods that have no gate and no node."""
    pods = place.world.cluster.snapshot("pods")
    free = [pod for pod in pods if not (pod["spec"].get("schedulingGates") or pod["spec"].get("nodeName"))]
    return sorted(pod["metadata"]["name"] for pod in free)


def condition(pod: Object, kind: str) -> Object:
    return next((one for one in pod["status"].get("conditions", ()) if one["type"] == kind), {})


def overheard(place: Town) -> list[tuple[str, dict[str, str]]]:
    """Return a list that grows with the /filter calls: the pod's name, and what its nodes were refused with."""
    calls: list[tuple[str, dict[str, str]]] = []
    inner = place.world.extender
    assert inner is not None
    ask = inner.filter

    class Overheard:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        async def filter(self, body: bytes) -> tuple[int, bytes]:
            status, answer = await ask(body)
            refused = orjson.loads(answer).get("FailedAndUnresolvableNodes") or {}
            calls.append((orjson.loads(body)["Pod"]["metadata"]["name"], refused))
            return status, answer

    place.world.extender = Overheard()
    return calls


async def test_who_fits_no_node_is_let_go_without_a_nomination_and_bound_when_the_node_is_there() -> None:
    async with growing(H200) as place:
        calls = overheard(place)
        wants = direct("one", 2, "1")  # kube-scheduler would let it run on the node that is there
        wants["metadata"]["annotations"] = {"tessera.dev/gpu-model": "H200"}
        wants["spec"]["schedulingGates"] = [{"name": GATE}]
        pod = await place.world.cluster.create("pods", "default", wants)
        await place.wait(28)
        assert not out(place)
        await place.wait(6)
        seen = await place.get("one")
        assert not seen["spec"].get("schedulingGates")
        assert not seen["status"].get("nominatedNodeName")
        assert condition(seen, "PodScheduled")["reason"] == "Unschedulable"
        assert condition(seen, "tessera.dev/Admitted")["reason"] == "WaitingForAutoscale"
        assert place.state(pod) is State.QUEUED
        told = explanation(place.tessera.desk, place.row(pod))
        assert (told["class"], [one["code"] for one in told["reasons"]]) == ("wait", ["WaitingForAutoscale"])
        await place.wait(120)
        assert calls
        assert all(call == ("one", {"small": "GpusBusy"}) for call in calls)
        assert len(calls) <= 4
        assert [name for _, name in place.line.sent].count("one") == 2
        await arrives(place, "big", product="NVIDIA-H200")
        await place.until(lambda: "one" in place.bound(), 5)
        assert reserved(place) == ["one"]
        await place.wait(3)
        await place.check()


async def test_nothing_is_asked_where_no_queue_grows_or_no_group_would_do() -> None:
    async with growing() as place:
        await queue(place, "still")
        await held(place, "still", queue="still", gpus=8)
        await held(place, "large", queue="grows", gpus=9)
        await held(place, "elsewhere", queue="grows", gpus=8, nodeSelector={"pool": "old"})
        await place.wait(100)
        assert not out(place)
        await held(place, "one", queue="grows", gpus=8)
        await place.wait(40)
        assert out(place) == ["one"], "none of them could run on a node that is there"


async def test_who_would_fit_a_node_that_is_there_only_waits() -> None:
    async with growing(gpus=8) as place:
        await place.pod("full", gpus=6)
        await place.until(lambda: "full" in place.bound(), 5)
        first = await held(place, "first", queue="grows", gpus=8)
        await place.wait(2)
        behind = await held(place, "behind", queue="grows", gpus=2)
        await place.wait(40)
        assert out(place) == ["first"], "who is behind gets what is left when the first has its node"
        assert (word(place, first), word(place, behind)) == ("WaitingForAutoscale", "WaitingBehindPriority")
        await arrives(place, "b")
        await place.until(lambda: {"first", "behind"} <= place.bound().keys(), 5)
        assert (place.bound()["first"], place.bound()["behind"]) == ("b", "small")
        await place.wait(3)
        await place.check()


async def test_a_request_beyond_its_quota_is_not_let_go_whoever_asked_before_it() -> None:
    async with growing() as place:
        await queue(place, "root", nominal={"gpu": 16})
        for name in ("left", "right"):
            await queue(place, name, parent="root", autoscale=True)
        for number in range(2):
            for name in ("left", "right"):
                await held(place, f"{name}-{number}", queue=name, gpus=8)
        await place.wait(60)
        assert out(place) == ["left-0", "right-0"]
        for number in range(4):
            await arrives(place, f"b{number}")
        await place.wait(60)
        assert len(place.bound()) == 2
        await place.check()


async def test_those_behind_get_neither_the_new_node_nor_room_on_it_before_its_devices_are_there() -> None:
    async with growing(cpu="4") as place:
        await held(place, "first", queue="grows", gpus=8, cpu="60")
        await place.wait(33)
        assert out(place) == ["first"]
        assert place.tessera.desk.order.barriers["grows"], "it stands in the way at once, though no node could take it"
        for name, gpus in (("later", 4), ("cpu-only", 0)):
            pod = direct(name, gpus, "16")
            await place.world.cluster.create("pods", "default", pod)  # it comes as it is, and asks /filter by itself
        await held(place, "held", queue="grows", gpus=4)
        await place.wait(5)
        bare = machine("big", gpus=0)
        bare["metadata"]["labels"] |= {"pool": "new"}
        bare["metadata"]["labels"].pop("nvidia.com/gpu.product")
        bare["spec"]["taints"] = [{"key": READY, "effect": "NoSchedule"}]
        await place.world.cluster.create("nodes", "", bare)
        await place.wait(10)
        await place.world.cluster.patch("nodes", "", "big", {"spec": {"taints": None}})
        await place.wait(10)
        assert not place.bound(), "its devices are not there yet"
        there = machine("big")
        await place.world.cluster.patch("nodes", "", "big", {"metadata": {"labels": there["metadata"]["labels"]}})
        await place.wait(5)
        await place.world.cluster.patch("nodes", "", "big", {"status": there["status"]}, subresource="status")
        await place.until(lambda: "first" in place.bound(), 5)
        await place.wait(30)
        assert place.bound() == {"first": "big"}
        await place.check()


def direct(name: str, gpus: int, cpu: str) -> Object:
    pod = job(name, gpus=gpus, cpu=cpu)
    pod["metadata"]["labels"] = {"tessera.dev/queue": "grows"}
    return pod


async def test_a_gang_is_let_go_as_a_whole_and_only_where_all_of_it_would_fit() -> None:
    async with growing(GROUP.model_copy(update={"maxNodes": 3})) as place:
        for number in range(4):
            await held(place, f"large-{number}", queue="grows", gpus=8, gang=("large", 4))
        await place.wait(60)
        assert not out(place)
        for number in range(4):
            await place.delete(f"large-{number}")
        for number in range(3):
            await held(place, f"ring-{number}", queue="grows", gpus=8, gang=("ring", 3))
        await place.wait(40)
        assert out(place) == ["ring-0", "ring-1", "ring-2"]
        await arrives(place, "b0")
        await arrives(place, "b1")
        await place.wait(60)
        assert not place.bound()
        await arrives(place, "b2")
        await place.until(lambda: len(place.bound()) == 3, 10)
        await place.wait(3)
        await place.check()


async def test_a_gang_that_the_cluster_is_too_small_for_gets_the_nodes_that_it_lacks() -> None:
    async with growing(GROUP.model_copy(update={"maxNodes": 2}), gpus=8) as place:
        ring = [await held(place, f"ring-{number}", queue="grows", gpus=8, gang=("ring", 3)) for number in range(3)]
        await place.wait(20)
        assert {word(place, pod) for pod in ring} == {"ExceedsClusterSize"}
        await place.wait(15)
        assert {word(place, pod) for pod in ring} == {"WaitingForAutoscale"}
        assert out(place) == ["ring-0", "ring-1", "ring-2"]
        await arrives(place, "b0")
        await arrives(place, "b1")
        await place.until(lambda: len(place.bound()) == 3, 10)
        await place.wait(3)
        await place.check()


@pytest.mark.parametrize("point", ["", "release.ask.before", "release.ungate.before", "release.ungate.after"])
async def test_a_restart_in_between_loses_neither_the_pod_nor_its_turn(point: str) -> None:
    async with growing() as place:
        if point:
            place.kill_at(point, time=2)
        for number in range(3):
            await held(place, f"m{number}", queue="grows", gpus=8, gang=("ring", 3))
        if point:
            await place.until(lambda: place.app is None, 60)
            place.spare()
        else:
            await place.wait(60)
            place.kill()
        await place.wait(5)
        await place.start()
        await place.wait(40)
        assert out(place) == ["m0", "m1", "m2"]
        pods = [await place.get(f"m{number}") for number in range(3)]
        assert {word(place, pod) for pod in pods} == {"WaitingForAutoscale"}
        assert {condition(pod, "tessera.dev/Admitted")["reason"] for pod in pods} == {"WaitingForAutoscale"}
        later = direct("later", 1, "1")
        later["spec"]["nodeSelector"] = {"pool": "new"}
        await place.world.cluster.create("pods", "default", later)
        await place.wait(5)
        for number in range(3):
            await arrives(place, f"b{number}")
        await place.until(lambda: len(place.bound()) == 3, 10)
        await place.wait(30)
        assert "later" not in place.bound()
        await place.check()


async def test_after_a_while_nothing_is_asked_and_the_pod_waits_on_as_one_that_came_ungated() -> None:
    async with growing() as place:
        pod = await held(place, "one", queue="grows", gpus=8)
        await place.wait(60)
        place.kill()
        await place.wait(5)
        await place.start()
        await place.wait(300)
        second = await held(place, "second", queue="grows", gpus=8)
        await place.wait(300)
        assert word(place, pod) == word(place, second) == "WaitingForAutoscale"
        await place.wait(300)
        assert (word(place, pod), word(place, second)) == ("ExceedsNodeSize", "WaitingForAutoscale")
        told = explanation(place.tessera.desk, place.row(pod))["reasons"][0]
        assert told["text"].endswith(" A new node was asked for 15 min ago, and none that takes it has come.")
        assert " 15분 전에 새 노드를 요청했으나" in told["text_ko"]
        coming = explanation(place.tessera.desk, place.row(second))["reasons"]
        assert [one["code"] for one in coming] == ["WaitingForAutoscale"]
        assert "ago" not in coming[0]["text"]
        assert len(place.tessera.desk.order.barriers["grows"]) == 1, "of the second"
        await place.delete("second")
        await place.wait(5)
        assert not place.tessera.desk.order.barriers, "none could ever run, and for nobody a node is asked"
        writes = len(place.line.sent)
        await place.wait(600)
        assert len(place.line.sent) == writes, "it is not asked for again"
        await arrives(place, "big")
        await place.until(lambda: "one" in place.bound(), 5)
        await place.wait(3)
        await place.check()


async def test_no_more_are_asked_for_than_the_window_holds() -> None:
    async with growing(window=3) as place:
        names = [f"p{number}" for number in range(6)]
        for name in names:
            await held(place, name, queue="grows", gpus=8)
        await place.wait(90)
        assert out(place) == names[:3]
        for number in range(2):
            await arrives(place, f"b{number}")
        await place.wait(60)
        assert place.bound().keys() == {"p0", "p1"}
        assert out(place) == names[2:5]
        await place.check()
