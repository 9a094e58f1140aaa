"""Tessera is killed at every named point, and a new one goes on with the same ledger and cluster."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import scheduler
from tests.simulation.town import Town, town

ROOT = Path(scheduler.__file__).parent


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
    """Send pods of all sizes; of some the first Binding goes wrong."""
    place.world.cluster.faults.force("bind", "failed", "lost_reply", "failed", "failed")
    names = []
    for number, gpus in enumerate((8, 2, 0, 4, 1, 1)):
        names.append(f"pod-{number}")
        await place.pod(names[-1], gpus=gpus)
        await place.wait(0.5)
    return names


@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("point", points())
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
