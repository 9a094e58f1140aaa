"""Queues as the running program sees them: watched, judged by live namespaces, and their status written back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from scheduler.app import App
from scheduler.cli.serve import queues_of
from scheduler.clock import LoopClock
from scheduler.config import Settings
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.errors import ConfigError
from scheduler.ids import seeded_ids
from scheduler.intake.queue import read_queue
from scheduler.kube.port import ApiError, Kind, NotFound, Object, Page
from scheduler.model.queue import Queue
from scheduler.queues import ABSENT_S, STATUS_EVERY_S, QueueFeed, difference
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.contract.making import queue
from tests.objects import raw_node, raw_pod
from tests.virtual import virtual

HALF_LIFE_S = 60.0


@dataclass
class Watched:
    """A cluster whose queues can be taken away, and which counts the writes of their statuses."""

    cluster: EmbeddedCluster
    served: bool = True
    refuses: bool = False
    writes: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        if kind == "queues" and not self.served:
            raise NotFound(404, "NotFound", "the server could not find the requested resource")
        return await self.cluster.list(kind, limit=limit, after=after)

    async def patch(self, kind: Kind, *args: Any, **how: Any) -> Object:
        if kind == "queues":
            self.writes += 1
            if self.refuses:
                raise ApiError(500, "InternalError", "etcd is away")
        return await self.cluster.patch(kind, *args, **how)


@dataclass
class Here:
    watched: Watched
    app: App
    clock: LoopClock

    @property
    def queues(self) -> Any:
        return self.app.desk.queues

    async def later(self, seconds: float = STATUS_EVERY_S + 1) -> None:
        await self.clock.sleep(seconds)

    async def make(self, name: str, **spec: Any) -> Object:
        return await self.watched.cluster.create("queues", "", queue(name, **spec))

    async def status(self, name: str) -> Object:
        found: Object = (await self.watched.cluster.get("queues", "", name)).get("status", {})
        return found


@asynccontextmanager
async def town() -> AsyncIterator[Here]:
    """Tessera, not started yet, on a cluster with one node and one bound pod."""
    clock = LoopClock(asyncio.get_running_loop())
    cluster = EmbeddedCluster(clock, seeded_ids(random.Random(1)))
    cluster.preload("nodes", [raw_node("a")])
    cluster.preload("namespaces", [{"metadata": {"name": "default", "labels": {"team": "a"}}}])
    pod = raw_pod("p", 2, node="a")
    pod["metadata"]["labels"] = {"tessera.dev/queue": "vision"}
    cluster.preload("pods", [pod])
    store = Store.open("sqlite://")
    watched = Watched(cluster)
    app = App(Settings(queue={"halfLife": HALF_LIFE_S}), clock, watched, store, InlineWriter(store), random.Random(3))
    try:
        yield Here(watched, app, clock)
    finally:
        await app.stop()
        store.close()


@virtual(town)
async def test_a_queue_is_seen_used_and_told(here: Here) -> None:
    await here.make(
        "vision", nominal={"gpu": 1, "H100": 8, "cpu": "8"}, namespaceSelector={"matchLabels": {"team": "a"}}
    )
    await here.app.start()
    assert here.queues.refusal("vision", "default") == ""
    await here.later()
    status = await here.status("vision")
    assert status["used"] == {"gpu": 2, "H100": 2, "cpu": "4", "memory": "8Gi"}
    assert status["shown"] == {"used": "gpu 2/1, H100 2/8, cpu 4/8", "borrowed": "gpu 1"}
    (condition,) = status["conditions"]
    assert (condition["type"], condition["status"], condition["observedGeneration"]) == ("Ready", "True", 1)
    written = here.watched.writes
    await here.later(20 * STATUS_EVERY_S)
    assert here.watched.writes == written, "what has not changed is not written"
    await here.watched.cluster.delete("pods", "default", "p", grace_s=0)
    await here.later()
    status = await here.status("vision")
    assert status["used"] == {"gpu": 0, "H100": 0, "cpu": "0"}, "what is no longer used is taken out"
    assert status["shown"]["borrowed"] == ""


@virtual(town)
async def test_queues_come_change_and_go_while_tessera_runs(here: Here) -> None:
    await here.app.start()
    assert here.queues.refusal("vision", "default") == "QueueNotFound"
    await here.make("vision", namespaceSelector={"matchLabels": {"team": "a"}})
    await here.later(1)
    assert here.queues.refusal("vision", "default") == ""
    await here.watched.cluster.patch("namespaces", "", "default", {"metadata": {"labels": {"team": "b"}}})
    await here.later(1)
    assert here.queues.refusal("vision", "default") == "NotAuthorized"
    await here.watched.cluster.patch("queues", "", "vision", {"spec": {"namespaceSelector": {"matchLabels": None}}})
    await here.later(1)
    assert here.queues.refusal("vision", "default") == ""
    await here.watched.cluster.delete("namespaces", "", "default")
    await here.watched.cluster.delete("queues", "", "vision")
    await here.later(1)
    assert here.queues.refusal("vision", "default") == "QueueNotFound"


@virtual(town)
async def test_a_bad_queue_gets_a_sentence_and_ends_nothing(here: Here) -> None:
    await here.make("good", namespaceSelector={})
    await here.make("lost", parent="nowhere", namespaceSelector={})
    await here.make("worse", nominal={"gpu": -1}, namespaceSelector={})
    await here.app.start()
    await here.later()
    for name, said in (("lost", "there is no queue nowhere"), ("worse", "spec.nominal, 'gpu' must be 0 or more")):
        (condition,) = (await here.status(name))["conditions"]
        assert (condition["status"], condition["reason"]) == ("False", "Invalid")
        assert said in condition["message"]
        assert here.queues.refusal(name, "default") == "QueueStopped"
    assert here.queues.refusal("good", "default") == ""
    since = (await here.status("worse"))["conditions"][0]["lastTransitionTime"]
    await here.watched.cluster.patch("queues", "", "worse", {"spec": {"nominal": {"gpu": 1}}})
    await here.later()
    (condition,) = (await here.status("worse"))["conditions"]
    assert (condition["status"], here.queues.refusal("worse", "default")) == ("True", "")
    assert condition["lastTransitionTime"] > since
    here.app.crew.check()


@virtual(town)
async def test_without_the_crd_tessera_runs_and_notices_when_it_comes(here: Here) -> None:
    here.watched.served = False
    await here.app.start()
    assert here.app.unready() == ""
    assert here.queues.refusal("default", "default") == ""
    await here.make("vision", namespaceSelector={})
    here.watched.served = True
    await here.later(ABSENT_S + 2)
    assert here.queues.refusal("vision", "default") == ""
    here.app.crew.check()


@virtual(town)
async def test_a_status_that_could_not_be_written_is_written_later(here: Here) -> None:
    await here.make("vision", nominal={"gpu": 4})
    here.watched.refuses = True
    await here.app.start()
    await here.later()
    assert (await here.status("vision"), here.watched.writes > 0) == ({}, True)
    here.watched.refuses = False
    await here.later()
    assert (await here.status("vision"))["pending"] == 0


@virtual(town)
async def test_the_queues_of_a_file_count_instead(here: Here) -> None:
    await here.make("vision", namespaceSelector={})
    here.app.queues.given = [Queue("of-the-file")]
    await here.app.start()
    await here.later()
    assert sorted(here.queues.quota.queues) == ["default", "of-the-file"]
    assert here.watched.writes == 0


def test_a_file_is_read_or_said_to_be_missing(tmp_path: Any) -> None:
    path = tmp_path / "queues.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        queues_of(path)
    path.write_text("apiVersion: tessera.dev/v1alpha1\nkind: Queue\nmetadata: {name: a}\n")
    assert queues_of(path) == [read_queue(queue("a"))]
    assert queues_of(None) is None


def test_a_difference_is_what_changed_and_takes_out_what_is_gone() -> None:
    before = {"used": {"gpu": 1, "cpu": "2"}, "pending": 1, "borrowed": {}}
    after = {"used": {"gpu": 2}, "pending": 1, "borrowed": {}, "shown": {"used": "x"}}
    assert difference(before, after) == {"used": {"cpu": None, "gpu": 2}, "shown": {"used": "x"}}
    assert difference(after, after) == {}


@virtual(town)
async def test_what_queues_used_is_remembered_across_restarts(here: Here) -> None:
    await here.make("vision", nominal={"gpu": 4})
    await here.app.start()
    await here.later(HALF_LIFE_S)
    now_us = here.clock.wall_us()
    used = here.queues.spent.used("vision", now_us)
    assert used["gpu"] == pytest.approx(1_000_000, rel=0.1), "half of the two GPUs, a half-life after the start"
    for half_life_s, gpus in ((HALF_LIFE_S, 1.0), (HALF_LIFE_S / 30, 2.0)):
        other = Desk(here.clock, Policies(), book=here.app.desk.book)
        feed = QueueFeed(other, here.watched, here.clock, random.Random(1), str, here.app.store, half_life_s)
        await feed.recall()
        again = other.queues.spent.used("vision", now_us)
        assert again["gpu"] == pytest.approx(gpus * 1_000_000, rel=0.1)
        if half_life_s == HALF_LIFE_S:
            assert again == used, "the same journal gives the same numbers"
        await feed.recall()
        assert other.queues.spent.used("vision", now_us) == again, "no line counts twice"
