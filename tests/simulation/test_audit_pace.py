"""The audit of a large cluster leaves the loop to the pods: it rests between slices, and still sees every node."""

from __future__ import annotations

import asyncio
from random import Random

from scheduler.app import App
from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.embedded.world import World
from scheduler.ids import seeded_ids
from scheduler.loops import AUDIT_PAUSE_S, AUDIT_SLICE
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.objects import raw_node


async def test_an_audit_rests_between_slices_and_sees_the_last_node() -> None:
    slices, clock = 3, LoopClock(asyncio.get_running_loop())
    world = World(clock, seeded_ids(Random(1)), Random(1))
    world.cluster.preload("nodes", [raw_node(f"node-{n:03}") for n in range(slices * AUDIT_SLICE)])
    store = Store.open("sqlite://", new_id=seeded_ids(Random(2)))
    app = App(Settings(), clock, world.cluster, store, InlineWriter(store), Random(1))
    async with world.running():
        await app.start()
        began = clock.monotonic()
        assert await app.audit.look() == []
        assert clock.monotonic() - began >= slices * AUDIT_PAUSE_S
        row = app.desk.registry.columns.rows[f"node-{slices * AUDIT_SLICE - 1:03}"]
        app.desk.registry.columns.column("gpus_free")[row] = 7
        assert [finding for finding in await app.audit.look() if "gpus_free" in finding]
        await app.stop()
    store.close()
