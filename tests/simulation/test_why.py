"""Why held pods wait, end to end on the embedded cluster: reasons in order, place in line, and changes that work."""

from __future__ import annotations

from typing import Any

from scheduler import GATE
from scheduler.kube.port import Object
from scheduler.model.queue import Queue, Selector
from scheduler.web.explanation import explanation
from tests.simulation.test_queue_way import HELD, held, limit
from tests.simulation.town import Town, job, town

ALL = Selector()


def why(place: Town, pod: Object) -> dict[str, Any]:
    return explanation(place.tessera.desk, place.row(pod))


def codes(found: dict[str, Any]) -> list[str]:
    return [reason["code"] for reason in found["reasons"]]


async def test_quota_capacity_line_and_gang_are_told_with_what_helps() -> None:
    async with town("a") as place:
        limit(place, Queue("small", nominal={"gpu": 2}, namespaces=ALL))
        await held(place, "uses", queue="small", gpus=2)
        await place.until(lambda: "uses" in place.bound(), 5)
        quota = await held(place, "quota", queue="small", gpus=1)
        await place.wait(1.1)
        behind_quota = await held(place, "quota-2", queue="small", gpus=1)
        head = await held(place, "head", gpus=8)
        await place.wait(1.1)
        behind = await held(place, "next", gpus=1)
        gang = [await held(place, f"ring-{number}", gang=("ring", 3)) for number in range(2)]
        await place.wait(3)

        found = why(place, quota)
        assert (found["class"], codes(found)[0]) == ("wait", "WaitingForQuota")
        assert found["reasons"][0]["text"].endswith("Queue small lacks 1 gpu.")
        assert "부족한 양: 1 gpu" in found["reasons"][0]["text_ko"]
        assert found["changes"] == [{"change": "raise the quota of queue small by gpu 1", "nodes": 1}]
        assert (found["position"], found["waiting"], found["waiting_overall"]) == (1, 2, 6)
        second = why(place, behind_quota)
        assert codes(second) == ["WaitingForQuota", "WaitingBehindPriority"]
        assert second["changes"] == []  # no single change takes the first one out of its way

        found = why(place, head)
        assert (codes(found)[0], found["position"]) == ("WaitingForCapacity", 1)
        assert found["funnel"][0]["nodes"] == 1
        assert found["funnel"][-1]["nodes"] == 0
        assert found["changes"] == [{"change": "ask for 6 instead of 8 GPUs", "nodes": 1}]

        found = why(place, behind)
        assert codes(found) == ["WaitingBehindPriority"]
        assert found["reasons"][0]["text"].endswith("It is number 2 of 4 in queue default.")
        assert (found["position"], found["waiting"]) == (2, 4)
        assert found["changes"] == []  # it would fit, but for the one before it

        found = why(place, gang[1])
        assert codes(found)[0] == "WaitingForGang"
        assert found["reasons"][0]["text"].endswith("2 of 3 are there, 2 of them ready.")
        assert found["changes"] == []
        for pod in (quota, head, behind, *gang):
            assert not any(name in str(why(place, pod)["reasons"]) for name in ("uses", "ring-", "next", "head"))


async def test_a_change_that_is_offered_works() -> None:
    async with town("a", "b") as place:
        limit(place, Queue("root"), Queue("low", "root", nominal={"gpu": 2}, borrow_limit={"gpu": 0}, namespaces=ALL))
        await held(place, "uses", queue="low", gpus=2)
        await place.until(lambda: "uses" in place.bound(), 5)
        waits = await held(place, "waits", queue="low", gpus=3)
        await place.wait(3)
        found = why(place, waits)
        assert codes(found)[0] == "ExceedsQuotaLimit"
        assert found["class"] == "change"
        assert found["reasons"][0]["text"].endswith("Queue low could never have 1 gpu of it.")
        assert found["changes"] == [{"change": "raise the quota of queue low by gpu 3", "nodes": 2}]
        limit(place, Queue("root"), Queue("low", "root", nominal={"gpu": 4}, borrow_limit={"gpu": 0}, namespaces=ALL))
        await place.wait(5)
        assert "waits" not in place.bound()
        limit(place, Queue("root"), Queue("low", "root", nominal={"gpu": 5}, borrow_limit={"gpu": 0}, namespaces=ALL))
        await place.until(lambda: "waits" in place.bound(), 5)
        assert why(place, waits)["class"] is None


