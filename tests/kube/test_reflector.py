"""A reflector on virtual time: scripted oddities one by one, then any mixture of faults on the embedded cluster."""

from __future__ import annotations

import asyncio
import random
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.injected import Faults
from scheduler.embedded.injected import Rates as CallRates
from scheduler.kube.port import ApiError, Gone, Object, Page, UnknownOutcome, WatchEvent
from scheduler.kube.reflector import BATCH, SILENCE_S, STALE_S, Reflector
from tests.kube.rough import Copy, Rates, Rough, Script, key_of, made, virtually

GONE = Gone(410, "Expired", "too old")
DOWN = ApiError(503, "Unreachable", "no connection")


def added(name: str, version: int | str, uid: str = "") -> WatchEvent:
    return WatchEvent("ADDED", made(name, version, uid))


def modified(name: str, version: int | str, uid: str = "") -> WatchEvent:
    return WatchEvent("MODIFIED", made(name, version, uid))


def deleted(name: str, version: int | str, uid: str = "") -> WatchEvent:
    return WatchEvent("DELETED", made(name, version, uid))


def bookmark(version: int | str) -> WatchEvent:
    return WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})


def play(lists: list[Any], watches: list[list[Any]], *, for_s: float = 30.0) -> tuple[Copy, Script, Reflector]:
    """Run a reflector on a script for some virtual seconds."""

    async def main(clock: LoopClock) -> tuple[Copy, Script, Reflector]:
        copy, script = Copy(), Script(clock, lists, watches)
        reflector = Reflector(script, "pods", clock, copy, rng=random.Random(1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(for_s):
                await reflector.run()
        return copy, script, reflector

    return virtually(main)


def versions(script: Script, verb: str = "watch") -> list[str]:
    return [version for _, asked, version in script.asked if asked == verb]


def test_all_pages_come_at_once_and_the_watch_goes_on_from_the_list() -> None:
    pages = [Page([made("a", 3)], "9", "x"), Page([made("b", 4)], "9", "y"), Page([], "9")]
    copy, script, reflector = play(pages, [])
    assert (copy.names(), copy.calls) == (["a", "b"], [("replace", "", "")])
    assert (versions(script, "list"), versions(script)) == (["", "x", "y"], ["9"])
    assert reflector.synced


def test_a_list_that_ages_between_its_pages_begins_anew() -> None:
    copy, script, _ = play([Page([made("a", 3)], "9", "x"), GONE, Page([made("b", 4)], "10")], [])
    assert (copy.names(), versions(script, "list")) == (["b"], ["", "x", ""])


def test_events_are_passed_on_in_order_and_the_next_watch_begins_after_the_last_one() -> None:
    events = [added("b", 11), modified("a", 12), deleted("b", 13), bookmark(20), 5.0]
    copy, script, _ = play([Page([made("a", 3)], "10")], [events])
    assert copy.calls[1:] == [("upsert", "b", "11"), ("upsert", "a", "12"), ("delete", "b", "13")]
    assert versions(script) == ["10", "20"]


@pytest.mark.parametrize("before", [[], [added("b", 11)]])
def test_410_at_once_or_amid_a_stream_leads_to_a_list_that_makes_the_missing_deletions(
    before: list[WatchEvent],
) -> None:
    lists = [Page([made("a", 3), made("c", 4)], "10"), Page([made("c", 15), made("d", 16)], "20")]
    copy, script, reflector = play(lists, [[*before, GONE]], for_s=1)
    assert copy.names() == ["c", "d"]
    assert ("delete", "a", "") in copy.calls
    assert (versions(script), reflector.synced) == (["10", "20"], True)


def test_a_list_passes_on_only_what_it_changes() -> None:
    copy, _, _ = play([Page([made("a", 3), made("b", 4)], "10"), Page([made("a", 3), made("b", 5)], "20")], [[GONE]])
    assert copy.calls == [("replace", "", ""), ("upsert", "b", "5")]


def test_repeated_and_late_events_change_nothing() -> None:
    events = [modified("a", 12), modified("a", 12), modified("a", 11), deleted("a", 10), deleted("zzz", 13)]
    copy, _, _ = play([Page([made("a", 3)], "10")], [events])
    assert copy.calls[1:] == [("upsert", "a", "12")]


@pytest.mark.parametrize("between", [[], [bookmark(14)], [5.0]])
def test_an_echo_of_a_deleted_object_does_not_raise_it(between: list[Any]) -> None:
    events = [modified("a", 12), deleted("a", 13), *between]
    echoes: list[Any] = [modified("a", 12), added("a", 3), deleted("a", 13)]
    watches = [[*events], echoes] if between == [5.0] else [[*events, *echoes]]
    copy, _, _ = play([Page([made("a", 3)], "10")], watches)
    assert copy.calls[1:] == [("upsert", "a", "12"), ("delete", "a", "13")]


def test_events_of_different_objects_may_change_places() -> None:
    copy, _, _ = play([Page([], "10")], [[added("b", 12), added("a", 11), deleted("b", 14), modified("a", 13)]])
    assert (copy.names(), copy.objects["n", "a"]["metadata"]["resourceVersion"]) == (["a"], "13")


def test_a_name_taken_anew_deletes_the_old_object_first() -> None:
    copy, _, _ = play([Page([made("a", 3)], "10")], [[added("a", 12, "a-2"), deleted("a", 11, "a-1")]])
    assert copy.calls[1:] == [("delete", "a", ""), ("upsert", "a", "12")]
    assert copy.objects["n", "a"]["metadata"]["uid"] == "a-2"


def test_the_deletion_of_an_unseen_successor_deletes_the_known_object_too() -> None:
    copy, _, _ = play([Page([made("a", 3)], "10")], [[deleted("a", 12, "a-2")]])
    assert copy.names() == []


def test_a_deletion_may_carry_the_version_of_the_last_state() -> None:
    copy, _, _ = play([Page([made("a", 3)], "10")], [[deleted("a", 3)]])
    assert copy.names() == []


def test_versions_that_are_no_numbers_follow_the_server() -> None:
    lists = [Page([made("a", "x1")], "x9"), Page([made("b", "aa")], "aa")]
    copy, script, _ = play(
        lists, [[modified("a", "k"), modified("a", "b"), added("c", "a"), bookmark("f"), 5.0], [GONE]]
    )
    assert copy.calls[1:] == [
        ("upsert", "a", "k"),
        ("upsert", "a", "b"),
        ("upsert", "c", "a"),
        ("delete", "a", ""),
        ("delete", "c", ""),
        ("upsert", "b", "aa"),
    ]
    assert versions(script) == ["x9", "f", "aa"]


def test_a_list_from_the_past_is_not_believed() -> None:
    lists = [Page([made("a", 3)], "10"), Page([], "9"), Page([made("a", 3), made("b", 11)], "12")]
    copy, _, reflector = play(lists, [[added("b", 11), GONE]])
    assert copy.calls == [("replace", "", ""), ("upsert", "b", "11")]
    assert reflector.last_error == ""


def test_a_silent_stream_is_answered_by_a_list_before_the_view_counts_as_stale() -> None:
    _, script, reflector = play([Page([made("a", 3)], "10")], [], for_s=3600)
    times = [at for at, verb, _ in script.asked if verb == "list"]
    assert len(times) == 80
    assert max(b - a for a, b in pairwise(times)) <= SILENCE_S < STALE_S
    assert reflector.age_s(3600) < STALE_S


def test_a_page_that_never_comes_is_asked_for_again() -> None:
    async def main(clock: LoopClock) -> list[str]:
        copy, script = Copy(), Script(clock, [Page([made("a", 3)], "10")], [])
        plain, hung = script.list, count()

        async def list_(kind: Any, *, limit: int = 500, after: str = "") -> Page:
            if next(hung) == 0:
                await clock.sleep(1e9)
            return await plain(kind, limit=limit, after=after)

        script.list = list_
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await Reflector(script, "pods", clock, copy, rng=random.Random(1)).run()
        return copy.names()

    assert virtually(main) == ["a"]


def test_failures_wait_longer_each_time_within_bounds_and_at_least_as_asked() -> None:
    slow = ApiError(429, "TooManyRequests", "slow down", retry_after_s=45.0)
    lists = [*[DOWN] * 12, slow, UnknownOutcome("odd"), Page([], "10")]
    _, script, reflector = play(lists, [[GONE], [bookmark(12)]], for_s=600)
    times = [at for at, verb, _ in script.asked if verb == "list"]
    waits = [b - a for a, b in pairwise(times)]
    assert all(0.2 <= wait <= 30 for wait in waits[:12])
    assert waits[0] <= 0.4
    assert max(waits[:12]) > 5
    assert waits[12] == 45
    assert reflector.synced


def test_a_watch_that_ends_at_once_does_not_spin() -> None:
    _, script, _ = play([Page([], "10")], [[] for _ in range(50)], for_s=60)
    assert 5 <= len(versions(script)) < 20


def test_a_410_again_and_again_does_not_spin() -> None:
    _, script, _ = play([Page([], "10")], [[GONE] for _ in range(50)], for_s=60)
    assert 5 <= len(versions(script)) < 20


def test_server_timeouts_are_spread() -> None:
    _, script, _ = play([Page([], "10")], [[bookmark(10 + i), 30.0] for i in range(30)], for_s=800)
    assert all(290 <= timeout_s <= 600 for timeout_s in script.timeouts)
    assert len(set(script.timeouts)) == len(script.timeouts) > 20


@pytest.mark.parametrize("listed", [False, True])
def test_a_burst_of_changes_lets_others_run(listed: bool) -> None:
    async def main(clock: LoopClock) -> int:
        copy, turns, size = Copy(), 0, 10 * BATCH
        if listed:
            pods = [made(f"p{i}", 11 + i) for i in range(size)]
            script = Script(clock, [Page([], "10"), Page(pods, "9999")], [[GONE]])
        else:
            script = Script(clock, [Page([], "10")], [[added(f"p{i}", 11 + i) for i in range(size)]])
        running = asyncio.ensure_future(Reflector(script, "pods", clock, copy, rng=random.Random(1)).run())
        while len(copy.objects) < size:
            await clock.sleep(0)
            turns += 1
        await stop(running)
        return turns

    assert virtually(main) >= 10


def test_deletions_are_remembered_only_until_they_are_settled() -> None:
    pods = [made(name, 3) for name in "abcd"]
    events = [deleted("a", 11), bookmark(11), deleted("b", 12), 5.0]
    _, _, reflector = play([Page(pods, "10")], [events, [deleted("c", 13), deleted("d", 14), bookmark(13), 90.0]])
    assert reflector._seen._dead == {("n", "d"): "14"}


def test_a_quiet_hour_never_looks_stale_and_tells_the_sink_nothing() -> None:
    async def main(clock: LoopClock) -> tuple[float, Copy]:
        cluster, copy = embedded(clock), Copy()
        await cluster.create("pods", "n", body("a"))
        reflector = Reflector(cluster, "pods", clock, copy, rng=random.Random(1))
        running = asyncio.ensure_future(reflector.run())
        oldest = 0.0
        await clock.sleep(1)
        for _ in range(3600):
            await clock.sleep(1)
            oldest = max(oldest, reflector.age_s(clock.monotonic()))
        await stop(running)
        return oldest, copy

    oldest, copy = virtually(main)
    assert oldest <= SILENCE_S + 1 < STALE_S
    assert copy.calls == [("replace", "", "")]


def embedded(clock: LoopClock, faults: Faults | None = None) -> EmbeddedCluster:
    numbers = count(1)
    return EmbeddedCluster(clock, lambda: f"uid-{next(numbers)}", faults=faults, history=20)


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def body(name: str) -> Object:
    container = {"name": "main", "image": "pause"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "n"},
        "spec": {"schedulerName": "tessera", "containers": [container]},
    }


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "touch", "delete", "delete", "wait", "compact"]),
        st.sampled_from("abcdefgh"),
        st.integers(0, 30),
    ),
    min_size=40,
    max_size=80,
)
RATE = st.sampled_from([0.0, 0.05, 0.2])
ROUGH = st.builds(Rates, drop=RATE, twice=RATE, reorder=RATE, hang=RATE, gone=RATE)
SEEDED = st.builds(random.Random, st.integers(0, 2**32))  # one choice of hypothesis; each draw would be one otherwise
CALLS = st.builds(CallRates, throttled=RATE, failed=RATE, gone=RATE)
FAULTS = st.builds(
    lambda seed, listing, watching, end: Faults(
        random.Random(seed), rates={"list": listing, "watch": watching}, watch_delay_s=2.0, watch_end=end
    ),
    st.integers(0, 2**32),
    CALLS,
    CALLS,
    RATE,
)


