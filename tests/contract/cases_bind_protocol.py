"""What becomes of a bind when the API server, a stranger or the network gets in its way.

Fixtures of the module that imports these cases: `cluster` (anybody's port to the cluster), `ours` (Tessera's own port)
and `clock`. Every case ends with an audit that finds nothing and a journal that verifies.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson

from scheduler.app import App
from scheduler.clock import Clock
from scheduler.config import Settings
from scheduler.kube.port import Cluster, Conflict, Object, UnknownOutcome
from scheduler.model.reservation import Row, State
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.contract.making import binding, create_pod, fresh_name, name_of
from tests.objects import raw_node

WAIT_S = 10.0
Meddling = Callable[[Object], Awaitable[None]]


class Meddler:
    """A port that passes everything on, but lets the test act before and after a Binding."""

    def __init__(self, inner: Cluster) -> None:
        self._inner = inner
        self.before: Meddling | None = None
        self.after: Meddling | None = None
        self.bindings: list[Object] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def bind(self, namespace: str, name: str, body: Object) -> None:
        self.bindings.append(body)
        if self.before is not None:
            await self.before(body)
        await self._inner.bind(namespace, name, body)
        if self.after is not None:
            await self.after(body)


class Stage:
    """A running Tessera without a kube-scheduler: the test asks in its place."""

    def __init__(self, cluster: Cluster, meddler: Meddler, app: App, node: str) -> None:
        self.cluster, self.meddler, self.app, self.node = cluster, meddler, app, node

    async def pod(self, name: str = "", gpus: int = 2) -> Object:
        amounts = {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": str(gpus)}
        main = {"name": "main", "image": "pause:3.10", "resources": {"requests": amounts, "limits": amounts}}
        body = {
            "metadata": {"name": name or fresh_name("pod")},
            "spec": {"schedulerName": "tessera", "containers": [main]},
        }
        made = await create_pod(self.cluster, body)
        await self.until(lambda: made["metadata"]["uid"] in self.app.desk.registry.pods)
        return made

    async def bind(self, pod: Object, node: str = "") -> str:
        meta = pod["metadata"]
        args = {"PodName": meta["name"], "PodNamespace": "default", "PodUID": meta["uid"], "Node": node or self.node}
        _, reply = await self.app.extender.bind(orjson.dumps(args))
        return str(orjson.loads(reply)["Error"])

    async def now(self, pod: Object) -> Object:
        return await self.cluster.get("pods", "default", name_of(pod))

    def row(self, pod: Object) -> Row:
        return self.app.desk.book.rows[pod["metadata"]["uid"]]

    async def until(self, true: Callable[[], bool], wait_s: float = WAIT_S) -> None:
        async with asyncio.timeout(wait_s):
            while not true():
                await self.app.clock.sleep(0.01)


@asynccontextmanager
async def stage(cluster: Cluster, ours: Cluster, clock: Clock) -> AsyncIterator[Stage]:
    raw = raw_node(fresh_name("node"), gpus=8)
    del raw["metadata"]["uid"], raw["metadata"]["resourceVersion"]
    node = name_of(await cluster.create("nodes", "", raw))
    store = Store.open("sqlite://")
    meddler = Meddler(ours)
    app = App(Settings(), clock, meddler, store, InlineWriter(store), random.Random(3))  # type: ignore[arg-type]
    await app.start()
    yield Stage(cluster, meddler, app, node)
    meddler.before = meddler.after = None
    await app.reconcile.sweep()
    async with asyncio.timeout(WAIT_S):  # the watch may lag behind
        while await app.audit.look():
            await clock.sleep(0.01)
    await app.stop()
    assert store.verify_tail().ok
    store.close()
    for pod in (await cluster.list("pods")).items:
        if pod["metadata"]["namespace"] == "default":
            await cluster.delete("pods", "default", name_of(pod), grace_s=0)
    await cluster.delete("nodes", "", node)


async def test_bound_in_one_write_with_its_devices(cluster: Cluster, ours: Cluster, clock: Clock) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()
        assert not await here.bind(pod)
        now = await here.now(pod)
        assert now["spec"]["nodeName"] == here.node
        assert orjson.loads(now["metadata"]["annotations"]["tessera.dev/allocation"])["id"] == pod["metadata"]["uid"]
        assert len(here.meddler.bindings) == 1


async def test_wrong_uid_binds_nothing(cluster: Cluster, ours: Cluster, clock: Clock) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()
        stranger = {"metadata": {**pod["metadata"], "uid": "00000000-0000-0000-0000-000000000000"}}
        assert "another uid" in await here.bind(stranger)
        assert not here.meddler.bindings


async def test_a_stale_resource_version_is_read_again(cluster: Cluster, ours: Cluster, clock: Clock) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()

        async def stranger(_: Object) -> None:
            here.meddler.before = None
            await cluster.patch("pods", "default", name_of(pod), {"metadata": {"annotations": {"a": "stranger"}}})

        here.meddler.before = stranger
        assert not await here.bind(pod)
        assert len(here.meddler.bindings) == 2
        assert here.row(pod).state is State.BOUND
        assert here.row(pod).attempts == 0


async def test_bound_again_is_success_on_the_same_node_and_a_conflict_elsewhere(
    cluster: Cluster, ours: Cluster, clock: Clock
) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()
        assert not await here.bind(pod)
        assert not await here.bind(pod)
        assert f"already bound to node {here.node}" in await here.bind(pod, "elsewhere")
        assert len(here.meddler.bindings) == 1


async def test_two_binds_at_once_are_one(cluster: Cluster, ours: Cluster, clock: Clock) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()
        assert await asyncio.gather(*(here.bind(pod) for _ in range(5))) == [""] * 5
        assert len(here.meddler.bindings) == 1


async def test_a_lost_reply_is_read_back_and_counts(cluster: Cluster, ours: Cluster, clock: Clock) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()

        async def lose(_: Object) -> None:
            raise UnknownOutcome("the reply was lost")

        here.meddler.after = lose
        assert not await here.bind(pod)
        assert len(here.meddler.bindings) == 1
        assert here.row(pod).state is State.BOUND


async def test_an_unclear_post_that_did_nothing_is_voided_and_can_be_repeated(
    cluster: Cluster, ours: Cluster, clock: Clock
) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()

        async def vanish(_: Object) -> None:
            raise UnknownOutcome("sent into the void")

        here.meddler.before = vanish
        assert await here.bind(pod)
        row = here.row(pod)
        assert (row.state, row.attempts, row.epoch) == (State.QUEUED, 1, 2)
        assert (await here.now(pod))["metadata"]["annotations"]["tessera.dev/touch"] == "1"
        here.meddler.before = None
        assert not await here.bind(pod)
        assert '"epoch":2' in (await here.now(pod))["metadata"]["annotations"]["tessera.dev/allocation"]


async def test_a_bind_that_arrives_after_the_touch_is_refused(cluster: Cluster, ours: Cluster, clock: Clock) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()
        late: list[Object] = []

        async def delay(body: Object) -> None:
            late.append(body)
            raise UnknownOutcome("still under way")

        here.meddler.before = delay
        assert await here.bind(pod)
        try:
            await ours.bind("default", name_of(pod), late[0])
        except Conflict:
            pass
        else:
            raise AssertionError("the late Binding took effect")
        assert "nodeName" not in (await here.now(pod))["spec"]


async def test_a_pod_made_anew_under_the_same_name_is_not_bound_by_the_old_bind(
    cluster: Cluster, ours: Cluster, clock: Clock
) -> None:
    async with stage(cluster, ours, clock) as here:
        old = await here.pod()
        made: list[Object] = []

        async def replace(_: Object) -> None:
            here.meddler.before = None
            await cluster.delete("pods", "default", name_of(old), grace_s=0)
            made.append(await here.pod(name_of(old)))

        here.meddler.before = replace
        assert await here.bind(old)
        assert here.row(old).state is State.CANCELLED
        assert "nodeName" not in (await here.now(made[0]))["spec"]
        assert not await here.bind(made[0])


async def test_a_pod_deleted_while_its_bind_is_in_flight_gives_its_room_back(
    cluster: Cluster, ours: Cluster, clock: Clock
) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod(gpus=8)

        async def delete(_: Object) -> None:
            here.meddler.before = None
            await cluster.delete("pods", "default", name_of(pod), grace_s=0)

        here.meddler.before = delete
        assert await here.bind(pod)
        await here.until(lambda: here.row(pod).state is State.CANCELLED)
        assert not await here.bind(await here.pod(gpus=8))


async def test_a_pod_bound_by_somebody_else_is_booked_where_it_is(
    cluster: Cluster, ours: Cluster, clock: Clock
) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()

        async def overtake(_: Object) -> None:
            here.meddler.before = None
            await cluster.bind("default", name_of(pod), binding(pod, "elsewhere"))

        here.meddler.before = overtake
        assert await here.bind(pod)
        assert (here.row(pod).state, here.row(pod).node) == (State.BOUND, "elsewhere")


async def test_an_ended_request_that_memory_has_dropped_is_recalled_from_the_store(
    cluster: Cluster, ours: Cluster, clock: Clock
) -> None:
    async with stage(cluster, ours, clock) as here:
        pod = await here.pod()
        uid = pod["metadata"]["uid"]
        await here.until(lambda: uid in here.app.desk.book.rows)
        bad = {"metadata": {"annotations": {"tessera.dev/gpu-model": ","}}}
        await cluster.patch("pods", "default", name_of(pod), bad)
        await here.until(lambda: here.row(pod).state is State.REJECTED)
        here.app.desk.book._place(uid, None)  # as after ten thousand others
        here.app.settler.mark(uid)
        await here.until(lambda: uid in here.app.desk.book.rows and not here.app.settler.working)
        assert here.row(pod).state is State.REJECTED
        good = {"metadata": {"annotations": {"tessera.dev/gpu-model": None}}}
        await cluster.patch("pods", "default", name_of(pod), good)
        await here.until(lambda: here.row(pod).state is State.QUEUED)
        assert not await here.bind(pod)
        assert here.row(pod).epoch == 2
