"""A live copy of one kind of objects: list, then follow the watch, and never go back in time.

Invariant: for each object the sink sees newer states only, and after a list it holds exactly the objects of that list;
what a gap in the watch swallowed comes back with the next list, deletions included.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias

import structlog

from scheduler.clock import Clock
from scheduler.kube.port import ApiError, Cluster, Gone, Kind, Object, Page, UnknownOutcome, WatchEvent
from scheduler.kube.wire import advice

log = structlog.get_logger(__name__)

SERVER_TIMEOUT_S = (290.0, 600.0)
BACK_OFF_S = (0.2, 30.0)
SILENCE_S = 45.0
STALE_S = 60.0
BATCH = 128
_SHORT_S = 1.0
_STEPS = 8

_Key: TypeAlias = tuple[str, str]
_State: TypeAlias = tuple[_Key, str, str]
Reading: TypeAlias = Any


class Sink(Protocol):
    """What keeps the copy. Its calls are synchronous, take the object over, and do not raise."""

    def read(self, obj: Object) -> Reading:
        """Return what `replace` will want of this object; changes nothing, for the list may come to nothing."""
        ...

    def replace(self, readings: list[Reading]) -> None:
        """Hold exactly the objects that were read so: the first list."""
        ...

    def upsert(self, obj: Object) -> None:
        """Take a new object or a newer state of a known one (same namespace, name and uid)."""
        ...

    def delete(self, obj: Object) -> None:
        """Forget a known object. When its deletion was not seen itself, only metadata's names and uid are given."""
        ...


class Reflector:
    """Keeps a sink equal to one kind of a cluster's objects; of each it remembers only uid and resourceVersion.

    Attributes:
        synced: the first list has been handed over.
        heard_s: when the cluster was last known to agree with the sink, on the clock's monotonic seconds.
        last_error: the sentence of the failure that is being waited out, empty while all is well.
    """

    def __init__(self, cluster: Cluster, kind: Kind, clock: Clock, sink: Sink, *, rng: random.Random) -> None:
        """Start empty and not synced; `rng` spreads time-outs and waits."""
        self._cluster = cluster
        self._kind: Kind = kind
        self._clock = clock
        self._sink = sink
        self._rng = rng
        self._seen = _Seen()
        self._version = ""
        self._must_list = True
        self._failures = 0
        self.synced = False
        self.heard_s = float("-inf")
        self.last_error = ""

    def age_s(self, now_s: float) -> float:
        """Return for how many seconds nothing was heard, infinite before the first list.

        kube-apiserver sends a bookmark about every minute, and none while the kind's version stands still. So silence
        of `SILENCE_S` may be peace or a dead connection, and a new list tells which. It leaves time for the list and
        for one more try: an age above `STALE_S` means that the cluster cannot be reached.
        """
        return now_s - self.heard_s

    async def run(self) -> None:
        """Follow the cluster until cancelled."""
        while True:
            await self.step()

    async def step(self) -> None:
        """List if there is nothing to go on from, follow one watch to its end, and wait when that went wrong.

        Failures of the cluster end in a wait of `BACK_OFF_S`, longer each time; whatever the sink raises passes.
        """
        started_s = self._clock.monotonic()
        try:
            if self._must_list:
                await self._list()
            await self._watch()
        except TimeoutError:
            self._must_list = True  # a silent watch may have lost anything, only a list tells
            self.last_error = f"nothing was heard for {SILENCE_S:.0f} s"
        except Gone as error:
            self._must_list = True
            await self._wait_out(error, at_once=self._failures == 0)
        except (ApiError, UnknownOutcome) as error:
            await self._wait_out(error)
        else:
            if self._clock.monotonic() - started_s >= _SHORT_S:
                self._well()
            else:
                await self._wait_out(None)

    async def _list(self) -> None:
        """Read all pages, then hand over what they change.

        Raises:
            ApiError: among others when the list is older than what was seen.
            TimeoutError: a page did not come.
        """
        asked_s = self._clock.monotonic()
        objects: list[Object] = []
        states: list[_State] = []
        readings: list[Reading] = []
        version = ""
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                version = page.resource_version
                if self.synced:
                    objects += page.items
                    continue
                await self._clock.sleep(0)  # the next page is asked for: it is made and sent while this one is read
                states += [_state(obj) for obj in page.items]
                readings += [self._sink.read(obj) for obj in page.items]
        if _older(version, self._version):
            text = f"version {version} was listed after {self._version}; if etcd was restored, restart Tessera"
            raise ApiError(503, "WentBack", text)
        if self.synced:
            await self._catch_up(objects)
            self._seen.settle(version)
        else:
            self._seen.restart(version, states)
            self._sink.replace(readings)
        self._version, self._must_list = version, False
        self.synced, self.heard_s, self.last_error = True, asked_s, ""

    async def _pages(self) -> AsyncGenerator[Page, None]:
        """Yield the pages of a list, each while the next one is asked for.

        Raises:
            TimeoutError: a page did not come.
        """
        asked: asyncio.Task[Page] | None = asyncio.ensure_future(self._page(""))
        try:
            while asked is not None:
                page = await asked
                asked = asyncio.ensure_future(self._page(page.next)) if page.next else None
                yield page
        finally:
            if asked is not None:
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)

    async def _page(self, after: str) -> Page:
        async with asyncio.timeout(SILENCE_S):
            return await self._cluster.list(self._kind, after=after)

    async def _catch_up(self, objects: list[Object]) -> None:
        """Tell the sink how a list differs from what was seen: a whole `replace` would stop the loop for long."""
        listed = {_identity(obj)[0] for obj in objects}
        for key, uid in self._seen.missing(listed):
            self._seen.forget(key)
            self._sink.delete(_ghost(key, uid))
        for count, obj in enumerate(objects):
            self._pass_on(obj, deleted=False, listed=True)
            if count % BATCH == BATCH - 1:
                await self._clock.sleep(0)

    async def _watch(self) -> None:
        """Apply events until the stream ends.

        Raises:
            TimeoutError: nothing was heard for `SILENCE_S`.
        """
        self._seen.settle(self._version)
        stream = self._cluster.watch(self._kind, self._version, timeout_s=self._rng.uniform(*SERVER_TIMEOUT_S))
        count = 0
        async with aclosing(stream) as events, asyncio.timeout(SILENCE_S) as silence:
            async for event in events:
                self._apply(event)
                self._well()
                self.heard_s = self._clock.monotonic()
                silence.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                count += 1
                if count % BATCH == 0:
                    await self._clock.sleep(0)

    def _apply(self, event: WatchEvent) -> None:
        """Pass one event on, unless it is old, and go on from its version."""
        version = str(event.object["metadata"]["resourceVersion"])
        if event.type == "BOOKMARK":
            self._seen.settle(version)
        else:
            self._pass_on(event.object, deleted=event.type == "DELETED")
        if not _older(version, self._version):
            self._version = version

    def _pass_on(self, obj: Object, *, deleted: bool, listed: bool = False) -> None:
        """Tell the sink what a state of an object changes."""
        key, uid = _identity(obj)
        known = self._seen.uid(key)
        if not self._seen.take(obj, deleted=deleted, listed=listed):
            return
        if known is not None and known != uid:
            self._sink.delete(_ghost(key, known))
        if not deleted:
            self._sink.upsert(obj)
        elif known == uid:
            self._sink.delete(obj)

    def _well(self) -> None:
        self._failures = 0
        self.last_error = ""

    async def _wait_out(self, error: ApiError | UnknownOutcome | None, *, at_once: bool = False) -> None:
        """Wait before the next try, at least as long as the server asked for."""
        self.last_error = advice(error) if error else "the watch ended at once"
        least, most = BACK_OFF_S
        wait_s = 0.0 if at_once else self._rng.uniform(least, min(most, 2 * least * 2 ** min(self._failures, _STEPS)))
        self._failures += 1
        if isinstance(error, ApiError):
            wait_s = max(wait_s, error.retry_after_s)
        if not at_once:
            log.warning("watch.waits", kind=self._kind, error=self.last_error, next_try_s=round(wait_s, 1))
        await self._clock.sleep(wait_s)


