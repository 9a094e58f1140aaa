"""What agents say reaches every decision: bad GPUs are not given, a silent exact node gets nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from policies.columns import Health
from scheduler.app import App
from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.desk import Desk
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.ids import seeded_ids
from scheduler.intake.pod import read_pod
from scheduler.model.node import Seen, Sighting
from scheduler.model.pod import Pod
from scheduler.model.reservation import State
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.contract.cases_bind_protocol import Meddler, Stage
from tests.objects import raw_node, raw_pod
from tests.virtual import virtual

GPUS = 8


def told(*bad: int) -> Sighting:
    healths = [Health.BAD if slot in bad else Health.HEALTHY for slot in range(GPUS)]
    return Sighting(tuple(Seen(slot, f"GPU-{slot}", health, mig_mode=False) for slot, health in enumerate(healths)))


@asynccontextmanager
async def one_node(mode: str = "exact") -> AsyncGenerator[Stage, None]:
    clock = LoopClock(asyncio.get_running_loop())
    cluster = EmbeddedCluster(clock, seeded_ids(random.Random(1)))
    cluster.preload("nodes", [raw_node("a", mode=mode)])
    store, meddler = Store.open("sqlite://"), Meddler(cluster)
    app = App(Settings(), clock, meddler, store, InlineWriter(store), random.Random(3))
    await app.start()
    try:
        yield Stage(cluster, meddler, app, "a")
    finally:
        await app.stop()
        store.close()


def pod(name: str, gpus: int = 1) -> Pod:
    return read_pod(raw_pod(name, gpus))


def answer(desk: Desk, one: Pod) -> tuple[list[str], str]:
    found = desk.filter(one, ["a"])
    return found.names, found.reason


@virtual(one_node)
async def test_bad_gpus_are_not_given(here: Stage) -> None:
    desk = here.app.desk
    desk.registry.hear("a", told(0, 1))
    assert answer(desk, pod("seven", 7)) == ([], "GpuUnhealthy")
    assert answer(desk, pod("six", 6)) == (["a"], "")
    held = desk.registry.held("uid-six")
    assert held is not None
    assert [slot for slot, _ in held.devices] == [2, 3, 4, 5, 6, 7]
    desk.registry.hear("a", told())
    desk.drop_intent("uid-six")
    assert answer(desk, pod("seven", 7)) == (["a"], ""), "it was refused before, and is judged anew"


@virtual(one_node)
async def test_silence_refuses_devices_alone_and_ends_with_a_report(here: Stage) -> None:
    desk = here.app.desk
    assert answer(desk, pod("before")) == (["a"], ""), "it never had an agent"
    desk.registry.hear("a", told())
    desk.registry.hush("a")
    assert answer(desk, pod("gpu")) == ([], "InventoryStale")
    assert answer(desk, pod("cpu", 0)) == (["a"], "")
    desk.registry.hear("a", told())
    assert answer(desk, pod("gpu")) == (["a"], "")


@virtual(lambda: one_node("observed"))
async def test_an_observed_node_goes_on_without_its_agent(here: Stage) -> None:
    desk = here.app.desk
    desk.registry.hear("a", told())
    desk.registry.hush("a")
    assert answer(desk, pod("gpu")) == (["a"], "")


@pytest.mark.parametrize(("after", "why"), [("hush", "InventoryStale"), ("bad", "GpuUnhealthy"), ("well", "")])
def test_what_was_reserved_is_bound_only_while_it_is_well(after: str, why: str) -> None:
    async def inside(here: Stage) -> None:
        desk = here.app.desk
        desk.registry.hear("a", told())
        raw = await here.pod()
        reserved = desk.reserve(desk.registry.pods[raw["metadata"]["uid"]])
        assert reserved is not None
        await here.app.writer.commit(reserved[0])
        if after == "hush":
            desk.registry.hush("a")
        else:
            desk.registry.hear("a", told(*range(GPUS)) if after == "bad" else told())
        assert (await here.bind(raw)).endswith(why)
        assert here.row(raw).state is (State.RESERVED if why else State.BOUND)
        if why:
            desk.registry.hear("a", told())
            assert await here.bind(raw) == ""

    virtual(one_node)(inside)()