@settings(max_examples=100, deadline=None)
@given(ACTIONS, ROUGH, FAULTS, SEEDED)
def test_whatever_goes_wrong_the_view_becomes_the_cluster_and_never_goes_back(
    actions: list[tuple[str, str, int]], rates: Rates, faults: Faults, rng: random.Random
) -> None:
    async def main(clock: LoopClock) -> None:
        cluster = embedded(clock, faults)
        rough, copy = Rough(cluster, clock, rng, rates), Copy()
        reflector = Reflector(rough, "pods", clock, copy, rng=rng)
        running = asyncio.ensure_future(reflector.run())
        for action, name, number in actions:
            await act(cluster, clock, action, name, number)
        faults.calm()
        rough.rates = Rates()
        await clock.sleep(SILENCE_S + 31)
        rough.ended.set()  # an event that was dropped without a trace comes back with the next list only
        await clock.sleep(2 * SILENCE_S)
        assert not running.done()
        assert copy.objects == {key_of(obj): obj for obj in cluster.snapshot("pods")}
        assert reflector.age_s(clock.monotonic()) < STALE_S
        await stop(running)

    virtually(main)


async def act(cluster: EmbeddedCluster, clock: LoopClock, action: str, name: str, number: int) -> None:
    """Change the cluster, or let time pass."""
    there = {obj["metadata"]["name"] for obj in cluster.snapshot("pods")}
    if action == "wait":
        await clock.sleep(number)
    elif action == "compact":
        cluster.compact()
    elif action == "put" and name not in there:
        await cluster.create("pods", "n", body(name))
    elif action == "touch" and name in there:
        await cluster.patch("pods", "n", name, {"metadata": {"annotations": {"x": str(clock.monotonic())}}})
    elif action == "delete" and name in there:
        await cluster.delete("pods", "n", name, grace_s=0)