class _Seen:
    """Which state of each object was seen last.

    Everything up to the floor was seen: an unknown object at or below it is an echo of one that was deleted. Deletions
    above the floor are remembered one by one, so their number is bounded by what happens between two bookmarks.
    """

    def __init__(self) -> None:
        self._live: dict[_Key, tuple[str, str]] = {}
        self._dead: dict[_Key, str] = {}
        self._floor = ""

    def restart(self, version: str, states: list[_State]) -> None:
        """Forget all but what a list holds."""
        self._live = {key: (uid, seen) for key, uid, seen in states}
        self._dead, self._floor = {}, version

    def settle(self, version: str) -> None:
        """Note that everything up to this version has been seen."""
        if not _older(version, self._floor):
            self._floor = version
            self._dead = {key: dead for key, dead in self._dead.items() if _older(version, dead)}

    def uid(self, key: _Key) -> str | None:
        """Return the uid of the live object of this name."""
        found = self._live.get(key)
        return found[0] if found else None

    def missing(self, listed: set[_Key]) -> list[tuple[_Key, str]]:
        """Return key and uid of the live objects that a list does not hold."""
        return [(key, uid) for key, (uid, _) in self._live.items() if key not in listed]

    def forget(self, key: _Key) -> None:
        """Note that an object is gone without its deletion having been seen."""
        del self._live[key]

    def take(self, obj: Object, *, deleted: bool, listed: bool) -> bool:
        """Note a state and say whether it is news. What a list holds is alive, whatever was seen before."""
        key, uid = _identity(obj)
        version = str(obj["metadata"]["resourceVersion"])
        known = self._live.get(key)
        if known:
            # A server may give a deletion the version of the object's last state.
            last_state = deleted and known == (uid, version)
            if not last_state and not _newer(version, known[1]):
                return False
        elif not listed and not (_newer(version, self._floor) and _newer(version, self._dead.get(key, ""))):
            return False
        if deleted:
            self._live.pop(key, None)
            self._dead[key] = version
        else:
            self._live[key] = (uid, version)
        return True


def _identity(obj: Object) -> tuple[_Key, str]:
    """Return namespace and name, and the uid."""
    meta = obj["metadata"]
    return (meta.get("namespace", ""), meta["name"]), str(meta.get("uid", ""))


def _state(obj: Object) -> _State:
    """Return namespace and name, uid and version."""
    key, uid = _identity(obj)
    return key, uid, str(obj["metadata"]["resourceVersion"])


def _ghost(key: _Key, uid: str) -> Object:
    """Return what is known of an object whose deletion was not seen."""
    namespace, name = key
    return {"metadata": {"namespace": namespace, "name": name, "uid": uid}}


def _older(one: str, other: str) -> bool:
    """Say whether a version is surely older; only numbers can be compared, for others the server's order counts."""
    return one.isdecimal() and other.isdecimal() and int(one) < int(other)


def _newer(one: str, other: str) -> bool:
    """Say whether a version is another one and not surely older."""
    return one != other and not _older(one, other)
