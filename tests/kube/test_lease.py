"""Who may work on a cluster: two processes on virtual time, clocks that lie, replies that get lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from itertools import count, pairwise
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.injected import Faults, Rates
from scheduler.errors import ConfigError, OccupiedError
from scheduler.kube.lease import FENCE, NAME, RENEW_S, TERM_S, Occupancy
from scheduler.kube.port import ApiError, Cluster, NotFound, Object, UnknownOutcome
from tests.kube.rough import virtually

SPACE = "tessera-system"


class World:
    """A cluster, its faults, and Tesseras on it."""

    def __init__(self, clock: LoopClock, seed: int = 1) -> None:
        numbers = count(1)
        self.clock = clock
        self.faults = Faults(random.Random(seed))
        self.cluster = EmbeddedCluster(clock, lambda: f"uid-{next(numbers)}", faults=self.faults)

    def tessera(self, database: str, nonce: str, *, clock: LoopClock | None = None) -> Occupancy:
        return Occupancy(self.cluster, clock or self.clock, namespace=SPACE, database=database, nonce=nonce)

    def lease(self) -> Object:
        (found,) = self.cluster.snapshot("leases")
        return found

    def holder(self) -> str:
        holder: str = self.lease()["spec"]["holderIdentity"]
        return holder


class Unwilling:
    """A cluster that answers with an error as long as there is one."""

    def __init__(self, cluster: EmbeddedCluster, clock: LoopClock, error: Exception | None = None) -> None:
        self._cluster, self._clock, self.error = cluster, clock, error
        self.asked_s: list[float] = []

    def __getattr__(self, verb: str) -> Any:
        self.asked_s.append(self._clock.monotonic())
        if self.error is not None:
            raise self.error
        return getattr(self._cluster, verb)


def virtual(story: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Tell a story on virtual time."""

    def run() -> None:
        virtually(lambda clock: story(World(clock)))

    run.__name__ = story.__name__
    return run


@virtual
async def test_the_first_one_takes_it_and_says_who_it_is(world: World) -> None:
    first = world.tessera("db1", "p1")
    assert not first.holds()
    await first.take(fence=7)
    lease = world.lease()
    assert (lease["metadata"]["name"], lease["metadata"]["namespace"]) == (NAME, SPACE)
    assert lease["metadata"]["annotations"] == {FENCE: "7"}
    assert lease["spec"] == {
        "holderIdentity": "db1_p1",
        "leaseDurationSeconds": 15,
        "leaseTransitions": 0,
        "acquireTime": lease["spec"]["renewTime"],
        "renewTime": lease["spec"]["renewTime"],
    }
    assert lease["spec"]["renewTime"].startswith("2026-01-01T00:00:00.")
    assert first.holds()


@virtual
async def test_the_next_process_on_the_same_database_takes_over_at_once(world: World) -> None:
    await world.tessera("db1", "p1").take(fence=1)
    began = world.clock.monotonic()
    second = world.tessera("db1", "p2")
    await second.take(fence=2)
    assert world.clock.monotonic() - began < 1
    assert world.holder() == "db1_p2"
    assert world.lease()["spec"]["leaseTransitions"] == 1
    assert world.lease()["metadata"]["annotations"] == {FENCE: "2"}


@virtual
async def test_another_database_is_refused_while_the_holder_renews(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=3)
    renewing = asyncio.ensure_future(first.run())
    began = world.clock.monotonic()
    with pytest.raises(OccupiedError, match=r"tessera-system/tessera.*process p1 on database db1 \(fence 3\).*Stop it"):
        await world.tessera("db2", "p2").take(fence=1)
    assert world.clock.monotonic() - began < TERM_S
    assert (world.holder(), first.lost, renewing.done()) == ("db1_p1", False, False)
    renewing.cancel()


@virtual
async def test_another_database_waits_a_whole_term_for_a_silent_holder(world: World) -> None:
    await world.tessera("db1", "p1").take(fence=1)
    await world.clock.sleep(1000)
    began = world.clock.monotonic()
    second = world.tessera("db2", "p2")
    await second.take(fence=1)
    assert TERM_S <= world.clock.monotonic() - began < TERM_S + 3
    assert (world.holder(), second.holds()) == ("db2_p2", True)


