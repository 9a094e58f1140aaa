"""A sink that watches its reflector, and clusters whose watches are rougher than any embedded fault."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from scheduler.clock import LoopClock, VirtualLoop
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.kube.port import Gone, Kind, Object, Page, WatchEvent

T = TypeVar("T")


def virtually(main: Callable[[LoopClock], Coroutine[Any, Any, T]]) -> T:
    """Run on a virtual loop."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(LoopClock(loop)))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def key_of(obj: Object) -> tuple[str, str]:
    meta = obj["metadata"]
    return meta.get("namespace", ""), meta["name"]


class Copy:
    """Keeps objects and asserts what a sink may rely on."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.calls: list[tuple[str, str, str]] = []
        self._newest: dict[str, int] = {}
        self._gone: set[str] = set()

    def read(self, obj: Object) -> Object:
        return obj

    def replace(self, objects: list[Object]) -> None:
        assert not self.calls, "a whole list is handed over once"
        self.calls.append(("replace", "", ""))
        for obj in objects:
            self._take(obj)

    def upsert(self, obj: Object) -> None:
        meta = obj["metadata"]
        self.calls.append(("upsert", meta["name"], meta["resourceVersion"]))
        before = self.objects.get(key_of(obj))
        assert before is None or before["metadata"]["uid"] == meta["uid"], "the old one of that name is deleted first"
        self._take(obj)

    def delete(self, obj: Object) -> None:
        meta = obj["metadata"]
        self.calls.append(("delete", meta["name"], meta.get("resourceVersion", "")))
        assert self.objects.pop(key_of(obj))["metadata"]["uid"] == meta["uid"], "only what is known is deleted"
        self._gone.add(meta["uid"])

    def _take(self, obj: Object) -> None:
        meta = obj["metadata"]
        uid, version = meta["uid"], meta["resourceVersion"]
        assert uid not in self._gone, "what is deleted never comes back"
        if version.isdecimal():
            assert int(version) > self._newest.get(uid, -1), "time never goes back"
            self._newest[uid] = int(version)
        self.objects[key_of(obj)] = obj

    def names(self) -> list[str]:
        return sorted(name for _, name in self.objects)


def made(name: str, version: int | str, uid: str = "") -> Object:
    """Return a pod in a few words."""
    return {"metadata": {"namespace": "n", "name": name, "uid": uid or f"{name}-1", "resourceVersion": str(version)}}


@dataclass
class Script:
    """A cluster that plays lists (the last one again and again) and watches of events, pauses in seconds and errors."""

    clock: LoopClock
    lists: list[Page | Exception]
    watches: list[list[WatchEvent | float | Exception]]

    def __post_init__(self) -> None:
        self.asked: list[tuple[float, str, str]] = []
        self.timeouts: list[float] = []

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        self.asked.append((self.clock.monotonic(), "list", after))
        now = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        if isinstance(now, Exception):
            raise now
        return now

    async def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncGenerator[WatchEvent, None]:
        self.asked.append((self.clock.monotonic(), "watch", resource_version))
        self.timeouts.append(timeout_s)
        for now in self.watches.pop(0) if self.watches else [1e9]:
            if isinstance(now, Exception):
                raise now
            if isinstance(now, WatchEvent):
                yield now
            else:
                await self.clock.sleep(now)


@dataclass
class Rates:
    """Probabilities per event."""

    drop: float = 0.0
    twice: float = 0.0
    reorder: float = 0.0
    hang: float = 0.0
    gone: float = 0.0


class Rough:
    """An embedded cluster whose watches lose, repeat and reorder events across objects, hang, and say 410."""

    def __init__(self, cluster: EmbeddedCluster, clock: LoopClock, rng: random.Random, rates: Rates) -> None:
        self._cluster = cluster
        self._clock = clock
        self._rng = rng
        self.rates = rates
        self.ended = asyncio.Event()

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        return await self._cluster.list(kind, limit=3, after=after)

    async def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncGenerator[WatchEvent, None]:
        delivered: list[WatchEvent] = []
        held: list[WatchEvent] = []
        async for event in self._cluster.watch(kind, resource_version, timeout_s=timeout_s):
            if self.ended.is_set() or self._hit(self.rates.gone):
                self.ended.clear()
                raise Gone(410, "Expired", "as an event")
            if self._hit(self.rates.hang):
                await self._clock.sleep(1e6)
            for now in self._mangled(event, held):
                yield now
                delivered.append(now)
            if self._hit(self.rates.twice):
                yield self._rng.choice(delivered or [event])

    def _mangled(self, event: WatchEvent, held: list[WatchEvent]) -> list[WatchEvent]:
        """Return what to deliver now; what is held back comes after the next event of another object."""
        before = held.copy()
        held.clear()
        if event.type == "BOOKMARK":
            return [*before, event]
        if self._hit(self.rates.drop):
            return before
        if not before and self._hit(self.rates.reorder):
            held.append(event)
            return []
        if before and key_of(before[0].object) != key_of(event.object):
            return [event, *before]
        return [*before, event]

    def _hit(self, rate: float) -> bool:
        return rate > 0 and self._rng.random() < rate
