"""What becomes of claims, attempts and marks when commits fail, calls hang, or the API server is busy."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from scheduler.app import App
from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.injected import Faults
from scheduler.errors import StoreError
from scheduler.ids import seeded_ids
from scheduler.kube.port import ApiError, Kind, Object
from scheduler.ledger.lifecycle import ATTEMPTS_MAX
from scheduler.model.queue import DEFAULT_QUEUE, Queue, Selector
from scheduler.model.reservation import Change, State
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.contract.cases_bind_protocol import Meddler, Stage
from tests.contract.making import binding, name_of
from tests.objects import raw_node
from tests.virtual import virtual


class Moody(InlineWriter):
    """A writer that fails as often as it is told."""

    fails: list[Exception]
    meanwhile: Callable[[], object]

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.fails, self.meanwhile = [], bool

    async def commit(self, changes: tuple[Change, ...]) -> None:
        if self.fails:
            self.meanwhile()
            raise self.fails.pop(0)
        await super().commit(changes)


class Hanging(EmbeddedCluster):
    """An API server that never answers a GET of certain pods."""

    mute: frozenset[str] = frozenset()

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        if name in self.mute:
            await self._clock.sleep(1e6)
        return await super().get(kind, namespace, name)


class Place(Stage):
    """A running Tessera on one node of eight GPUs."""

    writer: Moody
    cluster: Hanging


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    clock = LoopClock(asyncio.get_running_loop())
    cluster = Hanging(clock, seeded_ids(random.Random(1)), faults=Faults(random.Random(1)))
    raw = raw_node("a", gpus=8)
    del raw["metadata"]["uid"], raw["metadata"]["resourceVersion"]
    await cluster.create("nodes", "", raw)
    store = Store.open("sqlite://")
    writer, meddler = Moody(store), Meddler(cluster)
    app = App(Settings(), clock, meddler, store, writer, random.Random(3))  # type: ignore[arg-type]
    await app.start()
    here = Place(cluster, meddler, app, "a")
    here.writer = writer
    yield here
    cluster.mute = frozenset()
    await app.stop()
    assert store.verify().ok
    store.close()


@virtual(place)
async def test_an_adoption_that_could_not_be_written_leaves_nothing_booked(here: Place) -> None:
    pod = await here.pod(gpus=2)
    uid = pod["metadata"]["uid"]
    await here.until(lambda: uid in here.app.desk.book.rows and not here.app.settler.working)
    here.writer.fails = [StoreError("the disk is full")]
    await here.cluster.bind("default", name_of(pod), binding(pod, "a"))
    await here.until(lambda: not here.writer.fails)
    await here.cluster.delete("pods", "default", name_of(pod), grace_s=0)
    await here.until(lambda: here.row(pod).state is State.CANCELLED)
    assert here.app.desk.registry.held(uid) is None


@virtual(place)
async def test_a_charge_that_could_not_be_given_up_stands_though_the_queues_changed_meanwhile(here: Place) -> None:
    """The disk fails while a pod's end is written, and at that moment somebody changes a quota."""
    desk = here.app.desk

    def limit(gpus: int) -> None:
        queue = Queue(DEFAULT_QUEUE, nominal={"gpu": gpus}, namespaces=Selector())
        desk.queues.replace([(queue, "")])
        desk.order.charging.settle(desk.book.rows)

    limit(8)
    pod = await here.pod(gpus=2)
    await here.until(lambda: pod["metadata"]["uid"] in desk.book.rows and not here.app.settler.working)
    assert not await here.bind(pod)
    await here.until(lambda: here.row(pod).state is State.BOUND)
    here.writer.fails, here.writer.meanwhile = [StoreError("the disk is full")], lambda: limit(4)
    await here.cluster.delete("pods", "default", name_of(pod), grace_s=0)
    await here.until(lambda: not here.writer.fails)
    held = [desk.order.charging.usage.held[DEFAULT_QUEUE, "gpu"]]
    await here.until(lambda: here.row(pod).state is State.RELEASED)
    held.append(desk.order.charging.usage.held.get((DEFAULT_QUEUE, "gpu"), 0))
    assert held == [2, 0]


@virtual(place)
async def test_a_claim_is_taken_back_whatever_kept_its_commit_from_being_written(here: Place) -> None:
    pod = await here.pod(gpus=8)
    await here.until(lambda: pod["metadata"]["uid"] in here.app.desk.book.rows and not here.app.settler.working)
    here.writer.fails = [ValueError("a bug in the store")]
    with pytest.raises(ValueError, match="a bug"):
        await here.bind(pod)
    assert here.app.desk.registry.held(pod["metadata"]["uid"]) is None
    assert not await here.bind(pod)