async def test_all_that_blocks_is_told_and_what_must_go_first_comes_first() -> None:
    async with town("a") as place:
        limit(place, Queue("none", nominal={"gpu": 0}, namespaces=ALL), Queue("shut", namespaces=ALL, stopped=True))
        await place.pod("full", gpus=8)
        await place.until(lambda: "full" in place.bound(), 5)
        gates = [*HELD, {"name": "example.com/other"}]
        pods = [
            await held(place, "both", queue="none", schedulingGates=gates),
            await held(place, "shut", queue="shut", schedulingGates=gates, gpus=99),
            await held(place, "large", queue="none", gpus=99, gang=("g", 2)),
        ]
        await place.wait(3)
        assert [codes(why(place, pod)) for pod in pods] == [
            ["ExceedsQuotaLimit", "WaitingForGate", "WaitingForCapacity", "GpusBusy"],
            ["QueueStopped", "ExceedsNodeSize", "WaitingForGate"],
            ["ExceedsQuotaLimit", "ExceedsNodeSize", "WaitingForGang"],
        ]
        assert all(why(place, pod)["changes"] == [] for pod in pods)


async def test_a_gang_member_that_is_not_ready_is_not_counted_as_ready() -> None:
    async with town("a") as place:
        first = await held(place, "one", gang=("ring", 2))
        second = job("two", schedulingGates=[{"name": GATE}, {"name": "example.com/other"}])
        second["metadata"]["annotations"] = {"tessera.dev/gang": "ring", "tessera.dev/gang-size": "2"}
        await place.world.cluster.create("pods", "default", second)
        await place.wait(3)
        assert why(place, first)["reasons"][0]["text"].endswith("2 of 2 are there, 1 of them ready.")


async def test_describe_tells_why_a_held_pod_waits() -> None:
    async with town("a") as place:
        limit(place, Queue("small", nominal={"gpu": 1}, namespaces=ALL))
        await held(place, "uses", queue="small")
        await place.until(lambda: "uses" in place.bound(), 5)
        pod = await held(place, "waits", queue="small")
        await held(place, "gates", schedulingGates=[*HELD, {"name": "example.com/other"}])
        await place.wait(30)
        told = {one["regarding"]["name"]: one for one in place.world.cluster.snapshot("events")}
        assert {name: one["reason"] for name, one in told.items()} == {
            "waits": "WaitingForQuota",
            "gates": "WaitingForGate",
        }
        assert told["waits"]["regarding"]["uid"] == pod["metadata"]["uid"]
        await place.delete("uses")
        await place.until(lambda: "waits" in place.bound(), 5)
        await place.wait(30)
        assert len(place.world.cluster.snapshot("events")) == 2


async def test_a_gang_is_told_what_would_admit_all_of_it() -> None:
    async with town("a", "b") as place:
        for name in ("x", "y"):
            await place.pod(name, gpus=4, nodeSelector={"kubernetes.io/hostname": {"x": "a", "y": "b"}[name]})
        await place.until(lambda: len(place.bound()) == 2, 5)
        gang = [await held(place, f"ring-{number}", gpus=6, gang=("ring", 3)) for number in range(3)]
        await place.wait(3)
        for pod in gang:
            assert why(place, pod)["changes"] == [
                {"change": "ask for 2 instead of 6 GPUs in each pod of the gang", "nodes": 2}
            ]
        for number in range(3):
            await place.delete(f"ring-{number}")
            await held(place, f"less-{number}", gpus=2, gang=("less", 3))
        await place.until(lambda: {f"less-{number}" for number in range(3)} <= place.bound().keys(), 10)
        limit(place, Queue("small", nominal={"gpu": 1}, namespaces=ALL))
        poor = [await held(place, f"poor-{number}", gpus=1, queue="small", gang=("poor", 2)) for number in range(2)]
        await place.wait(3)
        found = why(place, poor[1])
        assert codes(found)[0] == "ExceedsQuotaLimit"
        assert found["changes"] == [
            {"change": "raise the quota of queue small by gpu 1", "nodes": found["changes"][0]["nodes"]}
        ]
        incomplete = await held(place, "lonely", gpus=1, gang=("alone", 2))
        await place.wait(3)
        assert why(place, incomplete)["changes"] == []
