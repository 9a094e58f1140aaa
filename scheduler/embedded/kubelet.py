"""All kubelets of an embedded cluster, on paper: pods start, run for their time, end, and leave when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from typing import Any, TypeAlias

from scheduler import PREFIX
from scheduler.clock import Clock
from scheduler.kube.port import ApiError, Cluster, Kind, NotFound, Object, UnknownOutcome

from .following import follow
from .objects import timestamp

RUNTIME = PREFIX + "paper-runtime"  # annotation: seconds until the pod succeeds
RETRY_S = 1.0
Runtime: TypeAlias = Callable[[Object], float | None]


def annotated_runtime(pod: Object) -> float | None:
    """Return the seconds a pod says it runs; None where it does not say, or not readably."""
    written = pod["metadata"].get("annotations", {}).get(RUNTIME, "")
    try:
        return max(float(written), 0.0) if written else None
    except ValueError:
        return None


class Kubelet:
    """The kubelets of all nodes. It keeps nothing over a restart: a pod's start is read from its status."""

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        *,
        start_s: float = 1.0,
        stop_s: float = 1.0,
        runtime: Runtime = annotated_runtime,
        heartbeat_s: float = 0.0,
    ) -> None:
        """Join the parts; `run` or `start` sets it going.

        Args:
            cluster: the API server.
            clock: time.
            start_s: from the Binding to Running.
            stop_s: from the deletion to the end of the containers; the grace period bounds it.
            runtime: seconds from Running to Succeeded for a pod; None = it runs until it is deleted.
            heartbeat_s: how often each node's Ready condition is refreshed; 0 = never.
        """
        self._cluster = cluster
        self._clock = clock
        self._start_s = start_s
        self._stop_s = stop_s
        self._runtime = runtime
        self._heartbeat_s = heartbeat_s
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Run as a task."""
        self._running = asyncio.get_running_loop().create_task(self.run())

    async def stop(self) -> None:
        """End the task that `start` made."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def run(self) -> None:
        """Do the kubelets' work until cancelled."""
        self._lives.clear()
        self._leaving.clear()
        async with asyncio.TaskGroup() as tasks:
            if self._heartbeat_s:
                tasks.create_task(self._heartbeats())
            async for change, pod in follow(self._cluster, "pods", self._clock):
                if change != "SYNCED":
                    self._see(pod, tasks, gone=change == "DELETED")

    def _see(self, pod: Object, tasks: asyncio.TaskGroup, *, gone: bool) -> None:
        metadata, uid = pod["metadata"], pod["metadata"]["uid"]
        if gone:
            self._end(uid)
            self._leaving.discard(uid)
        elif pod["status"].get("phase") in ("Succeeded", "Failed"):
            self._end(uid)  # whoever ended it, it never runs again
        elif not pod["spec"].get("nodeName"):
            return
        elif "deletionTimestamp" in metadata:
            if uid not in self._leaving:
                self._end(uid)
                self._leaving.add(uid)
                tasks.create_task(self._leave(pod))
        elif uid not in self._lives:
            self._begin(uid, self._live(pod), tasks)

    def _begin(self, uid: str, life: Coroutine[Any, Any, None], tasks: asyncio.TaskGroup) -> None:
        self._lives[uid] = tasks.create_task(life)

    def _end(self, uid: str) -> None:
        life = self._lives.pop(uid, None)
        if life is not None:
            life.cancel()

    async def _live(self, pod: Object) -> None:
        """Start the pod and, where it has a time, let it succeed."""
        started_us = self._clock.wall_us()
        if pod["status"].get("phase") == "Running":
            started_us = _micros(pod["status"].get("startTime"), started_us)
        else:
            await self._clock.sleep(self._start_s)
            started_us = self._clock.wall_us()
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": timestamp(started_us)}
            await self._report(pod, {"phase": "Running", "startTime": timestamp(started_us), "conditions": [ready]})
        runs_s = self._runtime(pod)
        if runs_s is not None:
            await self._clock.sleep(max(runs_s - (self._clock.wall_us() - started_us) / 1_000_000, 0.0))
            await self._report(pod, {"phase": "Succeeded"})

    async def _leave(self, pod: Object) -> None:
        """End the containers of a pod that is being deleted, then let the API server forget it."""
        metadata = pod["metadata"]
        grace_s = metadata.get("deletionGracePeriodSeconds", 0)
        await self._clock.sleep(min(self._stop_s, grace_s))
        await self._persist(
            pod,
            lambda: self._cluster.delete(
                "pods", metadata["namespace"], metadata["name"], uid=metadata["uid"], grace_s=0
            ),
        )

    async def _report(self, one: Object, status: Object) -> None:
        """Write a part of the status of a pod or node."""
        metadata = one["metadata"]
        kind: Kind = "pods" if "namespace" in metadata else "nodes"
        body = {"metadata": {"uid": metadata["uid"]}, "status": status}
        await self._persist(
            one,
            lambda: self._cluster.patch(
                kind,
                metadata.get("namespace", ""),
                metadata["name"],
                body,
                patch_type="strategic",
                subresource="status",
            ),
        )

    async def _persist(self, one: Object, call: Callable[[], Awaitable[object]]) -> None:
        """Repeat a write until it is done, or the object is gone or another."""
        while True:
            try:
                await call()
            except NotFound:
                return
            except (ApiError, UnknownOutcome) as error:
                await self._clock.sleep(getattr(error, "retry_after_s", 0.0) or RETRY_S)
                if not await self._is_there(one):
                    return
            else:
                return

    async def _is_there(self, one: Object) -> bool:
        metadata = one["metadata"]
        kind: Kind = "pods" if "namespace" in metadata else "nodes"
        try:
            found = await self._cluster.get(kind, metadata.get("namespace", ""), metadata["name"])
        except NotFound:
            return False
        except (ApiError, UnknownOutcome):
            return True  # not known: try again
        return bool(found["metadata"]["uid"] == metadata["uid"])

    async def _heartbeats(self) -> None:
        while True:
            await self._clock.sleep(self._heartbeat_s)
            after = ""
            while True:
                page = await self._cluster.list("nodes", after=after)
                for node in page.items:
                    now = timestamp(self._clock.wall_us())
                    beat = {"type": "Ready", "status": "True", "lastHeartbeatTime": now}
                    await self._report(node, {"conditions": [beat]})
                after = page.next
                if not after:
                    break


def _micros(written: object, otherwise: int) -> int:
    """Return a Kubernetes time in microseconds since 1970."""
    if not isinstance(written, str):
        return otherwise
    return round(datetime.fromisoformat(written).timestamp()) * 1_000_000
