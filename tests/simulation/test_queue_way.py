"""The queue way: gated pods are ordered, reserved, nominated, let go, and land where the turn chose."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from scheduler import GATE
from scheduler.clock import LoopClock
from scheduler.kube.port import NotFound, Object
from scheduler.model.queue import Queue, Selector
from scheduler.model.reservation import State
from scheduler.waiting import waiting_word
from scheduler.web.explanation import explanation
from tests.simulation.town import Town, job, town

HELD = [{"name": GATE}]
ALL = Selector()


async def held(place: Town, name: str, *, queue: str = "", gang: tuple[str, int] | None = None, **more: Any) -> Object:
    """Create a pod under our gate."""
    pod = job(name, **{"schedulingGates": HELD, **more})
    if queue:
        pod["metadata"]["labels"] = {"tessera.dev/queue": queue}
    if gang is not None:
        pod["metadata"]["annotations"] = {"tessera.dev/gang": gang[0], "tessera.dev/gang-size": str(gang[1])}
    return await place.world.cluster.create("pods", "default", pod)


def reserved(place: Town) -> list[str]:
    """Return the names of pods in the order in which they were reserved."""
    return [line["name"] for line in place.store.journal() if line["event"] == "reserve"]


def limit(place: Town, *queues: Queue) -> None:
    place.tessera.desk.queues.replace((queue, "") for queue in queues)


def word(place: Town, pod: Object) -> str:
    found: str = place.tessera.desk.order.words.get(pod["metadata"]["uid"], "")
    return found


def deaf(place: Town) -> None:
    """Let kube-scheduler sleep."""

    def nobody(_: float) -> None:
        return None

    place.world.kube_scheduler._queue.pop = nobody  # type: ignore[method-assign]


def wake(place: Town) -> None:
    """Wake kube-scheduler."""
    del place.world.kube_scheduler._queue.pop  # type: ignore[method-assign]
    place.world.kube_scheduler._work.set()


async def test_a_held_pod_is_reserved_nominated_let_go_and_bound_where_it_was_nominated() -> None:
    async with town("a", "b") as place:
        pod = await held(place, "one", gpus=4)
        await place.until(lambda: "one" in place.bound(), 5)
        await place.wait(3)
        row, now = place.row(pod), await place.get("one")
        assert row.state is State.RUNNING
        assert now["spec"]["nodeName"] == row.node
        events = [line["event"] for line in place.store.journal()]
        assert events == ["submit", "reserve", "bind", "post", "start"]
        assert place.line.sent == [("patch", "one"), ("patch", "one"), ("bind", "one")]
        admitted = [one for one in now["status"]["conditions"] if one["type"] == "tessera.dev/Admitted"]
        assert admitted[0]["status"] == "True"
        await place.check()


async def test_held_pods_go_by_priority_then_age_and_the_first_keeps_its_place() -> None:
    async with town("a") as place:
        await place.pod("full", gpus=8)
        await place.until(lambda: "full" in place.bound(), 5)
        for name, gpus, priority in (("large", 8, 0), ("small", 1, 0), ("urgent", 4, 10)):
            await held(place, name, gpus=gpus, priority=priority)
            await place.wait(1.1)
        await place.wait(10)
        assert place.bound().keys() == {"full"}
        await place.delete("full")
        await place.until(lambda: "urgent" in place.bound(), 5)
        await place.wait(30)
        assert place.bound().keys() == {"urgent"}  # four GPUs are free, and small waits behind large
        await place.delete("urgent")
        await place.until(lambda: "large" in place.bound(), 5)
        await place.delete("large")
        await place.until(lambda: "small" in place.bound(), 5)
        assert reserved(place) == ["full", "urgent", "large", "small"]
        await place.wait(3)
        await place.check()


async def test_who_is_behind_may_have_nodes_that_the_first_could_never_use() -> None:
    async with town("a") as place:
        await place.node("plain", gpus=0)
        await place.pod("full", gpus=8)
        await place.until(lambda: "full" in place.bound(), 5)
        first = await held(place, "first", gpus=8)
        await place.wait(2)
        await held(place, "second", gpus=0)
        direct = await place.pod("third", gpus=0)
        await place.until(lambda: {"second", "third"} <= place.bound().keys(), 5)
        assert place.bound()["second"] == place.bound()["third"] == "plain"
        assert word(place, first) == "WaitingForCapacity"
        assert word(place, direct) == ""
        await place.wait(3)
        await place.check()


async def test_quota_is_never_exceeded_by_held_and_direct_pods_together() -> None:
    queues = Queue("root"), Queue("left", "root", nominal={"gpu": 3}, borrow_limit={"gpu": 1}, namespaces=ALL)
    queues += (Queue("right", "root", nominal={"gpu": 3}, lend_limit={"gpu": 2}, namespaces=ALL),)
    async with town("a", "b") as place:
        limit(place, *queues)
        for number in range(6):
            await held(place, f"left-{number}", queue="left")
            pod = job(f"free-{number}")
            pod["metadata"]["labels"] = {"tessera.dev/queue": "left"}
            await place.world.cluster.create("pods", "default", pod)
        await place.wait(30)
        assert len(place.bound()) == 4  # three of its own, one borrowed
        for number in range(4):
            await held(place, f"right-{number}", queue="right")
        await place.wait(30)
        names = [name.split("-")[0] for name in place.bound()]
        assert names.count("right") == 2
        assert len(names) == 6
        classes = [row.borrowed for row in place.tessera.desk.book.live() if row.node]
        assert sum(classes) == 1
        await place.delete(next(name for name in place.bound() if name.startswith(("left", "free"))))
        await place.until(lambda: len([name for name in place.bound() if name.startswith("right")]) == 3, 10)
        await place.wait(3)
        await place.check()


async def test_why_a_held_pod_waits_is_told_in_a_word() -> None:
    async with town("a") as place:
        stopped = Queue("stopped", namespaces=ALL, stopped=True)
        limit(place, Queue("small", nominal={"gpu": 1}, namespaces=ALL), stopped, Queue("closed"))
        await held(place, "uses", queue="small")
        await place.until(lambda: "uses" in place.bound(), 5)
        other_gate = [*HELD, {"name": "example.com/other"}]
        pods = {
            "WaitingForQuota": await held(place, "quota", queue="small"),
            "ExceedsQuotaLimit": await held(place, "never", queue="small", gpus=2),
            "QueueNotFound": await held(place, "lost", queue="nowhere"),
            "QueueStopped": await held(place, "stop", queue="stopped"),
            "NotAuthorized": await held(place, "closed", queue="closed"),
            "WaitingForGate": await held(place, "gates", schedulingGates=other_gate),
            "WaitingForGang": await held(place, "gang", gang=("g", 2)),
            "WaitingForCapacity": await held(place, "eight", gpus=8),
            "WaitingBehindPriority": await held(place, "z-behind", gpus=1),
        }
        await place.wait(5)
        assert {word(place, pod) for pod in pods.values()} == pods.keys()
        assert all(word(place, pod) == code for code, pod in pods.items())
        told = {code: explanation(place.tessera.desk, place.row(pod))["reasons"] for code, pod in pods.items()}
        assert all(reasons[0]["code"] == code for code, reasons in told.items())
        assert place.bound().keys() == {"uses"}


async def test_a_gang_starts_together_or_not_at_all() -> None:
    async with town("a", "b") as place:
        await place.pod("other", gpus=5)
        await place.until(lambda: "other" in place.bound(), 5)
        for number in range(2):
            await held(place, f"member-{number}", gpus=6, gang=("ring", 3))
        await place.wait(10)
        assert place.bound().keys() == {"other"}
        await held(place, "member-2", gpus=2, gang=("ring", 3))
        await place.wait(10)
        assert place.bound().keys() == {"other"}
        await place.delete("other")
        await place.until(lambda: len(place.bound()) == 3, 10)
        lines = [line for line in place.store.journal() if line["event"] == "reserve" and line["name"] != "other"]
        assert len({line["at"] for line in lines}) == 1
        assert [line["seq"] for line in lines] == list(range(lines[0]["seq"], lines[0]["seq"] + 3))
        await place.wait(3)
        await place.check()


async def test_a_gang_with_a_member_that_fits_nowhere_stands_in_nobodys_way() -> None:
    async with town("a") as place:
        await held(place, "member-0", gpus=1, gang=("ring", 2))
        await held(place, "member-1", gpus=9, gang=("ring", 2))
        await place.wait(2)
        await held(place, "behind", gpus=1)
        await place.until(lambda: "behind" in place.bound(), 5)
        await place.wait(3)
        await place.check()


async def test_a_gang_that_fits_one_by_one_and_never_together_blocks_nobody_and_says_so() -> None:
    async with town("a", "b") as place:
        pods = [await held(place, f"member-{number}", gpus=8, gang=("ring", 3)) for number in range(3)]
        await place.wait(2)
        await held(place, "behind", gpus=8)
        await place.until(lambda: "behind" in place.bound(), 5)
        assert {word(place, pod) for pod in pods} == {"ExceedsClusterSize"}
        told = explanation(place.tessera.desk, place.row(pods[0]))
        assert (told["class"], told["reasons"][0]["code"]) == ("change", "ExceedsClusterSize")
        await place.node("c")
        await place.until(lambda: {word(place, pod) for pod in pods} == {"WaitingForCapacity"}, 5)
        await held(place, "late", gpus=8)
        await place.wait(10)
        assert "late" not in place.bound(), "what is free is kept for the gang, which could run now"
        await place.delete("behind")
        await place.until(lambda: {"member-0", "member-1", "member-2"} <= place.bound().keys(), 10)
        await place.wait(3)
        await place.check()


async def test_the_minute_of_a_gang_that_is_bound_in_part_goes_on_through_a_restart() -> None:
    async with town("a", "b") as place:
        place.line.late_s["patch"] = [0.0, 0.0] + [1000.0] * 40  # whatever is written to the second one hangs
        second = [await held(place, f"member-{number}", gpus=8, gang=("ring", 2)) for number in range(2)][1]
        await place.until(lambda: "member-0" in place.bound(), 10)
        for _ in range(2):
            await place.wait(25)
            place.kill()
            await place.start()
        assert place.state(second) is State.RESERVED
        assert await place.until(lambda: place.state(second) is State.QUEUED, 60) < 20
        assert place.row(second).reason == "GangIncomplete"


async def test_a_gang_that_lost_a_member_takes_its_replacement() -> None:
    async with town("a") as place:
        for number in range(2):
            await held(place, f"member-{number}", gpus=2, gang=("ring", 2))
        await place.until(lambda: len(place.bound()) == 2, 10)
        await place.delete("member-0")
        await place.wait(5)
        await held(place, "member-2", gpus=2, gang=("ring", 2))
        await place.until(lambda: "member-2" in place.bound(), 10)
        await place.wait(3)
        await place.check()


async def test_the_replacement_of_a_member_has_a_minute_of_its_own() -> None:
    async with town("a") as place:
        for number in range(2):
            await held(place, f"member-{number}", gpus=2, gang=("ring", 2))
        await place.until(lambda: len(place.bound()) == 2, 10)
        await place.wait(300)
        await place.delete("member-0")
        deaf(place)
        pod = await held(place, "member-2", gpus=2, gang=("ring", 2))
        await place.until(lambda: place.state(pod) is State.RESERVED, 5)
        await place.wait(55)
        assert place.state(pod) is State.RESERVED
        await place.until(lambda: place.state(pod) is State.QUEUED, 7)
        assert place.row(pod).reason == "GangIncomplete"
        wake(place)
        await place.until(lambda: "member-2" in place.bound(), 60)
        await place.wait(3)
        await place.check()


async def test_what_is_reserved_for_a_gang_that_stays_incomplete_is_given_up_after_a_minute() -> None:
    async with town("a", "b") as place:
        place.line.late_s["patch"] = [0.0, 0.0] + [1000.0] * 20  # whatever is written to the second one hangs
        first = await held(place, "member-0", gpus=8, gang=("ring", 2), nodeSelector={"kubernetes.io/hostname": "a"})
        second = await held(place, "member-1", gpus=8, gang=("ring", 2), nodeSelector={"kubernetes.io/hostname": "b"})
        await place.until(lambda: "member-0" in place.bound(), 10)
        assert place.state(second) is State.RESERVED
        await place.until(lambda: place.state(second) is State.QUEUED, 90)
        assert place.row(second).reason == "GangIncomplete"
        assert place.state(first) is State.RUNNING
        place.line.late_s["patch"].clear()
        await place.until(lambda: "member-1" in place.bound(), 60)
        await place.wait(3)
        await place.check()


async def test_what_the_plugins_refuse_everywhere_is_given_up_at_once_and_tried_elsewhere_alone() -> None:
    async with town("a", "b") as place:
        place.stall_at("turn.commit.after", 2.0)
        pod = await held(place, "one", gpus=8, nodeSelector={"kubernetes.io/hostname": "b"})
        await place.until(lambda: place.state(pod) is State.RESERVED, 5)
        await place.world.cluster.patch("nodes", "", "b", {"spec": {"unschedulable": True}})
        await place.until(lambda: place.state(pod) is State.QUEUED, 10)
        assert place.row(pod).reason == "NominationRefused"
        await place.wait(60)
        assert place.row(pod).attempts == 1, "it is not nominated again where it was refused"
        await place.world.cluster.patch("nodes", "", "b", {"spec": {"unschedulable": False}})
        await place.until(lambda: "one" in place.bound(), 20)
        await place.wait(3)
        await place.check()


async def test_a_reservation_that_kube_scheduler_refuses_moves_to_where_it_lets_the_pod_run() -> None:
    async with town("a", "b") as place:
        for name, gpus in (("x", 6), ("y", 4)):
            await place.pod(name, gpus=gpus)
        await place.until(lambda: len(place.bound()) == 2, 5)
        x = place.bound()["x"]
        other = {"a": "b", "b": "a"}[x]
        place.stall_at("turn.commit.after", 2.0)
        pod = await held(place, "one", gpus=2)
        await place.until(lambda: place.state(pod) is State.RESERVED, 5)
        assert place.row(pod).node == x
        rough = {"key": "rough", "effect": "NoSchedule"}
        await place.world.cluster.patch("nodes", "", x, {"spec": {"taints": [rough]}})
        await place.until(lambda: "one" in place.bound(), 30)
        assert place.bound()["one"] == other
        assert place.row(pod).node == other
        await place.wait(3)
        await place.check()


@pytest.mark.parametrize("again", [True, False])
async def test_what_is_given_up_while_it_is_let_go_is_let_go_anew_or_taken_back(*, again: bool) -> None:
    async with town("a", "b") as place:
        await held(place, "other", gpus=1)
        await place.until(lambda: "other" in place.bound(), 5)
        place.line.late_s["patch"] = [0.0, 3.0]  # its gate goes when its reservation is gone
        pod = await held(place, "one", gpus=8)
        await place.until(lambda: place.line.sent.count(("patch", "one")) == 2, 5)
        deaf(place)
        row, uncordoned = place.row(pod), {"spec": {"unschedulable": False}}
        place.tessera.desk.order.astray[row.id] = row.epoch, "NominationRefused"
        await place.world.cluster.patch("nodes", "", row.node, {"spec": {"unschedulable": True}})
        await place.until(lambda: place.state(pod) is State.QUEUED, 1)
        if again:
            await place.world.cluster.patch("nodes", "", row.node, uncordoned)
            await place.until(lambda: place.state(pod) is State.RESERVED, 2)
        await place.until(lambda: place.line.sent.count(("patch", "one")) > 2, 4)
        await place.wait(1)
        status = (await place.get("one"))["status"]
        assert status.get("nominatedNodeName", "") == (row.node if again else "")
        await place.world.cluster.patch("nodes", "", row.node, uncordoned)
        wake(place)
        await place.until(lambda: "one" in place.bound(), 30)
        assert place.row(pod).attempts == 1
        await place.wait(3)
        await place.check()


LEASE = "tessera-kube-scheduler"


async def renew(place: Town, seconds: float) -> None:
    """Let the Lease of kube-scheduler be renewed for a while, as it is while it runs."""
    for _ in range(round(seconds / 5)):
        at = datetime.fromtimestamp(place.clock.wall_us() / 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        try:
            await place.world.cluster.patch("leases", "tessera-system", LEASE, {"spec": {"renewTime": at}})
        except NotFound:
            body = {"metadata": {"name": LEASE}, "spec": {"renewTime": at}}
            await place.world.cluster.create("leases", "tessera-system", body)
        await place.wait(5)


async def test_a_nomination_that_comes_to_nothing_is_voided_and_made_anew() -> None:
    async with town("a") as place:
        deaf(place)
        await renew(place, 10)
        pod = await held(place, "one", gpus=8)
        await place.until(lambda: place.state(pod) is State.RESERVED, 5)
        await renew(place, 155)
        assert place.state(pod) in {State.QUEUED, State.RESERVED}
        assert place.row(pod).attempts == 1


@pytest.mark.parametrize("lease", [True, False])
async def test_a_kube_scheduler_that_is_not_there_costs_nobody_an_attempt(*, lease: bool) -> None:
    async with town("a", "b") as place:
        if lease:  # it dies with several pods in its hands
            await renew(place, 10)
        deaf(place)
        pods = [await held(place, f"p{number}", gpus=1) for number in range(4)]
        await place.wait(1230)
        rows = [place.row(pod) for pod in pods]
        assert [row.attempts for row in rows] == [0] * 4
        assert {row.state for row in rows} <= {State.QUEUED, State.RESERVED}
        assert max(row.epoch for row in rows) > 1, "what was reserved was given up"
        desk, waiting = place.tessera.desk, [row for row in rows if row.state is State.QUEUED]
        assert {waiting_word(desk, row) for row in waiting} == {"SchedulerNotRunning"}
        assert {explanation(desk, row)["reasons"][0]["code"] for row in waiting} == {"SchedulerNotRunning"}
        wake(place)
        if lease:
            await renew(place, 5)
        await place.until(lambda: len(place.bound()) == 4, 60)
        assert [place.row(pod).attempts for pod in pods] == [0] * 4
        await place.wait(3)
        await place.check()


async def test_a_write_that_hangs_delays_no_other() -> None:
    async with town("a", "b") as place:
        first = await held(place, "first", gpus=1)
        await place.until(lambda: "first" in place.bound(), 5)
        place.line.late_s["patch"] = [30.0]
        stuck = await held(place, "stuck", gpus=1)
        await place.wait(1)
        assert not place.line.late_s["patch"], "the write has been sent, and hangs"
        for name in ("one", "two", "three"):
            await held(place, name, gpus=1)
            assert await place.until(lambda name=name: name in place.bound(), 5) < 1.0
        assert place.state(stuck) is State.RESERVED
        await place.until(lambda: "stuck" in place.bound(), 10)
        assert [place.row(pod).attempts for pod in (first, stuck)] == [0, 0]
        await place.wait(40)
        await place.check()


async def test_one_pod_tries_whether_a_kube_scheduler_is_there_and_the_others_wait() -> None:
    async with town("a", "b") as place:
        deaf(place)
        pods = [await held(place, f"p{number}", gpus=1) for number in range(6)]
        await place.wait(20)
        assert [place.state(pod) for pod in pods].count(State.RESERVED) == 1


async def test_nothing_is_let_go_while_the_lease_of_kube_scheduler_is_stale() -> None:
    async with town("a") as place:
        body = {"metadata": {"name": "tessera-kube-scheduler"}, "spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}
        await place.world.cluster.create("leases", "tessera-system", body)
        await place.wait(6)
        pod = await held(place, "one", gpus=1)
        await place.wait(20)
        assert place.state(pod) is State.QUEUED
        assert word(place, pod) == "SchedulerNotRunning"
        spec = {"renewTime": "2026-01-01T00:00:30.000000Z"}
        await place.world.cluster.patch("leases", "tessera-system", "tessera-kube-scheduler", {"spec": spec})
        await place.until(lambda: "one" in place.bound(), 20)


@pytest.mark.parametrize("point", ["turn.commit.before", "turn.commit.after", "release.ungate.before"])
async def test_a_kill_in_the_middle_of_many_loses_nobody(point: str) -> None:
    async with town("a", "b", "c", "d") as place:
        place.kill_at(point, time=4)
        names = [f"p{number}" for number in range(12)]
        for name in names:
            await held(place, name, gpus=2)
        await place.until(lambda: place.app is None, 30)
        place.spare()
        await place.wait(5)
        await place.start()
        await place.until(lambda: place.bound().keys() == set(names), 60)
        assert [name for name in reserved(place) if reserved(place).count(name) > 1] == []
        await place.wait(3)
        await place.check()


async def test_what_a_dead_process_let_go_is_given_up_in_time_and_its_nominations_are_taken_back() -> None:
    async with town("a", "b") as place:
        await held(place, "first", gpus=1)
        await place.until(lambda: "first" in place.bound(), 5)
        deaf(place)
        pods = [await held(place, f"p{number}", gpus=1) for number in range(6)]
        await place.until(lambda: all(place.state(pod) is State.RESERVED for pod in pods), 5)
        await place.wait(1)
        assert all([(await place.get(f"p{number}"))["status"]["nominatedNodeName"] for number in range(6)])
        place.kill()
        await place.wait(45)  # so that no sweep of the next process falls on the deadline
        await place.start()
        assert await place.until(lambda: all(place.row(pod).epoch > 1 for pod in pods), 150) < 80
        await place.wait(5)
        assert [place.state(pod) for pod in pods].count(State.RESERVED) <= 1, "one pod at most tries who is there"
        for pod in pods:
            if place.state(pod) is State.QUEUED:
                now = await place.get(pod["metadata"]["name"])
                assert not now["status"].get("nominatedNodeName"), "it would hold room for nobody"


async def test_a_direct_pod_that_waits_is_refused_in_a_word_and_nominated_when_its_turn_has_come() -> None:
    async with town("a") as place:
        await place.pod("first", gpus=8)
        await place.until(lambda: "first" in place.bound(), 5)
        waits = await place.pod("second", gpus=8)
        await place.wait(20)
        assert word(place, waits) == "WaitingForCapacity"
        await place.delete("first")
        await place.until(lambda: "second" in place.bound(), 5)
        assert ("patch", "second") in place.line.sent
        assert isinstance(place.clock, LoopClock)
        await place.wait(3)
        await place.check()