@pytest.mark.parametrize("skew_s", [-86400, 86400])
def test_wall_clocks_do_not_matter(skew_s: int) -> None:
    async def story(clock: LoopClock) -> None:
        world = World(clock)
        wrong = LoopClock(asyncio.get_running_loop(), epoch_us=1_767_225_600_000_000 + skew_s * 1_000_000)
        first = world.tessera("db1", "p1", clock=wrong)
        await first.take(fence=1)
        renewing = asyncio.ensure_future(first.run())
        with pytest.raises(OccupiedError):
            await world.tessera("db2", "p2").take(fence=1)
        renewing.cancel()

    virtually(story)


@virtual
async def test_an_api_server_that_is_away_is_waited_for_with_growing_pauses_and_a_reason(world: World) -> None:
    faults = Unwilling(world.cluster, world.clock, ApiError(503, "Unreachable", "GET /x: connection refused"))
    first = Occupancy(cast("Cluster", faults), world.clock, namespace=SPACE, database="db1", nonce="p1")
    assert first.missing().startswith("starting: ")
    with capture_logs() as said:
        taking = asyncio.ensure_future(first.acquire(fence=1))
        await world.clock.sleep(120)
        assert not taking.done()
        assert "waiting for the API server: the API server cannot be reached (503 Unreachable" in first.missing()
        faults.error = None
        await world.clock.sleep(11)
    assert taking.done()
    assert (world.holder(), first.missing()) == ("db1_p1", "")
    logged = [one for one in said if one["event"] == "start.waits"]
    assert {one["reason"] for one in logged} == {logged[0]["reason"]}
    assert logged[0]["reason"].startswith("starting: waiting for the API server: ")
    pauses = [later - sooner for sooner, later in pairwise(faults.asked_s)]
    assert pauses[:6] == pytest.approx([0.5, 1, 2, 4, 8, 10])
    assert max(pauses) == pytest.approx(10)
    await world.clock.sleep(TERM_S)
    assert "could not be renewed" in first.missing()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ApiError(401, "Unauthorized", "no"), "does not accept our credentials"),
        (ApiError(403, "Forbidden", "leases is forbidden"), "forbids it: grant the rights of deploy/"),
        (ApiError(400, "", "Client sent an HTTP request to an HTTPS server."), "write https:// in the kubeconfig"),
        (ApiError(503, "Unreachable", "[SSL: WRONG_VERSION_NUMBER]"), "speaks no TLS: write http://"),
        (TimeoutError(), "does not answer in time"),
    ],
)
def test_what_a_start_waits_for_is_said_with_the_next_step_until_it_is_granted(error: Exception, words: str) -> None:
    @virtual
    async def story(world: World) -> None:
        unwilling = Unwilling(world.cluster, world.clock, error)
        first = Occupancy(cast("Cluster", unwilling), world.clock, namespace=SPACE, database="db1", nonce="p1")
        taking = asyncio.ensure_future(first.acquire(fence=1))
        await world.clock.sleep(60)
        assert words in first.missing()
        unwilling.error = None
        await world.clock.sleep(11)
        assert (taking.done(), first.missing()) == (True, "")

    story()


