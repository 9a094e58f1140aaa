"""Waking what fits again: who is nudged, when, and who is left alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from scheduler import RETRY
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.ids import seeded_ids
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.registry import Source
from scheduler.kube.port import Kind, Object, PatchBody
from scheduler.ledger.ledger import advance
from scheduler.model.pod import Pod
from scheduler.model.reservation import Event
from scheduler.waking import LONGEST_S, Waker
from tests.objects import raw_node, raw_pod
from tests.virtual import virtual

PARKED = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]


class Ticking(LoopClock):
    """A clock on which every look costs time, as it does on a busy machine."""

    tick_s = 0.0
    _ticks = 0

    def monotonic(self) -> float:
        self._ticks += 1
        return super().monotonic() + self._ticks * self.tick_s


class Hanging(EmbeddedCluster):
    """An API server that never answers a patch of certain pods."""

    mute = ""

    async def patch(self, kind: Kind, namespace: str, name: str, body: PatchBody, **how: Any) -> Object:
        if name == self.mute:
            await self._clock.sleep(3600)
        return await super().patch(kind, namespace, name, body, **how)


@dataclass
class Room:
    """A desk with four GPUs on one of two nodes, its waker, and the API server that is nudged."""

    clock: Ticking
    cluster: Hanging
    desk: Desk
    waker: Waker

    async def pod(self, name: str, gpus: int = 1, *, parked: bool = True, claims: object = None) -> Pod:
        raw = raw_pod(name, gpus)
        del raw["metadata"]["uid"], raw["metadata"]["resourceVersion"]
        if claims is not None:
            raw["spec"]["resourceClaims"] = claims
        made = await self.cluster.create("pods", "default", raw)
        if parked:
            body = {"status": {"conditions": PARKED}}
            made = await self.cluster.patch("pods", "default", name, body, subresource="status")
        pod = read_pod(made)
        self.desk.registry.put_pod(pod)
        return pod

    async def nudges(self, name: str) -> str:
        made: Object = await self.cluster.get("pods", "default", name)
        note: str = made["metadata"].get("annotations", {}).get(RETRY, "")
        return note


@asynccontextmanager
async def room() -> AsyncIterator[Room]:
    clock = Ticking(asyncio.get_running_loop())
    cluster = Hanging(clock, seeded_ids(random.Random(1)))
    desk = Desk(clock, Policies(), fence=3)
    for name, gpus in (("a", 4), ("b", 0)):
        node = read_node(raw_node(name, gpus=gpus), {})
        assert node is not None
        desk.registry.put_node(node)
    yield Room(clock, cluster, desk, Waker(desk, cluster, clock))


@virtual(room)
async def test_what_fits_again_is_woken_once_and_its_room_is_kept(here: Room) -> None:
    first, second = await here.pod("first", 4, parked=False), await here.pod("second", 4)
    here.desk.claim(first, "a")
    here.waker.watch(second)
    await here.waker.step()
    assert await here.nudges("second") == ""
    here.desk.registry.unsay(first.uid, Source.CLAIMED)
    await here.waker.step()
    nudge = await here.nudges("second")
    assert nudge
    assert here.desk.filter(await here.pod("third", 1, parked=False), ["a"]).reason == "GpusBusy"
    await here.waker.step()
    assert await here.nudges("second") == nudge


@virtual(room)
async def test_a_pod_that_was_woken_thousands_of_times_stops_nobody(here: Room) -> None:
    """Its volume never comes: kube-scheduler refuses it every time."""
    stuck = await here.pod("stuck", 1)
    here.waker.watch(stuck)
    here.waker._tries[stuck.uid] = (5000, 0.0)
    await here.waker.step()
    assert await here.nudges("stuck")
    times, not_before_s = here.waker._tries[stuck.uid]
    assert times == 5001
    assert not_before_s <= here.clock.monotonic() + LONGEST_S


@virtual(room)
async def test_a_pod_whose_bind_is_under_way_is_left_alone(here: Room) -> None:
    """A nudge raises the resourceVersion and would void the Binding."""
    pod = await here.pod("one", 1)
    here.waker.watch(pod)
    here.desk.claim(pod, "a")
    await here.waker.step()
    assert await here.nudges("one") == ""
    assert here.desk.intents.get(pod.uid) is None


@virtual(room)
async def test_room_that_is_freed_before_the_refusal_is_heard_of_is_not_missed(here: Room) -> None:
    first, second = await here.pod("first", 4, parked=False), await here.pod("second", 4)
    here.desk.claim(first, "a")
    assert here.desk.filter(second, ["a", "b"]).reason == "GpusBusy"
    here.desk.registry.unsay(first.uid, Source.CLAIMED)
    await here.waker.step()
    here.waker.watch(second)  # the watch tells only now that kube-scheduler has parked it
    await here.waker.step()
    assert await here.nudges("second")


@virtual(room)
async def test_a_pod_refused_while_nothing_is_freed_costs_no_look_at_the_others(here: Room) -> None:
    first, second = await here.pod("first", 4, parked=False), await here.pod("second", 4)
    here.desk.claim(first, "a")
    await here.waker.step()
    assert here.desk.filter(second, ["a", "b"]).reason == "GpusBusy"
    here.waker.watch(second)
    here.desk.asks = None  # type: ignore[assignment]  # whoever judges anew fails
    await here.waker.step()
    assert await here.nudges("second") == ""


@virtual(room)
async def test_a_pod_refused_in_its_back_off_is_woken_when_that_ends(here: Room) -> None:
    pod = await here.pod("one", 1)
    row = here.desk.claim(pod, "a")[-1].after
    void = advance(row, Event.VOID, now_us=here.clock.wall_us(), fence=3)
    here.desk.book.apply((void,))
    here.desk.registry.unsay(pod.uid, Source.CLAIMED)
    await here.waker.step()
    assert here.desk.filter(pod, ["a"]).reason == "BackingOff"
    here.waker.watch(pod)
    await here.waker.step()
    assert await here.nudges("one") == ""
    await here.clock.sleep(1.1)
    await here.waker.step()
    assert await here.nudges("one")


@virtual(room)
async def test_a_pod_whose_intent_came_to_nothing_is_woken_again(here: Room) -> None:
    """Somebody's answer was lost; only this node would do, and it is left out for a minute."""
    pod = await here.pod("one", 4)
    assert here.desk.filter(pod, ["a"]).names == ["a"]
    here.waker.watch(pod)
    for _ in range(800):
        await here.clock.sleep(0.1)
        await here.waker.step()
    assert await here.nudges("one")
    assert here.desk.filter(pod, ["a"]).names == ["a"]


