"""Follow all objects of a kind: list, watch, and list again where the watch cannot go on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal, TypeAlias

from scheduler.clock import Clock
from scheduler.kube.port import ApiError, Cluster, Gone, Kind, Object, UnknownOutcome

Change: TypeAlias = tuple[Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"], Object]
WATCH_S = 300.0
RETRY_S = 1.0


async def follow(cluster: Cluster, kind: Kind, clock: Clock) -> AsyncGenerator[Change, None]:
    """Yield every object as ADDED, then SYNCED once, then each change, for ever; trouble is waited out.

    What vanished or was made anew while nobody watched comes as DELETED and ADDED after the next list.
    """
    known: dict[str, Object] = {}
    version, synced = "", False
    while True:
        try:
            if not version:
                found, version = await _listed(cluster, kind)
                for change in _differences(known, found):
                    yield change
                known = found
                if not synced:
                    synced = True
                    yield "SYNCED", {}
            async with aclosing(cluster.watch(kind, version, timeout_s=WATCH_S)) as events:
                async for event in events:
                    version = event.object["metadata"]["resourceVersion"]
                    for change in _applied(known, event.type, event.object):
                        yield change
        except Gone:
            version = ""
        except (ApiError, UnknownOutcome):
            await clock.sleep(RETRY_S)


async def _listed(cluster: Cluster, kind: Kind) -> tuple[dict[str, Object], str]:
    found: dict[str, Object] = {}
    after = ""
    while True:
        page = await cluster.list(kind, after=after)
        found.update((_key(one), one) for one in page.items)
        after = page.next
        if not after:
            return found, page.resource_version


def _key(one: Object) -> str:
    return f"{one['metadata'].get('namespace', '')}/{one['metadata']['name']}"


def _differences(known: dict[str, Object], found: dict[str, Object]) -> list[Change]:
    """Say what must have happened between two lists."""
    changes: list[Change] = []
    for key, old in known.items():
        if key not in found or found[key]["metadata"]["uid"] != old["metadata"]["uid"]:
            changes.append(("DELETED", old))
    for key, new in found.items():
        before = known.get(key)
        if before is None or before["metadata"]["uid"] != new["metadata"]["uid"]:
            changes.append(("ADDED", new))
        elif before["metadata"]["resourceVersion"] != new["metadata"]["resourceVersion"]:
            changes.append(("MODIFIED", new))
    return changes


def _applied(known: dict[str, Object], event: str, new: Object) -> list[Change]:
    """Take one event of a watch into what is known."""
    if event == "DELETED":
        known.pop(_key(new), None)
        return [("DELETED", new)]
    if event not in ("ADDED", "MODIFIED"):
        return []
    seen = _key(new) in known
    known[_key(new)] = new
    return [("MODIFIED" if seen else "ADDED", new)]
