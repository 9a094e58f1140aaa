"""Ordinary days: pods come, wait, are woken, leave; Tessera goes away and comes back."""

from __future__ import annotations

import orjson

from scheduler import GPU
from scheduler.model.reservation import State
from tests.simulation.town import annotation, job, machine, town


async def test_gpu_and_cpu_pods_are_bound_with_their_allocation() -> None:
    async with town("a", "b") as place:
        await place.node("plain", gpus=4, mode="observed")
        for name, gpus in (("eight", 8), ("two", 2), ("none", 0)):
            await place.pod(name, gpus=gpus)
        await place.until(lambda: len(place.bound()) == 3, 5)
        two = await place.get("two")
        allocation = orjson.loads(annotation(two))
        assert allocation["id"] == two["metadata"]["uid"]
        assert allocation["node"] == two["spec"]["nodeName"]
        grants = allocation["containers"]["main"]
        assert sum(grant.get("count", 1) for grant in grants) == 2
        assert orjson.loads(annotation(await place.get("none")))["containers"] == {}
        assert orjson.loads(annotation(await place.get("eight")))["mode"] == "exact"
        await place.wait(5)
        assert place.row(two).state is State.RUNNING
        await place.check()


async def test_a_pod_that_fits_again_after_a_departure_is_bound_within_a_second() -> None:
    async with town("a") as place:
        await place.pod("first", gpus=8)
        await place.until(lambda: "first" in place.bound(), 5)
        await place.pod("second", gpus=4)
        await place.wait(60)
        assert place.bound().keys() == {"first"}
        await place.delete("first")
        assert await place.until(lambda: "second" in place.bound(), 5) <= 1.0
        await place.wait(3)
        await place.check()


async def test_a_pod_that_waited_through_a_busy_hour_is_woken_as_quickly() -> None:
    async with town("a") as place:
        await place.pod("first", gpus=8)
        await place.until(lambda: "first" in place.bound(), 5)
        await place.pod("second", gpus=8)
        for number in range(30):  # each of these events lets kube-scheduler ask in vain
            await place.pod(f"small-{number}", gpus=0)
            await place.wait(60)
        await place.delete("first")
        assert await place.until(lambda: "second" in place.bound(), 15) <= 1.0


async def test_after_a_minute_down_everything_is_bound_within_15_seconds() -> None:
    async with town("a", "b") as place:
        await place.pod("before", gpus=4)
        await place.until(lambda: "before" in place.bound(), 5)
        await place.stop()
        for number in range(8):
            await place.pod(f"meanwhile-{number}", gpus=1)
        foreign = {**job("foreign", gpus=0), "spec": {**job("foreign", gpus=0)["spec"], "schedulerName": "other"}}
        await place.world.cluster.create("pods", "default", foreign)
        await place.delete("before")
        await place.wait(60)
        assert place.bound() == {}
        await place.start()
        await place.until(lambda: len(place.bound()) == 8, 15)
        assert await place.node_of("foreign") == ""
        await place.wait(5)
        await place.check()


async def test_a_foreign_pod_on_an_exact_node_blocks_devices_there_and_nothing_else() -> None:
    async with town("a") as place:
        raw = job("foreign", gpus=1, nodeName="a")
        raw["spec"]["schedulerName"] = "other"
        await place.world.cluster.create("pods", "default", raw)
        await place.wait(2)
        await place.pod("wants-gpu", gpus=1)
        await place.pod("wants-cpu", gpus=0)
        await place.wait(30)
        assert place.bound().keys() == {"foreign", "wants-cpu"}
        await place.delete("foreign")
        await place.until(lambda: "wants-gpu" in place.bound(), 15)
        await place.wait(3)
        await place.check()


async def test_an_empty_ledger_adopts_what_is_bound() -> None:
    async with town("a", started=False) as place:
        async with town("a", seed=2) as other:
            await other.pod("old", gpus=3)
            await other.until(lambda: "old" in other.bound(), 5)
            await other.wait(3)
            pods = other.world.cluster.snapshot("pods")
        place.world.cluster.preload("pods", pods)
        await place.start()
        await place.pod("new", gpus=6)
        await place.pod("fits", gpus=5)
        await place.until(lambda: "fits" in place.bound(), 15)
        await place.wait(5)
        assert place.row(await place.get("old")).state is State.RUNNING
        assert place.bound().keys() == {"old", "fits"}
        await place.check()


async def test_a_deleted_and_recreated_pod_of_the_same_name_is_another_request() -> None:
    async with town("a") as place:
        first = await place.pod("same", gpus=8)
        await place.until(lambda: "same" in place.bound(), 5)
        await place.delete("same")
        second = await place.pod("same", gpus=8)
        await place.until(lambda: place.state(second) is State.RUNNING, 15)
        await place.wait(3)
        assert place.row(first).state is State.RELEASED
        await place.check()


async def test_a_node_recreated_under_its_name_starts_empty() -> None:
    async with town("a") as place:
        old = await place.pod("old", gpus=8)
        await place.until(lambda: "old" in place.bound(), 5)
        await place.world.cluster.delete("nodes", "", "a")
        await place.delete("old")
        await place.world.cluster.create("nodes", "", machine("a", gpus=4))
        await place.pod("new", gpus=4)
        await place.until(lambda: "new" in place.bound(), 15)
        await place.wait(3)
        assert place.row(old).state is State.RELEASED
        await place.check()


async def test_a_node_that_vanishes_and_returns_serves_those_who_waited() -> None:
    async with town("a") as place:
        await place.world.cluster.patch("nodes", "", "a", {"spec": {"unschedulable": True}})
        await place.pod("waits", gpus=1)
        await place.wait(10)
        await place.world.cluster.delete("nodes", "", "a")
        await place.wait(10)
        assert place.bound() == {}
        await place.node("b")
        await place.until(lambda: "waits" in place.bound(), 15)
        await place.wait(3)
        await place.check()


async def test_labels_of_gpus_decide_as_before_when_a_node_loses_devices() -> None:
    async with town("a") as place:
        await place.pod("holds", gpus=6)
        await place.until(lambda: "holds" in place.bound(), 5)
        body = {"status": {"allocatable": {GPU: "7"}}}
        await place.world.cluster.patch("nodes", "", "a", body, subresource="status")
        await place.pod("two", gpus=2)
        await place.wait(20)
        assert "two" not in place.bound()
        await place.delete("two")
        await place.pod("one", gpus=1)
        await place.until(lambda: "one" in place.bound(), 15)
        await place.wait(3)
        await place.check()