@virtual(place)
async def test_a_request_whose_attempts_are_spent_gets_no_new_life_by_a_bind(here: Place) -> None:
    """kube-scheduler asks again for a reservation whose outcome was unclear, and that turns out to be the last one."""
    pod = await here.pod(gpus=2)
    for _ in range(ATTEMPTS_MAX - 1):
        here.cluster.faults.force("bind", "failed")
        assert await here.bind(pod)
        await here.app.clock.sleep(6)  # else the breaker opens
    assert here.row(pod).attempts == ATTEMPTS_MAX - 1
    here.cluster.faults.force("bind", "failed")
    here.cluster.faults.force("get", "throttled")  # so the bind ends with the row still BINDING
    assert await here.bind(pod)
    assert here.row(pod).state is State.BINDING
    assert "attempts" in await here.bind(pod)
    assert here.row(pod).state is State.FAILED
    assert "nodeName" not in (await here.now(pod))["spec"]


@virtual(place)
async def test_a_busy_api_server_costs_no_attempt(here: Place) -> None:
    pod = await here.pod(gpus=2)
    here.cluster.faults.retry_after_s = 0.2
    here.cluster.faults.force("bind", "throttled", "throttled")
    assert not await here.bind(pod)
    row = here.row(pod)
    assert (row.state, row.attempts, row.epoch) == (State.BOUND, 0, 1)


@virtual(place)
async def test_one_call_that_hangs_keeps_nobody_else_waiting(here: Place) -> None:
    stuck, other = await here.pod("stuck"), await here.pod("other")
    assert not await here.bind(stuck)
    assert not await here.bind(other)
    here.cluster.mute = frozenset({"stuck"})
    uid = stuck["metadata"]["uid"]
    here.app.desk.registry.remove_pod(uid)  # as a watch with a gap would have it
    here.app.settler.mark(uid)
    await here.until(lambda: uid in here.app.settler.working)
    await here.cluster.delete("pods", "default", "other", grace_s=0)
    await here.until(lambda: here.row(other).state is State.RELEASED)


@virtual(place)
async def test_what_happens_to_a_pod_while_it_is_bound_is_settled_right_after(here: Place) -> None:
    pod = await here.pod(gpus=8)

    async def reject(_: Object) -> None:
        """The kubelet refuses the pod before our answer arrives."""
        await here.cluster.patch("pods", "default", name_of(pod), {"status": {"phase": "Failed"}}, subresource="status")
        await here.until(lambda: here.app.desk.registry.pods[pod["metadata"]["uid"]].terminal)

    here.meddler.after = reject
    assert not await here.bind(pod)
    await here.until(lambda: here.row(pod).state is State.FAILED)
    assert here.app.desk.registry.held(pod["metadata"]["uid"]) is None


@virtual(place)
async def test_a_bind_that_begins_too_late_claims_nothing(here: Place) -> None:
    """kube-scheduler has taken its assumption back by then and may have given the cpu to another."""
    pod = await here.pod(gpus=2)
    uid = pod["metadata"]["uid"]
    await here.until(lambda: uid in here.app.desk.book.rows and not here.app.settler.working)
    async with here.app.settler.alone(uid):
        assert "deadline" in await here.bind(pod)
    await here.until(lambda: not here.app.binder._running)
    assert here.app.desk.registry.held(uid) is None
    assert not here.meddler.bindings
    assert here.row(pod).state is State.QUEUED


@virtual(place)
async def test_a_touch_that_is_refused_for_good_is_tried_ever_less_often(here: Place) -> None:
    """As by an admission policy that takes this Tessera for a stranger, while kube-scheduler asks again and again."""
    pod = await here.pod(gpus=2)
    touches: list[float] = []

    async def refuse(*_: object, **__: object) -> Object:
        touches.append(here.app.clock.monotonic())
        raise ApiError(422, "Invalid", "not by you")

    here.meddler.patch = refuse  # type: ignore[attr-defined]
    here.cluster.faults.force("bind", "failed")
    for _ in range(5):
        assert await here.bind(pod)
    began = here.app.clock.monotonic()
    await here.app.clock.sleep(300)
    late = [at for at in touches if at > began + 200]
    assert 1 <= len(late) <= 8  # every 60 s by its own timer, every 30 s by the sweep
    del here.meddler.patch  # type: ignore[attr-defined]
    await here.until(lambda: here.row(pod).state is State.QUEUED, wait_s=100)
