"""The turn on the live state, where others are at work at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.ledger.ledger import advance
from scheduler.ledger.taking import newborn
from scheduler.model.pod import Pod
from scheduler.model.queue import Queue, Selector
from scheduler.model.reservation import Change, Event, State
from scheduler.queueing.turn import Amounts, Barrier
from scheduler.settling import Settler
from scheduler.turning import BROKEN_S, HOPS, Turner
from tests.objects import raw_node, raw_pod
from tests.virtual import virtual


class Slow:
    """A writer that takes its time once it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def commit(self, changes: tuple[Change, ...]) -> None:
        await self.go.wait()

    async def close(self) -> None: ...


@dataclass
class Place:
    """A desk with one node of eight GPUs, and who works at it."""

    desk: Desk
    writer: Slow
    settler: Settler
    turner: Turner
    pods: dict[str, Pod] = field(default_factory=dict)


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    clock, writer = LoopClock(asyncio.get_running_loop()), Slow()
    desk = Desk(clock, Policies(), fence=1)
    node = read_node(raw_node("a", gpus=8), {})
    assert node is not None
    desk.registry.put_node(node)
    cluster = EmbeddedCluster(clock, iter(map(str, range(1000))).__next__)
    settler = Settler(desk, cluster, writer, clock, lambda _: None)
    turner = Turner.of(desk, cluster, writer, settler, clock, Settings())
    yield Place(desk, writer, settler, turner)


@virtual(place)
async def test_a_reservation_that_is_given_up_slowly_takes_nothing_from_the_next_one(here: Place) -> None:
    desk, one = here.desk, read_pod(raw_pod("one", 4))
    desk.registry.put_pod(one)
    reserved = desk.reserve(one)
    assert reserved is not None
    desk.order.astray[one.uid] = reserved[0][-1].after.epoch, "NominationRefused"
    here.writer.go.clear()
    settling = asyncio.get_running_loop().create_task(here.settler.settle(one.uid))
    await desk.clock.sleep(2.0)
    row = desk.book.rows[one.uid]
    assert row.state is State.QUEUED
    assert row.not_before_us <= desk.clock.wall_us(), "its back-off is over, its commit is not"
    assert not here.turner._may(one, row), "whoever gives it up is not done yet"
    assert desk.reserve(one) is not None, "even so, what is reserved now"
    here.writer.go.set()
    await settling
    assert desk.registry.held(one.uid) is not None, "stays"
    assert desk.registry.snapshot().gpus_free.tolist()[0] == 4


@virtual(place)
async def test_who_is_gone_stands_in_nobodys_way(here: Place) -> None:
    here.desk.order.barriers = {"default": ()}
    await here.turner.step()
    assert not here.desk.order.barriers


def wait(here: Place, name: str, gpus: int, *, queue: str = "default") -> Pod:
    """Let a pod wait for a turn."""
    raw, desk = raw_pod(name, gpus), here.desk
    raw["metadata"]["labels"] = {"tessera.dev/queue": queue}
    pod = read_pod(raw)
    desk.registry.put_pod(pod)
    now_us = desk.clock.wall_us()
    born = newborn(pod.request, fence=1, now_us=now_us)
    desk.book.apply((advance(None, Event.SUBMIT, now_us=now_us, fence=1, born=born),))
    here.turner.waiting[pod.uid] = None
    here.turner.ring()
    return pod


@virtual(place)
async def test_a_turn_that_new_nodes_end_leaves_nothing_about_them_and_the_next_one_comes_at_once(here: Place) -> None:
    desk, turner = here.desk, here.turner
    new = [node for name, gpus in (("plain", 0), ("more", 8)) if (node := read_node(raw_node(name, gpus=gpus), {}))]
    desk.registry.put_node(new[0])
    desk.called_s, turner.slice_s = desk.clock.monotonic(), -1.0  # others come in after each decision
    for name in ("a", "b", "d"):
        wait(here, name, 8)
    turner.bell.clear()
    taking = asyncio.get_running_loop().create_task(turner.step())
    while "uid-b" not in desk.order.words:
        await desk.clock.sleep(0)
    desk.registry.put_node(new[1])
    await taking
    assert desk.book.rows["uid-d"].state is State.QUEUED
    between = read_pod(raw_pod("c", 0))
    assert desk.filter(between, ["plain", "more"]).reason == "WaitingBehindPriority"
    assert turner.bell.is_set()
    await turner.step()
    assert desk.book.rows["uid-b"].node == "more"


