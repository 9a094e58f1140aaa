"""Tessera is killed at every named point, and a new one goes on with the same ledger and cluster."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import scheduler
from scheduler import GATE
from scheduler.model.reservation import State
from tests.simulation.town import Switch, Town, town

ROOT = Path(scheduler.__file__).parent
ELSEWHERE = {"release.ask.before"}  # only a queue that grows comes by: test_autoscale kills there


def points() -> list[str]:
    """Every fault point that the source names."""
    return sorted(
        node.args[0].value
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "fault"
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


async def busy(place: Town) -> list[str]:
    """Send pods of all sizes, every other one held by the gate; of some the first Binding goes wrong."""
    place.world.cluster.faults.force("bind", "failed", "lost_reply", "failed", "failed")
    names = []
    for number, gpus in enumerate((8, 2, 0, 4, 1, 1)):
        names.append(f"pod-{number}")
        await place.pod(names[-1], gpus=gpus, **({"schedulingGates": [{"name": GATE}]} if number % 2 else {}))
        await place.wait(0.5)
    return names


@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("point", sorted({*points()} - ELSEWHERE))
async def test_killed_at(point: str, time: int) -> None:
    async with town("a", "b", seed=time) as place:
        place.kill_at(point, time=time)
        names = await busy(place)
        await place.until(lambda: place.app is None, 60)
        place.spare()
        await place.wait(5)
        await place.start()
        await place.until(lambda: place.bound().keys() == set(names), 60)
        await place.wait(5)
        await place.check()


@pytest.mark.parametrize("late_s", [0.5, 3.0, 20.0])
async def test_killed_with_a_binding_on_its_way(late_s: float) -> None:
    """The Binding of the dead arrives before, while or after its successor looks."""
    async with town("a") as place:
        place.line.late_s["bind"] = [late_s]
        await place.pod("first", gpus=8)
        await place.until(lambda: ("bind", "first") in place.line.sent, 5)
        place.kill()
        await place.wait(1)
        await place.start()
        await place.pod("second", gpus=8)
        await place.until(lambda: len(place.bound()) == 1, 60)
        await place.wait(30)
        assert len(place.bound()) == 1
        await place.check()


async def test_a_tessera_that_slept_through_its_successor_binds_nothing_any_more() -> None:
    async with town("a") as place:
        place.line.late_s["bind"] = [5.0]
        pod = await place.pod("one", gpus=8)
        await place.until(lambda: ("bind", "one") in place.line.sent, 5)
        sleeper, place.world.extender = place.tessera, None
        await place.start()
        place.world.extender = None
        assert place.state(pod) is State.QUEUED  # voided by a touch
        await place.wait(10)  # the sleeper's Binding is refused, and it looks why
        assert await place.node_of("one") == ""
        assert [verb for verb, _ in place.line.sent] == ["bind", "patch"]
        successor, place.app = place.tessera, sleeper
        place.kill()
        place.app, place.world.extender = successor, Switch(successor)
        await place.until(lambda: "one" in place.bound(), 30)
        await place.wait(3)
        await place.check()


@pytest.mark.parametrize("seed", range(4))
async def test_what_was_found_bound_at_the_start_is_booked_before_the_watch_tells(seed: int) -> None:
    async with town("a", seed=seed) as place:
        place.world.extender = Switch(place.tessera, silence_s=5.0)  # kube-scheduler's call runs into its time-out
        place.line.late_s["bind"] = [1.3]
        await place.pod("first", gpus=8)
        await place.until(lambda: ("bind", "first") in place.line.sent, 5)
        await place.pod("second", gpus=8)
        place.kill()
        await place.wait(1.0)
        weather = place.world.cluster.faults
        weather.force("get", "throttled")  # the read-back comes after the late Binding, the list came before it
        weather.watch_delay_s = 20.0
        await place.start()
        await place.wait(60)
        weather.calm()
        await place.wait(60)
        assert place.bound().keys() == {"first"}
        await place.check()
