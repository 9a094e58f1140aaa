"""One object that cannot be taken in: named once, counted, passed over, and nothing of it is left half-done."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from scheduler import loops
from scheduler.app import App
from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.ids import seeded_ids
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.model.node import Node
from scheduler.model.pod import Pod
from scheduler.model.reservation import State
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.objects import raw_node, raw_pod
from tests.virtual import virtual


class Place:
    """A Tessera that is not started yet, on a cluster with node `a` and a bound pod."""

    def __init__(self) -> None:
        clock = LoopClock(asyncio.get_running_loop())
        self.cluster = EmbeddedCluster(clock, seeded_ids(random.Random(1)))
        self.cluster.preload("nodes", [raw_node("a")])
        self.cluster.preload("pods", [raw_pod("good", gpus=0, node="a")])
        self.store = Store.open("sqlite://")
        self.app = self.tessera(clock)

    def tessera(self, clock: LoopClock) -> App:
        return App(Settings(), clock, self.cluster, self.store, InlineWriter(self.store), random.Random(3))

    async def add(self, name: str, **how: Any) -> None:
        raw = raw_pod(name, **how)
        del raw["metadata"]["uid"], raw["metadata"]["resourceVersion"]
        await self.cluster.create("pods", "default", raw)
        await self.app.clock.sleep(2)

    async def mark(self, name: str, value: str, kind: Any = "pods") -> None:
        namespace = "default" if kind == "pods" else ""
        await self.cluster.patch(kind, namespace, name, {"metadata": {"annotations": {"mark": value}}})
        await self.app.clock.sleep(2)

    async def poisoned(self) -> dict[str, float]:
        await self.app.metrics.refresh()
        lines = self.app.metrics.render().decode().splitlines()
        found = (line.split(" ") for line in lines if line.startswith("tessera_poison_objects{"))
        return {name.split('"')[1]: float(value) for name, value in found}

    def differences(self) -> list[str]:
        registry = self.app.desk.registry
        return [found for name in registry.nodes for found in registry.differences(name)]

    def named(self) -> list[str]:
        return sorted(pod.request.name for pod in self.app.desk.registry.pods.values())


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    here = Place()
    yield here
    await here.app.stop()
    here.store.close()


def bad(raw: Mapping[str, Any]) -> bool:
    return raw["metadata"]["name"].startswith("bad") and "healed" not in str(raw["metadata"].get("annotations"))


def reading_pods(raw: Mapping[str, Any]) -> Pod:
    if bad(raw):
        raise ZeroDivisionError("a bug")
    return read_pod(raw)


def reading_nodes(raw: Mapping[str, Any], products: Mapping[str, str]) -> Node | None:
    if bad(raw):
        raise ZeroDivisionError("a bug")
    return read_node(raw, products)


@pytest.fixture(autouse=True)
def bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading what is called bad raises, until it says that it is healed."""
    monkeypatch.setattr(loops, "read_pod", reading_pods)
    monkeypatch.setattr(loops, "read_node", reading_nodes)


@virtual(place)
async def test_a_start_passes_over_what_cannot_be_read(here: Place) -> None:
    here.cluster.preload("pods", [raw_pod("bad", gpus=0), raw_pod("other")])
    here.cluster.preload("nodes", [raw_node("bad-node")])
    with capture_logs() as said:
        await here.app.start()
    assert here.app.unready() == ""
    assert (here.named(), list(here.app.desk.registry.nodes)) == (["good", "other"], ["a"])
    assert await here.poisoned() == {"nodes": 1.0, "pods": 1.0}
    assert [(one["kind"], one["name"]) for one in said if one["event"] == "object.poison"] == [
        ("nodes", "bad-node"),
        ("pods", "bad"),
    ]


@virtual(place)
async def test_each_version_is_named_once_and_a_readable_one_ends_it(here: Place) -> None:
    await here.app.start()
    with capture_logs() as said:
        await here.add("bad")
        await here.add("other")
        await here.mark("bad", "still bad")
        await here.app.clock.sleep(120)  # sweeps and audits
        assert await here.poisoned() == {"nodes": 0.0, "pods": 1.0}
        assert (here.named(), here.app.unready()) == (["good", "other"], "")
        await here.mark("bad", "healed")
    named = [one["resourceVersion"] for one in said if one["event"] == "object.poison"]
    assert len(named) == len(set(named)) == 2
    assert not [one for one in said if one["event"] == "loop.failed"]
    assert await here.poisoned() == {"nodes": 0.0, "pods": 0.0}
    assert here.named() == ["bad", "good", "other"]


@virtual(place)
async def test_what_is_deleted_is_counted_no_more(here: Place) -> None:
    await here.app.start()
    await here.add("bad")
    await here.cluster.delete("pods", "default", "bad", grace_s=0)
    await here.app.clock.sleep(2)
    assert await here.poisoned() == {"nodes": 0.0, "pods": 0.0}


@virtual(place)
async def test_a_waiting_request_whose_pod_cannot_be_read_after_a_restart_is_not_taken_for_gone(here: Place) -> None:
    await here.app.start()
    await here.add("bad", gpus=9)
    await here.mark("bad", "healed")
    (row,) = [row for row in here.app.desk.book.live() if row.name == "bad"]
    await here.app.crew.dismiss()
    await here.mark("bad", "still bad")
    here.app = here.tessera(LoopClock(asyncio.get_running_loop()))
    await here.app.start()
    await here.app.clock.sleep(120)
    assert here.app.desk.book.rows[row.id].state is State.QUEUED


@pytest.mark.parametrize(("phase", "foreign"), [("Running", True), ("Succeeded", False)])
def test_the_node_of_a_bound_pod_that_cannot_be_read_takes_no_more_device_asks(phase: str, foreign: bool) -> None:
    @virtual(place)
    async def story(here: Place) -> None:
        here.cluster.preload("nodes", [raw_node("b")])
        here.cluster.preload("pods", [raw_pod("bad", node="b", phase=phase)])
        await here.app.start()
        snapshot, rows = here.app.desk.registry.snapshot(), here.app.desk.registry.columns.rows
        assert bool(snapshot.foreign[rows["b"]]) is foreign
        await here.mark("bad", "healed")
        assert here.differences() == []

    story()


@pytest.mark.parametrize("step", ["_add", "_tell_foreign", "_touch"])
def test_what_cannot_be_applied_leaves_an_inventory_that_equals_a_rebuild(step: str) -> None:
    @virtual(place)
    async def story(here: Place) -> None:
        await here.app.start()
        registry, bugs = here.app.desk.registry, ["a bug"]
        right = getattr(registry, step)

        def wrong(*arguments: object) -> None:
            right(*arguments)
            if bugs:
                raise ZeroDivisionError(bugs.pop())

        setattr(registry, step, wrong)
        free = int(registry.snapshot().gpus_free[0])
        await here.add("new", node="a", gpus=2, scheduler="other")
        assert not bugs
        assert await here.poisoned() == {"nodes": 0.0, "pods": 1.0}
        assert (here.app.unready(), here.named(), here.differences()) == ("", ["good"], [])
        assert registry.snapshot().gpus_free[0] == free
        assert registry.snapshot().foreign[0], "unknown is not free"
        await here.mark("new", "healed")
        assert await here.poisoned() == {"nodes": 0.0, "pods": 0.0}
        assert (here.named(), here.differences()) == (["good", "new"], [])
        assert registry.snapshot().gpus_free[0] == free - 2

    story()
