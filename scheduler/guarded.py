"""The ledger's writer and the API server behind their breakers: a call that is not sent fails at once.

Invariant: a refused call was not sent, so nothing of it can happen. Lists and watches are let through: they pause by
themselves after a failure, and without them nobody would learn that the API server is back.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext

from scheduler.dependencies import Dependencies, Dependency
from scheduler.errors import ConflictError, StoreError, UnavailableError
from scheduler.kube.port import (
    ApiError,
    Cluster,
    Kind,
    Object,
    Page,
    PatchBody,
    PatchType,
    Unavailable,
    UnknownOutcome,
    WatchEvent,
)
from scheduler.model.reservation import Change
from scheduler.settling import Writer

BUSY, BROKEN = 429, 500
OWN_PACE = "OwnPace"


def guarded(cluster: Cluster, writer: Writer, behind: Dependencies) -> tuple[Cluster, Writer]:
    """Return both behind their breakers."""
    return _Cluster(cluster, behind.api), _Writer(writer, behind.store)


def judged_store(error: Exception) -> tuple[bool, float]:
    """Say whether the store failed; a conflict is an answer."""
    return isinstance(error, StoreError) and not isinstance(error, ConflictError), 0.0


def judged_api(error: Exception) -> tuple[bool, float]:
    """Say whether the API server failed, and for how long it wants to be left alone; a refusal is an answer."""
    if isinstance(error, ApiError):
        busy = error.status == BUSY and error.reason != OWN_PACE
        return busy or error.status >= BROKEN, error.retry_after_s
    return isinstance(error, UnknownOutcome), 0.0


class _Writer:
    def __init__(self, writer: Writer, store: Dependency) -> None:
        self._writer, self._store = writer, store

    async def commit(self, changes: tuple[Change, ...]) -> None:
        with self._store.asked(_not_committed, judged_store):
            await self._writer.commit(changes)

    async def close(self) -> None:
        await self._writer.close()


def _not_committed() -> StoreError:
    return UnavailableError("The ledger's store has failed of late and is left alone for some seconds; try again.")


def _not_sent() -> ApiError:
    return Unavailable(503, "BreakerOpen", "not sent: the API server has failed of late and is left alone for a moment")


class _Cluster:
    def __init__(self, cluster: Cluster, api: Dependency) -> None:
        self._cluster, self._api = cluster, api

    def _asked(self, kind: Kind) -> AbstractContextManager[None]:
        """Return the breaker's judgement of one call; Events have none, for no decision waits for them."""
        return nullcontext() if kind == "events" else self._api.asked(_not_sent, judged_api)

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        return await self._cluster.list(kind, limit=limit, after=after)

    def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncGenerator[WatchEvent, None]:
        return self._cluster.watch(kind, resource_version, timeout_s=timeout_s)

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        with self._asked(kind):
            return await self._cluster.get(kind, namespace, name)

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        with self._asked(kind):
            return await self._cluster.create(kind, namespace, body)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        with self._asked(kind):
            return await self._cluster.replace(kind, namespace, name, body)

    async def patch(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: PatchBody,
        *,
        patch_type: PatchType = "merge",
        subresource: str = "",
    ) -> Object:
        with self._asked(kind):
            return await self._cluster.patch(
                kind, namespace, name, body, patch_type=patch_type, subresource=subresource
            )

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str = "", grace_s: int | None = None) -> None:
        with self._asked(kind):
            await self._cluster.delete(kind, namespace, name, uid=uid, grace_s=grace_s)

    async def bind(self, namespace: str, name: str, body: Object) -> None:
        with self._asked("pods"):
            await self._cluster.bind(namespace, name, body)

    async def close(self) -> None:
        await self._cluster.close()