@virtual(room)
async def test_a_pod_that_goes_while_others_are_judged_gets_no_room(here: Room) -> None:
    here.clock.tick_s = 0.05  # so the loop turns between two pods
    pods = [await here.pod(f"p{number}", 1) for number in range(3)]
    for pod in pods:
        here.waker.watch(pod)

    async def leave() -> None:
        here.desk.registry.remove_pod(pods[2].uid)
        here.waker.forget(pods[2].uid)

    leaving = asyncio.ensure_future(leave())
    await here.waker.step()
    await leaving
    assert here.desk.intents.get(pods[0].uid) is not None
    assert here.desk.intents.get(pods[2].uid) is None
    assert here.desk.registry.held(pods[2].uid) is None
    assert pods[2].uid not in here.waker._tries


@virtual(room)
async def test_a_nudge_that_hangs_holds_up_the_others_for_seconds_only(here: Room) -> None:
    stuck, other = await here.pod("stuck", 2), await here.pod("other", 2)
    here.cluster.mute = "stuck"
    here.waker.watch(stuck)
    began_s = here.clock.monotonic()
    await here.waker.step()
    assert here.clock.monotonic() - began_s < 5
    assert here.desk.registry.held(stuck.uid) is None
    here.waker.watch(other)
    await here.waker.step()
    assert await here.nudges("other")


@virtual(room)
async def test_a_nudge_that_fails_gives_the_room_back(here: Room) -> None:
    pod = await here.pod("one", 4)
    here.waker.watch(pod)
    await here.cluster.delete("pods", "default", "one", grace_s=0)
    await here.waker.step()
    assert here.desk.registry.held(pod.uid) is None


@virtual(room)
async def test_pods_with_resource_claims_keep_no_room(here: Room) -> None:
    """They were never refused here: kube-scheduler decides and wakes them by itself."""
    pod = await here.pod("claims", 1, claims=[{"name": "gpu", "resourceClaimName": "mine"}])
    here.waker.watch(pod)
    await here.waker.step()
    assert here.desk.registry.held(pod.uid) is None
    assert await here.nudges("claims") == ""


@pytest.mark.parametrize("how", [{"node": "a"}, {"phase": "Failed"}, {"scheduler": "other"}])
def test_who_is_bound_ended_or_not_ours_is_not_waiting(how: dict[str, str]) -> None:
    loop = VirtualLoop()
    clock = LoopClock(loop)
    waker = Waker(Desk(clock, Policies()), EmbeddedCluster(clock, seeded_ids(random.Random(1))), clock)
    raw = raw_pod("one", 1, **how)  # type: ignore[arg-type]
    raw["status"]["conditions"] = PARKED
    waker.waiting["uid-one"] = None
    waker.watch(read_pod(raw))
    assert not waker.waiting
    loop.close()