@virtual
async def test_another_tessera_is_not_waited_for(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    renewing = asyncio.ensure_future(first.run())
    with pytest.raises(OccupiedError):
        await world.tessera("db2", "p2").acquire(fence=1)
    renewing.cancel()


@virtual
async def test_a_lease_given_back_is_free_at_once(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    await first.release()
    assert (world.holder(), first.holds()) == ("", False)
    began = world.clock.monotonic()
    await world.tessera("db2", "p2").take(fence=1)
    assert world.clock.monotonic() - began < 1


@virtual
async def test_a_lease_given_back_while_waited_for_is_taken_early(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    taking = asyncio.ensure_future(world.tessera("db2", "p2").take(fence=1))
    await world.clock.sleep(3)
    await first.release()
    await world.clock.sleep(3)
    assert taking.done()
    assert world.holder() == "db2_p2"


@virtual
async def test_giving_back_what_was_never_held_or_was_lost_changes_nothing(world: World) -> None:
    first, second = world.tessera("db1", "p1"), world.tessera("db1", "p2")
    await second.release()
    assert world.cluster.snapshot("leases") == []
    await first.take(fence=1)
    await second.take(fence=2)
    with pytest.raises(OccupiedError):
        await first.step()
    await first.release()
    assert world.holder() == "db1_p2"


@virtual
async def test_renewing_keeps_it_for_an_hour(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    renewing = asyncio.ensure_future(first.run())
    before = world.lease()["spec"]
    for _ in range(3600):
        await world.clock.sleep(1)
        assert first.holds()
    after = world.lease()["spec"]
    assert (after["acquireTime"], after["leaseTransitions"]) == (before["acquireTime"], 0)
    assert after["renewTime"] > before["renewTime"]
    renewing.cancel()


@virtual
async def test_who_lost_it_learns_so_and_stops(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    await world.clock.sleep(60)
    assert not first.holds()
    await world.tessera("db2", "p2").take(fence=1)
    with pytest.raises(OccupiedError, match="process p2 on database db2"):
        await first.run()
    assert first.lost
    assert not first.holds()
    assert world.holder() == "db2_p2"


@virtual
async def test_a_stranger_who_annotates_or_deletes_it_does_not_take_it(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=4)
    await world.cluster.patch("leases", SPACE, NAME, {"metadata": {"annotations": {"note": "x"}}})
    assert await first.step()
    assert world.lease()["metadata"]["annotations"] == {FENCE: "4", "note": "x"}
    await world.cluster.delete("leases", SPACE, NAME)
    assert await first.step()
    assert (world.holder(), first.holds()) == ("db1_p1", True)


@virtual
async def test_a_lost_reply_is_read_back(world: World) -> None:
    first = world.tessera("db1", "p1")
    world.faults.force("create", "lost_reply")
    await first.take(fence=1)
    assert first.holds()
    world.faults.force("replace", "lost_reply")
    assert not await first.step()
    assert await first.step()
    assert not first.lost


@virtual
async def test_an_outage_is_ridden_out_and_ends_the_hold_meanwhile(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    renewing = asyncio.ensure_future(first.run())
    world.faults.rates["replace"] = Rates(failed=1.0)
    await world.clock.sleep(TERM_S + 1)
    assert (first.holds(), first.lost, renewing.done()) == (False, False, False)
    world.faults.calm()
    await world.clock.sleep(RENEW_S)
    assert first.holds()
    renewing.cancel()


@virtual
async def test_a_server_that_hangs_does_not_hold_up_for_long(world: World) -> None:
    first = world.tessera("db1", "p1")
    await first.take(fence=1)
    world.cluster.latency_s = 1e6
    began = world.clock.monotonic()
    assert not await first.step()
    await first.release()
    assert world.clock.monotonic() - began == pytest.approx(2 * RENEW_S, abs=0.1)
    with pytest.raises(TimeoutError):
        await world.tessera("db2", "p2").take(fence=1)


@virtual
async def test_a_server_that_refuses_is_named(world: World) -> None:
    world.faults.rates["create"] = Rates(throttled=1.0)
    with pytest.raises(ApiError):
        await world.tessera("db1", "p1").take(fence=1)


@virtual
async def test_a_missing_namespace_is_said(world: World) -> None:
    class Bare:
        async def get(self, *_: Any) -> Object:
            raise NotFound(404, "NotFound", "no lease")

        async def create(self, *_: Any) -> Object:
            raise NotFound(404, "NotFound", "no namespace")

    bare = Occupancy(cast("Cluster", Bare()), world.clock, namespace="gone", database="db1", nonce="p1")
    with pytest.raises(ConfigError, match="Namespace gone"):
        await bare.take(fence=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.1, 0.3]))
def test_two_databases_never_hold_it_together(seed: int, failed: float, lost_reply: float) -> None:
    async def story(clock: LoopClock) -> None:
        world, rng = World(clock, seed), random.Random(seed)
        for verb in ("get", "create", "replace"):
            world.faults.rates[verb] = Rates(failed=failed, lost_reply=lost_reply, conflict=failed / 3)
        living: list[Occupancy] = []

        async def live(number: int) -> None:
            await clock.sleep(rng.uniform(0, 60))
            mine = world.tessera(f"db{number}", "p")
            living.append(mine)
            try:
                await mine.take(fence=1)
                async with asyncio.timeout(rng.uniform(10, 200)):
                    await mine.run()
            except (OccupiedError, ApiError, UnknownOutcome, TimeoutError):
                if rng.random() < 0.5:
                    await mine.release()

        lives = [asyncio.ensure_future(live(number)) for number in range(4)]
        while not all(life.done() for life in lives):
            await clock.sleep(0.5)
            assert sum(one.holds() for one in living) <= 1
        await asyncio.gather(*lives)

    virtually(story)
