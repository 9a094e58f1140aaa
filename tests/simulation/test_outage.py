"""The store or the API server is away for a minute: who comes is held, nothing is lost, and all go on by arrival."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import orjson
import pytest

from scheduler import GATE
from scheduler.breaker import OPEN_S, Phase
from scheduler.embedded.injected import Rates
from scheduler.kube.port import Object
from scheduler.ledger import ledger, reconcile
from scheduler.model.reservation import State
from scheduler.store.store import Store
from scheduler.waiting import unwritten
from scheduler.web.explanation import explanation
from tests.simulation.slow_disk import SlowDisk
from tests.simulation.test_queue_way import held
from tests.simulation.town import Switch, Town, job, town

BACK_S = OPEN_S + 5  # an open breaker's time, and three probes
GRACE_S = 0.05
SPACES = ("red", "green", "blue")


@dataclass
class Timed(Switch):
    """Measures every answer, and keeps the texts of errors."""

    longest_s: dict[str, float] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)

    async def filter(self, body: bytes) -> tuple[int, bytes]:
        return await self._timed("filter", self.app.extender.filter(body))

    async def bind(self, body: bytes) -> tuple[int, bytes]:
        return await self._timed("bind", self.app.extender.bind(body))

    async def _timed(self, verb: str, answering: Awaitable[tuple[int, bytes]]) -> tuple[int, bytes]:
        began_s = self.app.clock.monotonic()
        answer = await answering
        self.longest_s[verb] = max(self.longest_s.get(verb, 0.0), self.app.clock.monotonic() - began_s)
        if error := orjson.loads(answer[1])["Error"]:
            self.errors.add(error)
        return answer


@asynccontextmanager
async def place_with_disk() -> AsyncIterator[tuple[Town, list[SlowDisk]]]:
    """Yield a town whose ledger is on a slow disk; the last of the list is that of the Tessera of the moment."""
    disks: list[SlowDisk] = []

    def before(place: Town) -> None:
        def open_disk(store: Store) -> SlowDisk:
            disks.append(SlowDisk(store, place.clock, Random(1)))
            return disks[-1]

        place.writer = open_disk

    async with town("a", "b", before=before) as place:
        yield place, disks


async def comers(place: Town, count: int) -> list[Object]:
    """Create gated pods of several namespaces, some in each second, named against the order of arrival."""
    pods = []
    for number in range(count):
        pod = job(f"p{(count - number) // 3:03}-{number:03}", gpus=1, schedulingGates=[{"name": GATE}])
        pods.append(await place.world.cluster.create("pods", SPACES[number % 3], pod))
        await place.wait(0.3)
    return pods


def by_arrival(pods: list[Object]) -> list[str]:
    metas = [pod["metadata"] for pod in pods]
    key = ("creationTimestamp", "namespace", "name")
    return [meta["uid"] for meta in sorted(metas, key=lambda meta: tuple(meta[name] for name in key))]


def journal(place: Town, event: str) -> list[str]:
    return [line["request"] for line in place.store.journal() if line["event"] == event]


def told(place: Town, pod: Object) -> tuple[str, list[str]]:
    """Return what `why` says: the state and the words."""
    desk, uid = place.tessera.desk, pod["metadata"]["uid"]
    row = desk.book.rows.get(uid) or unwritten(desk, desk.registry.pods[uid])
    assert row is not None
    found = explanation(desk, row)
    return found["state"], [one["code"] for one in found["reasons"]]


def forbid_writes(place: Town, **rates: float) -> None:
    faults = place.world.cluster.faults
    assert faults is not None
    bad = Rates(**rates or {"failed": 1.0})
    faults.rates.update({"patch": bad, "bind": bad, "get": bad})


def clear(place: Town) -> None:
    assert place.world.cluster.faults is not None
    place.world.cluster.faults.calm()


async def all_bound(place: Town, pods: list[Object], within_s: float) -> None:
    wanted = {pod["metadata"]["name"] for pod in pods}
    await place.until(lambda: wanted <= place.bound().keys(), within_s)


@pytest.mark.parametrize("how", ["broken", "hung"])
async def test_a_minute_without_the_store_loses_nobody_and_keeps_the_order(how: str) -> None:
    async with place_with_disk() as (place, disks):
        before = await held(place, "before", gpus=1)
        await all_bound(place, [before], 10)
        await place.wait(3)
        place.world.extender = switch = Timed(place.tessera)
        setattr(disks[-1], how, True)
        direct = await place.pod("direct", gpus=1)  # kube-scheduler asks for it at once, and goes on asking
        pods = await comers(place, 12)
        await place.wait(56)
        store = place.tessera.desk.dependencies.store
        assert not store.closed
        assert "store" in place.tessera.unready()
        assert [told(place, pod) for pod in (pods[0], pods[-1])] == [("HELD", ["AllocatorUnavailable"])] * 2
        assert place.row(before).state is State.RUNNING
        head = place.store.head
        await place.wait(3)
        assert place.store.head == head
        setattr(disks[-1], how, False)
        await all_bound(place, [direct, *pods], BACK_S + 5)
        assert store.transitions[Phase.CLOSED] == 1
        born = [uid for uid in journal(place, "submit") if uid in by_arrival(pods)]
        late = born if how == "broken" else born[1:]  # a hung disk writes what it was given before
        assert late == [uid for uid in by_arrival(pods) if uid in late]
        assert len(born) == len(pods)
        deadlines = place.settings.extender
        assert switch.longest_s["filter"] <= deadlines.filterDeadline + GRACE_S
        assert switch.longest_s["bind"] <= deadlines.bindDeadline + GRACE_S
        assert not place.tessera.unready()
        await place.wait(3)
        await place.check()


async def test_a_minute_without_writes_to_the_api_server_holds_in_the_ledger_and_lets_nobody_go() -> None:
    async with place_with_disk() as (place, _):
        await held(place, "first", gpus=8)
        await held(place, "second", gpus=8)
        await place.until(lambda: len(place.bound()) == 2, 10)
        waits = await held(place, "waits", gpus=8)
        await place.wait(2)
        forbid_writes(place)
        await place.delete("first")  # there is room, and a reservation that cannot be let go
        await place.wait(20)
        api = place.tessera.desk.dependencies.api
        assert not api.closed
        sent, room = len(place.line.sent), len(journal(place, "reserve"))
        pods = await comers(place, 9)
        cancelled = pods.pop(4)
        await place.world.cluster.delete("pods", SPACES[1], cancelled["metadata"]["name"], grace_s=0)
        await place.wait(30)
        assert {place.row(pod).state for pod in pods} == {State.HELD}
        assert told(place, pods[0]) == ("HELD", ["AllocatorUnavailable"])
        assert place.state(cancelled) is State.CANCELLED
        assert len(journal(place, "reserve")) == room  # nobody new is decided
        assert len(place.line.sent) - sent <= 3 * 40 / OPEN_S  # probes alone are sent
        assert told(place, waits)[1] in ([], ["AllocatorUnavailable"])
        place.kill()
        await place.wait(3)
        clear(place)
        await place.start()
        await place.delete("second")
        judged = by_arrival(pods)
        await place.until(lambda: len(journal(place, "judge")) == len(judged), BACK_S)
        assert journal(place, "judge") == judged
        await all_bound(place, [waits, *pods[:8]], 60)
        await place.wait(3)
        await place.check()


async def test_what_is_freed_in_an_outage_is_given_to_nobody_before_its_end() -> None:
    async with place_with_disk() as (place, _):
        bound = await held(place, "bound", gpus=8)
        await held(place, "other", gpus=8)
        await place.until(lambda: len(place.bound()) == 2, 10)
        waits = await held(place, "waits", gpus=8)
        await open_breaker(place)
        behind = place.tessera.desk.dependencies
        await place.delete("bound")
        for _ in range(10):
            await place.until(lambda: behind.api.phase is Phase.OPEN, 10)
            place.tessera.turner.releaser._looked_s = -60.0
            assert place.tessera.turner.releaser.step() == {}
            await place.wait(2)
        assert place.state(bound) is State.RELEASED
        assert place.state(waits) is State.QUEUED
        clear(place)
        await all_bound(place, [waits], BACK_S + 5)


async def test_with_nobody_waiting_a_recovery_is_found_all_the_same() -> None:
    async with place_with_disk() as (place, disks):
        behind = place.tessera.desk.dependencies
        await open_breaker(place)
        disks[-1].broken = True
        pods = await comers(place, 8)
        await place.until(lambda: not behind.store.closed, 30)
        for pod in pods:
            meta = pod["metadata"]
            await place.world.cluster.delete("pods", meta["namespace"], meta["name"], grace_s=0)
        await place.wait(30)
        await place.delete("pioneer")
        disks[-1].broken = False
        clear(place)
        await place.until(lambda: behind.closed, BACK_S)


async def test_killed_while_the_store_is_away_it_finds_everybody_again() -> None:
    async with place_with_disk() as (place, disks):
        disks[-1].broken = True
        pods = await comers(place, 10)
        await place.wait(20)
        place.kill()
        disks[-1].die()
        await place.wait(20)
        await place.start()
        await all_bound(place, pods, 30)
        assert journal(place, "submit") == by_arrival(pods)
        await place.wait(3)
        await place.check()


async def test_beyond_the_bounds_a_pod_stays_outside_is_told_so_and_comes_in_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger, "HELD_MAX_OF_NAMESPACE", 2)
    monkeypatch.setattr(ledger, "HELD_MAX", 5)
    async with place_with_disk() as (place, _):
        await open_breaker(place)
        pods = await comers(place, 12)
        await place.wait(3)
        states = [told(place, pod) for pod in pods]
        assert states.count(("HELD", ["AllocatorUnavailable"])) == 5
        assert states.count(("HELD", ["TooManyHeld"])) == 7
        assert place.tessera.desk.book.held == {"red": 2, "green": 2, "blue": 1}
        clear(place)
        await all_bound(place, pods, BACK_S + 10)
        assert not place.tessera.desk.book.held
        await place.wait(3)
        await place.check()


async def test_who_is_held_too_long_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "HELD_US_MAX", 90_000_000)
    async with place_with_disk() as (place, _):
        await open_breaker(place)
        (pod,) = await comers(place, 1)
        await place.wait(85)
        assert place.state(pod) is State.HELD
        await place.wait(45)
        assert place.state(pod) is State.EXPIRED
        assert told(place, pod) == ("EXPIRED", ["HeldTooLong"])


async def test_five_minutes_of_429_lose_nobody_and_are_not_hammered() -> None:
    async with place_with_disk() as (place, _):
        faults = place.world.cluster.faults
        assert faults is not None
        faults.retry_after_s = 20.0
        forbid_writes(place, throttled=1.0)
        pods = await comers(place, 9)
        await place.wait(290)
        assert len(place.line.sent) <= 5 + 3 * 300 / 20 + 9
        clear(place)
        await all_bound(place, pods, 20.0 + BACK_S)
        await place.wait(3)
        await place.check()


async def open_breaker(place: Town) -> None:
    """Let the writes of some that end fail until the API server's breaker is open."""
    forbid_writes(place)
    await held(place, "pioneer", gpus=0)
    await place.until(lambda: not place.tessera.desk.dependencies.api.closed, 60)
