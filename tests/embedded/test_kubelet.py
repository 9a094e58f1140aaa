"""The paper kubelet: pods start, end, leave, and a restart loses nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.injected import Faults, Rates
from scheduler.embedded.kubelet import RUNTIME, Kubelet
from scheduler.ids import seeded_ids
from scheduler.kube.port import NotFound, Object
from tests.embedded.stage import job, machine


class Floor:
    """A cluster with one node and its kubelet."""

    def __init__(self, faults: Faults | None = None, heartbeat_s: float = 0.0) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        self.cluster = EmbeddedCluster(self.clock, seeded_ids(random.Random(1)))
        self.cluster.preload("nodes", [machine("n")])
        self.cluster.faults = faults
        self.kubelet = Kubelet(self.cluster, self.clock, heartbeat_s=heartbeat_s)

    async def bound(self, name: str, runtime: str = "") -> None:
        body = job(name)
        if runtime:
            body["metadata"]["annotations"] = {RUNTIME: runtime}
        self.cluster.preload("pods", [body])
        await self.cluster.bind("default", name, {"metadata": {"name": name}, "target": {"name": "n"}})

    def phase(self, name: str) -> str:
        phases: dict[str, str] = {
            pod["metadata"]["name"]: pod["status"]["phase"] for pod in self.cluster.snapshot("pods")
        }
        return phases.get(name, "gone")


@asynccontextmanager
async def floor(faults: Faults | None = None, heartbeat_s: float = 0.0) -> AsyncIterator[Floor]:
    made = Floor(faults, heartbeat_s)
    made.kubelet.start()
    try:
        yield made
    finally:
        await made.kubelet.stop()


async def test_a_bound_pod_runs_and_an_unbound_one_waits() -> None:
    async with floor() as made:
        await made.bound("a")
        made.cluster.preload("pods", [job("b")])
        assert made.phase("a") == "Pending"
        await made.clock.sleep(2)
        assert (made.phase("a"), made.phase("b")) == ("Running", "Pending")
        pod = await made.cluster.get("pods", "default", "a")
        conditions = {one["type"]: one["status"] for one in pod["status"]["conditions"]}
        assert conditions == {"PodScheduled": "True", "Ready": "True"}
        await made.clock.sleep(10_000)
        assert made.phase("a") == "Running"


async def test_a_pod_succeeds_after_its_time() -> None:
    async with floor() as made:
        await made.bound("a", "60")
        await made.clock.sleep(58)
        assert made.phase("a") == "Running"
        await made.clock.sleep(5)
        assert made.phase("a") == "Succeeded"


async def test_an_unreadable_time_is_for_ever() -> None:
    async with floor() as made:
        await made.bound("a", "soon")
        await made.clock.sleep(10_000)
        assert made.phase("a") == "Running"


async def test_a_deleted_pod_leaves() -> None:
    async with floor() as made:
        await made.bound("a", "60")
        await made.clock.sleep(5)
        await made.cluster.delete("pods", "default", "a")
        assert made.phase("a") == "Running"
        await made.clock.sleep(3)
        assert made.phase("a") == "gone"


async def test_a_pod_deleted_before_it_ran_never_runs() -> None:
    async with floor() as made:
        await made.bound("a")
        await made.cluster.delete("pods", "default", "a")
        since = made.clock.monotonic()
        while made.phase("a") != "gone":
            assert made.phase("a") == "Pending"
            assert made.clock.monotonic() < since + 5
            await made.clock.sleep(0.1)


async def test_a_pod_that_somebody_ended_before_it_ran_stays_ended() -> None:
    async with floor() as made:
        await made.bound("a")
        ended = {"status": {"phase": "Succeeded"}}
        await made.cluster.patch("pods", "default", "a", ended, subresource="status")
        await made.clock.sleep(10)
        assert made.phase("a") == "Succeeded"


async def test_a_restarted_kubelet_remembers_nothing_and_loses_nothing() -> None:
    async with floor() as made:
        await made.bound("a", "60")
        await made.bound("b")
        await made.clock.sleep(30)
        await made.kubelet.stop()
        await made.cluster.delete("pods", "default", "b")
        made.kubelet.start()
        await made.clock.sleep(25)
        assert (made.phase("a"), made.phase("b")) == ("Running", "gone")
        await made.clock.sleep(10)
        assert made.phase("a") == "Succeeded"


async def test_a_pod_made_again_has_a_life_of_its_own() -> None:
    async with floor() as made:
        await made.bound("a", "60")
        await made.clock.sleep(50)
        await made.cluster.delete("pods", "default", "a", grace_s=0)
        await made.bound("a", "60")
        await made.clock.sleep(30)
        assert made.phase("a") == "Running"


@pytest.mark.parametrize("seed", range(3))
async def test_trouble_delays_and_loses_nothing(seed: int) -> None:
    bad = Rates(conflict=0.1, throttled=0.1, failed=0.1, lost_reply=0.1)
    faults = Faults(random.Random(seed), rates={"patch": bad, "delete": bad, "get": bad, "list": bad}, watch_end=0.1)
    async with floor() as made:
        for number in range(20):
            await made.bound(f"pod-{number}", "30")
        made.cluster.faults = faults
        await made.clock.sleep(120)
        assert {made.phase(f"pod-{number}") for number in range(20)} == {"Succeeded"}


async def test_heartbeats_change_only_their_time() -> None:
    async with floor(heartbeat_s=10) as made:
        await made.clock.sleep(25)
        (node,) = made.cluster.snapshot("nodes")
        (ready,) = node["status"]["conditions"]
        assert (ready["status"], ready["lastHeartbeatTime"]) == ("True", "2026-01-01T00:00:20Z")


async def test_a_callable_may_say_how_long_pods_run() -> None:
    async with floor() as made:
        await made.kubelet.stop()

        def five(pod: Object) -> float:
            return 5.0

        made.kubelet = Kubelet(made.cluster, made.clock, runtime=five, start_s=0.5)
        made.kubelet.start()
        await made.bound("a")
        await made.clock.sleep(7)
        assert made.phase("a") == "Succeeded"
        await made.cluster.delete("pods", "default", "a")
        with pytest.raises(NotFound):
            await made.cluster.get("pods", "default", "a")
