"""What may go wrong around one Binding, on the whole program."""

from __future__ import annotations

import orjson
import pytest

from scheduler import RETRY, TOUCH
from scheduler.kube.port import Conflict, Object
from scheduler.model.reservation import State
from tests.simulation.town import Town, annotation, town


async def ask_bind(place: Town, pod: Object, node: str, *, uid: str = "") -> str:
    metadata = pod["metadata"]
    body = {"PodName": metadata["name"], "PodNamespace": "default", "PodUID": uid or metadata["uid"], "Node": node}
    status, answer = await place.tessera.extender.bind(orjson.dumps(body))
    assert status == 200
    error: str = orjson.loads(answer)["Error"]
    return error


async def test_a_wrong_uid_binds_nothing() -> None:
    async with town("a") as place:
        place.world.extender = None
        pod = await place.pod("one")
        await place.wait(1)
        assert await ask_bind(place, pod, "a", uid="00000000-0000-4000-8000-000000000000")
        assert await place.node_of("one") == ""
        assert not [name for verb, name in place.line.sent if verb == "bind"]
        assert await ask_bind(place, pod, "a") == ""
        await place.wait(3)
        await place.check()


async def test_a_strangers_patch_meanwhile_costs_one_more_post() -> None:
    async with town("a") as place:
        place.line.late_s["bind"] = [0.2]
        await place.pod("one")
        await place.until(lambda: bool(place.line.sent), 5)
        await place.world.cluster.patch("pods", "default", "one", {"metadata": {"labels": {"stranger": "was-here"}}})
        await place.until(lambda: "one" in place.bound(), 5)
        assert place.line.sent == [("bind", "one")] * 2
        await place.wait(3)
        await place.check()


async def test_bound_again_it_says_yes_for_its_node_and_no_for_another() -> None:
    async with town("a", "b") as place:
        pod = await place.pod("one")
        await place.until(lambda: "one" in place.bound(), 5)
        node = await place.node_of("one")
        before = list(place.line.sent)
        assert await ask_bind(place, pod, node) == ""
        assert "already bound" in await ask_bind(place, pod, "b" if node == "a" else "a")
        assert place.line.sent == before
        await place.wait(3)
        await place.check()


async def test_a_binding_that_arrives_after_its_touch_is_void() -> None:
    async with town("a") as place:
        place.line.late_s["bind"] = [30.0]
        await place.pod("one", gpus=8)
        await place.until(lambda: bool(place.line.sent), 5)
        place.kill()
        await place.start()
        await place.until(lambda: "one" in place.bound(), 25)
        one = await place.get("one")
        assert TOUCH in one["metadata"]["annotations"]
        first = annotation(one)
        assert orjson.loads(first)["epoch"] == 2
        await place.wait(40)  # the late one has arrived by now
        assert annotation(await place.get("one")) == first
        await place.check()


@pytest.mark.parametrize("failure", ["lost_reply", "failed", "conflict", "throttled"])
async def test_an_unclear_answer_is_read_back(failure: str) -> None:
    async with town("a") as place:
        place.world.cluster.faults.force("bind", failure)
        pod = await place.pod("one", gpus=3)
        await place.until(lambda: place.state(pod) in {State.BOUND, State.RUNNING}, 30)
        await place.wait(3)
        epoch = orjson.loads(annotation(await place.get("one")))["epoch"]
        assert epoch == (2 if failure == "failed" else 1)  # only what may still arrive is voided
        await place.check()


async def test_the_answer_is_lost_and_the_read_back_fails_too() -> None:
    async with town("a") as place:
        place.world.cluster.faults.force("bind", "lost_reply")
        place.world.cluster.faults.force("get", "failed", "throttled")
        pod = await place.pod("one", gpus=3)
        await place.until(lambda: place.state(pod) in {State.BOUND, State.RUNNING}, 30)
        await place.wait(3)
        assert len([verb for verb, _ in place.line.sent if verb == "bind"]) == 1
        await place.check()


@pytest.mark.parametrize("late_s", [0.3, 1.0, 5.0])
async def test_a_pod_deleted_while_its_bind_is_in_flight_frees_its_room(late_s: float) -> None:
    async with town("a") as place:
        place.line.late_s["bind"] = [late_s]
        pod = await place.pod("gone", gpus=8)
        await place.until(lambda: bool(place.line.sent), 5)
        await place.delete("gone")
        await place.pod("next", gpus=8)
        await place.until(lambda: "next" in place.bound(), 20)
        await place.wait(5)
        assert place.row(pod).state is State.CANCELLED
        await place.check()


async def test_recreated_under_its_name_while_the_bind_is_in_flight() -> None:
    async with town("a") as place:
        place.line.late_s["bind"] = [0.5]
        await place.pod("same", gpus=8)
        await place.until(lambda: bool(place.line.sent), 5)
        await place.delete("same")
        again = await place.pod("same", gpus=8)
        await place.until(lambda: place.state(again) is State.RUNNING, 30)
        await place.wait(3)
        await place.check()


async def test_a_slow_commit_keeps_its_room_from_others() -> None:
    async with town("a") as place:
        place.stall_at("bind.commit.before", 1.0)
        await place.pod("slow", gpus=5)
        await place.until(lambda: len(place.tessera.settler.working) == 1, 5)
        await place.pod("other", gpus=5)
        await place.until(lambda: "slow" in place.bound(), 10)
        await place.wait(10)
        assert place.bound().keys() == {"slow"}
        await place.check()


async def test_past_its_deadline_a_bind_ends_in_the_background() -> None:
    async with town("a") as place:
        place.line.late_s["bind"] = [10.0]
        await place.pod("slow", gpus=8)
        await place.until(lambda: "slow" in place.bound(), 30)
        await place.wait(5)
        # kube-scheduler's note about the late answer made the first POST stale; the second was of the same reservation
        assert place.line.sent == [("bind", "slow")] * 2
        assert orjson.loads(annotation(await place.get("slow")))["epoch"] == 1
        await place.check()


async def test_a_forced_wake_that_fails_is_tried_again() -> None:
    async with town("a") as place:
        await place.pod("first", gpus=8)
        await place.until(lambda: "first" in place.bound(), 5)
        await place.pod("second", gpus=8)
        await place.wait(30)
        place.world.cluster.faults.force("patch", "failed")
        await place.delete("first")
        await place.until(lambda: "second" in place.bound(), 30)
        await place.wait(3)
        await place.check()


async def test_somebody_else_binds_our_pod_and_it_is_adopted() -> None:
    async with town("a", "b") as place:
        place.world.extender = None
        pod = await place.pod("one", gpus=2)
        await place.wait(1)
        body = {"metadata": {"name": "one"}, "target": {"name": "b"}}
        await place.world.cluster.bind("default", "one", body)
        await place.until(lambda: place.state(pod) in {State.BOUND, State.RUNNING}, 10)
        assert place.row(pod).node == "b"
        with pytest.raises(Conflict):
            await place.world.cluster.bind("default", "one", {**body, "target": {"name": "a"}})
        assert RETRY not in (await place.get("one"))["metadata"].get("annotations", {})