@virtual(place)
async def test_a_pod_that_no_decision_can_be_made_about_is_passed_over_until_it_changes(here: Place) -> None:
    desk, turner = here.desk, here.turner
    right = desk.reserve

    def reserve(pod: Pod, barrier: Barrier | None = None) -> tuple[tuple[Change, ...], Amounts] | None:
        if pod.uid == "uid-b":
            raise ZeroDivisionError
        return right(pod, barrier)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Desk, "reserve", lambda _, pod, barrier=None: reserve(pod, barrier))
        desk.called_s = desk.clock.monotonic()
        for name in "abc":
            wait(here, name, 1)
        for _ in range(2):
            await turner.step()
    assert [desk.book.rows[f"uid-{name}"].state for name in "abc"] == [State.RESERVED, State.QUEUED, State.RESERVED]
    assert desk.registry.poison == {("pods", "uid-b")}
    assert turner.releaser.pending.keys() == {"uid-a", "uid-c"}
    desk.registry.poison.clear()
    turner.ring()
    await turner.step()
    assert desk.book.rows["uid-b"].state is State.RESERVED


@virtual(place)
async def test_what_was_claimed_before_a_turn_failed_is_committed_and_let_go(here: Place) -> None:
    desk, turner = here.desk, here.turner
    desk.called_s = desk.clock.monotonic()
    for name, gpus in (("a", 1), ("b", 8)):
        wait(here, name, gpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Turner, "could", lambda *_: 1 // 0)
        await turner.step()
    assert desk.book.rows["uid-a"].state is State.RESERVED
    assert turner.releaser.pending.keys() == {"uid-a"}
    await desk.clock.sleep(BROKEN_S)
    await turner.step()
    assert desk.order.words["uid-b"] == "WaitingForCapacity"


@virtual(place)
async def test_what_a_bug_keeps_out_of_the_ledger_does_not_stay_in_memory(here: Place) -> None:
    desk, turner = here.desk, here.turner
    desk.called_s = desk.clock.monotonic()
    wait(here, "a", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slow, "commit", lambda *_: 1 // 0)
        await turner.step()
    assert desk.book.rows["uid-a"].state is State.QUEUED
    assert desk.registry.held("uid-a") is None


@virtual(place)
async def test_who_goes_while_all_are_lined_up_is_not_decided(here: Place) -> None:
    desk, turner = here.desk, here.turner
    desk.called_s, turner.slice_s = desk.clock.monotonic(), -1.0
    for name in "abc":
        wait(here, name, 1)
    taking = asyncio.get_running_loop().create_task(turner.step())
    await desk.clock.sleep(0)
    assert turner.decided == 0, "others come in before the first decision"
    desk.registry.remove_pod("uid-a")
    turner.forget("uid-a")
    await taking
    assert [desk.book.rows[f"uid-{name}"].state for name in "abc"] == [State.QUEUED, State.RESERVED, State.RESERVED]


@virtual(place)
async def test_a_queue_may_go_while_all_are_lined_up(here: Place) -> None:
    desk, turner = here.desk, here.turner
    desk.called_s, turner.slice_s = desk.clock.monotonic(), -1.0
    desk.queues.replace([(Queue("left", namespaces=Selector()), "")])
    for name in "abc":
        wait(here, name, 1, queue="left")
    taking = asyncio.get_running_loop().create_task(turner.step())
    for _ in range(HOPS + 2):  # the first is lined up
        await desk.clock.sleep(0)
    desk.queues.drop("left")
    await taking
    assert (turner.decided, turner.bell.is_set()) == (0, True)
    await turner.step()
    assert set(desk.order.words.values()) == {"QueueNotFound"}
