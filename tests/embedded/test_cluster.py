"""What the embedded cluster has beside the port's contract: starts, faults, bounds, size."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.following import follow
from scheduler.embedded.injected import Faults, Rates
from scheduler.ids import seeded_ids
from scheduler.kube.port import ApiError, Conflict, Gone, Object, UnknownOutcome, WatchEvent
from tests.embedded.stage import job, machine


def cluster(*, faults: Faults | None = None, history: int = 50_000, latency_s: float = 0.001) -> EmbeddedCluster:
    clock = LoopClock(asyncio.get_running_loop())
    return EmbeddedCluster(clock, seeded_ids(random.Random(1)), faults=faults, history=history, latency_s=latency_s)


async def events(made: EmbeddedCluster, since: str, timeout_s: float = 5.0) -> list[WatchEvent]:
    return [event async for event in made.watch("pods", since, timeout_s=timeout_s) if event.type != "BOOKMARK"]


async def test_preload_keeps_what_a_dump_says() -> None:
    first = cluster()
    made = await first.create("pods", "default", job("a"))
    await first.bind("default", "a", {"metadata": {"name": "a"}, "target": {"name": "n"}})
    await first.patch("pods", "default", "a", {"status": {"phase": "Running"}}, subresource="status")
    await first.delete("pods", "default", "a")
    (dumped,) = first.snapshot("pods")
    second = cluster()
    second.preload("pods", [dumped])
    (loaded,) = second.snapshot("pods")
    assert loaded["metadata"]["uid"] == made["metadata"]["uid"]
    for one in (dumped, loaded):
        one["metadata"] |= {"resourceVersion": "", "generation": 0}
    assert loaded == dumped


async def test_preload_refuses_what_the_api_server_would() -> None:
    with pytest.raises(Conflict):
        cluster().preload("nodes", [machine("n"), machine("n")])
    with pytest.raises(ApiError):
        cluster().preload("pods", [{"metadata": {"name": "a"}, "spec": {}}])


async def test_a_call_takes_time() -> None:
    made = cluster(latency_s=0.25)
    await made.create("pods", "default", job("a"))
    assert asyncio.get_running_loop().time() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("failure", "error", "happened"),
    [
        ("conflict", Conflict, False),
        ("throttled", ApiError, False),
        ("failed", UnknownOutcome, False),
        ("lost_reply", UnknownOutcome, True),
    ],
)
async def test_a_forced_failure_strikes_once(failure: str, error: type[Exception], happened: bool) -> None:
    made = cluster(faults=Faults(random.Random(1), retry_after_s=3.0))
    await made.create("pods", "default", job("a"))
    assert made.faults is not None
    made.faults.force("bind", failure)  # type: ignore[arg-type]
    body = {"metadata": {"name": "a"}, "target": {"name": "n"}}
    with pytest.raises(error) as struck:
        await made.bind("default", "a", body)
    bound = (await made.get("pods", "default", "a"))["spec"].get("nodeName") == "n"
    assert bound is happened
    assert getattr(struck.value, "retry_after_s", 0.0) == (3.0 if failure == "throttled" else 0.0)
    if not happened:
        await made.bind("default", "a", body)


async def test_rates_are_kept_and_repeat_with_their_seed() -> None:
    async def run() -> list[str]:
        made = cluster(faults=Faults(random.Random(5), rates={"create": Rates(0.1, 0.1, 0.1, 0.1)}))
        outcomes = []
        for number in range(1000):
            try:
                await made.create("pods", "default", job(f"pod-{number}"))
                outcomes.append("done")
            except (ApiError, UnknownOutcome) as error:
                outcomes.append(str(error)[:12])
        return outcomes

    first = await run()
    assert first == await run()
    assert 550 < first.count("done") < 650
    assert len(set(first)) == 5


async def test_calm_ends_all_trouble() -> None:
    faults = Faults(random.Random(1), rates={"create": Rates(failed=1.0)}, watch_delay_s=9.0, watch_end=1.0)
    faults.force("get", "failed")
    made = cluster(faults=faults)
    faults.calm()
    await made.create("pods", "default", job("a"))
    await made.get("pods", "default", "a")
    assert len(await events(made, "1")) == 1


async def test_late_events_keep_their_order() -> None:
    made = cluster(faults=Faults(random.Random(1), watch_delay_s=2.0))
    for number in range(10):
        await made.create("pods", "default", job(f"pod-{number}"))
    loop = asyncio.get_running_loop()
    start = loop.time()
    names = [event.object["metadata"]["name"] for event in await events(made, "1", timeout_s=60)]
    assert names == [f"pod-{number}" for number in range(10)]
    assert loop.time() - start >= 60


async def test_a_broken_watch_just_ends() -> None:
    made = cluster(faults=Faults(random.Random(1), watch_end=1.0))
    await made.create("pods", "default", job("a"))
    start = asyncio.get_running_loop().time()
    assert await events(made, "1", timeout_s=60) == []
    assert asyncio.get_running_loop().time() < start + 1


async def test_history_is_bounded() -> None:
    made = cluster(history=3)
    for number in range(5):
        await made.create("pods", "default", job(f"pod-{number}"))
    versions = [pod["metadata"]["resourceVersion"] for pod in made.snapshot("pods")]
    assert len(await events(made, versions[1])) == 3
    with pytest.raises(Gone):
        await events(made, versions[0])


async def test_a_reader_who_is_too_slow_is_cut_off() -> None:
    made = cluster(history=3)
    watch = made.watch("pods", "1", timeout_s=60)
    await made.create("pods", "default", job("first"))
    assert (await anext(watch)).type == "ADDED"
    for number in range(5):
        await made.create("pods", "default", job(f"pod-{number}"))
    with pytest.raises(Gone):
        await anext(watch)


async def test_following_survives_all_trouble_and_ends_at_the_truth() -> None:
    bad = Rates(throttled=0.1, failed=0.1, gone=0.1)
    faults = Faults(random.Random(2), rates={"list": bad, "watch": bad}, watch_delay_s=0.2, watch_end=0.1)
    made = cluster(faults=faults)
    clock = LoopClock(asyncio.get_running_loop())
    known: dict[str, Object] = {}

    async def keep() -> None:
        async for change, seen in follow(made, "pods", clock):
            if change == "SYNCED":
                continue
            uid = seen["metadata"]["uid"]
            assert (uid in known) == (change != "ADDED")
            if change == "DELETED":
                del known[uid]
            else:
                known[uid] = seen

    following = asyncio.create_task(keep())
    rng = random.Random(3)
    for number in range(200):
        await made.create("pods", "default", job(f"pod-{number % 40}-{number}"))
        if number % 3 == 0:
            victim = rng.choice(made.snapshot("pods"))["metadata"]["name"]
            await made.delete("pods", "default", victim)
            await made.create("pods", "default", job(victim))
        if number % 50 == 0:
            made.compact()
        await clock.sleep(0.1)
    faults.calm()
    await clock.sleep(60)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert sorted(known) == sorted(pod["metadata"]["uid"] for pod in made.snapshot("pods"))
    assert {uid: one["metadata"]["resourceVersion"] for uid, one in known.items()} == {
        pod["metadata"]["uid"]: pod["metadata"]["resourceVersion"] for pod in made.snapshot("pods")
    }


async def test_it_is_cheap_at_five_thousand_nodes_and_ten_thousand_pods() -> None:
    made = cluster(latency_s=0.0)
    start = time.process_time()
    made.preload("nodes", [machine(f"gpu-{number:05}") for number in range(5000)])
    made.preload("pods", [job(f"pod-{number:05}") for number in range(10_000)])
    for number in range(2000):
        name = f"pod-{number:05}"
        await made.bind("default", name, {"metadata": {"name": name}, "target": {"name": "n"}})
    page = await made.list("pods")
    while page.next:
        page = await made.list("pods", after=page.next)
    assert time.process_time() - start < 10
