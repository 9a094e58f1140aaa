"""kube-scheduler in memory: profile `tessera` with one extender, as measured on 1.36.

It sees the cluster only through the port, like the real one: lists, watches, status patches. Scheduling cycles are
serial; binding has a task of its own while the pod counts as assumed. What it does not have: volumes, pod affinity,
spread, ports, preemption (the profile ships without it).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from random import Random

from scheduler.clock import Clock
from scheduler.intake.pod import read_pod
from scheduler.kube.port import ApiError, Cluster, Kind, Object, UnknownOutcome
from scheduler.model.pod import Pod

from .extender_client import ExtenderClient, ExtenderError, Transport
from .following import follow
from .node_cache import NodeCache, needs_of
from .objects import timestamp
from .scheduling_queue import Entry, SchedulingQueue

FLUSH_S = 1.0
_EXTENDER_WEIGHT = 10
_EXTENDER_SCALE = 10  # an extender's 0..10 to kube-scheduler's 0..100
_FEASIBLE_LEAST = 100
_AFTERWORD = " no new claims to deallocate"  # said by the one PostFilter plugin of the shipped profile


class _UnfitError(Exception):
    """No node takes the pod; the text is that of its condition."""


class KubeScheduler:
    """One kube-scheduler. It keeps nothing over a restart.

    Attributes:
        attempts: scheduling cycles so far.
    """

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        transport: Transport,
        *,
        rng: Random,
        percentage: int = 100,
        clears_nominations: bool = False,
        timeout_s: float = 2.0,
        latency_s: float = 0.002,
    ) -> None:
        """Join the parts; `run` or `start` sets it going.

        Args:
            cluster: the API server.
            clock: time.
            transport: carries (verb, body) to the extender and brings (status, body) back.
            rng: draws among nodes of equal score.
            percentage: percentageOfNodesToScore; 0 is Kubernetes' default sampling.
            clears_nominations: a refusal clears the pod's nomination, as it does where DefaultPreemption is enabled.
                The shipped profile disables it: a refused pod keeps its nomination and the room held by it. An error
                clears it in either case.
            timeout_s: httpTimeout of the extender.
            latency_s: what an extender call takes beside the extender's own time.
        """
        self._cluster = cluster
        self._clock = clock
        self._extender = ExtenderClient(transport, clock, timeout_s=timeout_s, latency_s=latency_s)
        self._rng = rng
        self._percentage = percentage
        self._clears_nominations = clears_nominations
        self._running: asyncio.Task[None] | None = None
        self.attempts = 0
        self._reset()

    def _reset(self) -> None:
        self._work = asyncio.Event()
        self._queue = SchedulingQueue(self._work.set)
        self._cache = NodeCache()
        self._pods: dict[str, tuple[Object, Pod]] = {}
        self._node_facts: dict[str, Object] = {}
        self._start_at = 0
        self._unsynced = {"pods", "nodes"}

    def start(self) -> None:
        """Run as a task, with an empty memory."""
        self._running = asyncio.get_running_loop().create_task(self.run())

    async def stop(self) -> None:
        """End the task that `start` made."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def run(self) -> None:
        """List, watch and schedule until cancelled."""
        self._reset()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow("nodes"))
                tasks.create_task(self._follow("pods"))
                tasks.create_task(self._flush())
                tasks.create_task(self._schedule(tasks))
        finally:
            await self._extender.close()

    # what it sees

    async def _follow(self, kind: Kind) -> None:
        async for change, seen in follow(self._cluster, kind, self._clock):
            if change == "SYNCED":
                self._unsynced.discard(kind)
                self._work.set()
            elif kind == "nodes":
                self._see_node(seen, gone=change == "DELETED")
            else:
                self._see_pod(seen, change)

    def _see_node(self, raw: Object, *, gone: bool) -> None:
        name = raw["metadata"]["name"]
        if gone:
            self._node_facts.pop(name, None)
            self._cache.remove_node(name)
        else:
            facts = _scheduling_facts(raw)
            if self._node_facts.get(name) == facts:
                return  # a heartbeat
            self._node_facts[name] = facts
            self._cache.put_node(raw)
        self._queue.wake_all(self._clock.monotonic())

    def _see_pod(self, raw: Object, change: str) -> None:
        pod = read_pod(raw)
        before = self._pods.get(pod.uid)
        if change == "DELETED" or pod.terminal:
            self._lose_pod(pod.uid)
            return
        self._pods[pod.uid] = (raw, pod)
        now = self._clock.monotonic()
        if pod.node:
            self._queue.remove(pod.uid)
            self._cache.nominate(pod.uid, "", 0, {})
            self._cache.put_pod(pod.uid, pod.node, needs_of(pod))
            self._queue.wake_all(now)
        elif pod.ours and not self._cache.is_assumed(pod.uid):
            if before is None:
                self._queue.add(raw, pod, now)
                if not pod.gates:  # a nomination made while it was gated is not seen at the start
                    self._nominate(pod)
            else:
                self._nominate(pod)
                if before[1].nominated not in ("", pod.nominated):
                    self._queue.wake_all(now, priority_most=pod.request.priority)
                self._queue.update(raw, pod, now)

    def _lose_pod(self, uid: str) -> None:
        before = self._pods.pop(uid, None)
        self._queue.remove(uid)
        self._cache.nominate(uid, "", 0, {})
        self._cache.remove_pod(uid)
        if before is None:
            return
        pod = before[1]
        if pod.node:
            self._queue.wake_all(self._clock.monotonic())
        elif pod.nominated:
            self._queue.wake_all(self._clock.monotonic(), priority_most=pod.request.priority)

    def _nominate(self, pod: Pod) -> None:
        self._cache.nominate(pod.uid, pod.nominated, pod.request.priority, needs_of(pod))

    # what it does

    async def _flush(self) -> None:
        while True:
            await self._clock.sleep(FLUSH_S)
            self._queue.flush(self._clock.monotonic())

    async def _schedule(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            entry = None if self._unsynced else self._queue.pop(self._clock.monotonic())
            if entry is None:
                self._work.clear()
                await self._work.wait()
            else:
                await self._attempt(entry, tasks)

    async def _attempt(self, entry: Entry, tasks: asyncio.TaskGroup) -> None:
        """One scheduling cycle; the binding goes on by itself."""
        pod = entry.pod
        if pod.deleting:
            self._queue.remove(pod.uid)
            return
        self.attempts += 1
        try:
            node = await self._choose(entry.raw, pod)
        except (_UnfitError, ExtenderError) as error:
            await self._give_back(entry, error)
            return
        if pod.uid not in self._pods or self._pods[pod.uid][1].node:
            return  # it was deleted, or somebody bound it meanwhile
        self._cache.nominate(pod.uid, "", 0, {})
        self._cache.put_pod(pod.uid, node, needs_of(pod), assumed=True)
        tasks.create_task(self._bind(entry, node))

    async def _choose(self, raw: Object, pod: Pod) -> str:
        """Return the node for a pod: the nominated one if it passes, else the best that does."""
        needs = needs_of(pod)
        if pod.nominated in self._cache.rooms and not self._cache.judge(pod, needs)(pod.nominated):
            try:
                passed, _ = await self._extender.filter(raw, [pod.nominated])
            except ExtenderError:
                passed = []  # only logged: the full list is tried at once
            if passed:
                return passed[0]
        feasible, reasons = self._feasible(pod, needs)
        if feasible:
            feasible, told = await self._extender.filter(raw, feasible)
            reasons.update(told.values())
        if not feasible:
            raise _UnfitError(_sentence(len(self._cache.rooms), reasons))
        return feasible[0] if len(feasible) == 1 else await self._best(raw, needs, feasible)

    def _feasible(self, pod: Pod, needs: Mapping[str, int]) -> tuple[list[str], Counter[str]]:
        """Run the filter plugins on as many nodes as are needed, going round from where the last pod ended."""
        wanted, tried = self._sample(), 0
        feasible: list[str] = []
        reasons: Counter[str] = Counter()
        refusals = self._cache.judge(pod, needs)
        for name in self._cache.names(self._start_at):
            tried += 1
            refused = refusals(name)
            if refused:
                reasons.update(refused)
            else:
                feasible.append(name)
                if len(feasible) == wanted:
                    break
        self._start_at = (self._start_at + tried) % max(len(self._cache.rooms), 1)
        return feasible, reasons

    def _sample(self) -> int:
        """Return how many feasible nodes are enough."""
        nodes = len(self._cache.rooms)
        percent = self._percentage or max(5, 50 - nodes // 125)
        return nodes if nodes < _FEASIBLE_LEAST else max(_FEASIBLE_LEAST, nodes * percent // 100)

    async def _best(self, raw: Object, needs: Mapping[str, int], feasible: list[str]) -> str:
        try:
            scores = await self._extender.prioritize(raw, feasible)
        except ExtenderError:
            scores = {}  # a failed prioritize costs only the score
        factor = _EXTENDER_WEIGHT * _EXTENDER_SCALE
        known = [name for name in feasible if name in self._cache.rooms]
        sums = [(self._cache.least_allocated(needs, name) + scores.get(name, 0) * factor, name) for name in known]
        if not sums:
            raise _UnfitError(_sentence(len(self._cache.rooms), Counter()))
        best = max(score for score, _ in sums)
        return self._rng.choice([name for score, name in sums if score == best])

    async def _bind(self, entry: Entry, node: str) -> None:
        uid = entry.pod.uid
        try:
            await self._extender.bind(entry.raw, node)
        except ExtenderError as error:
            self._cache.forget(uid)
            self._queue.wake_all(self._clock.monotonic())
            await self._give_back(entry, error)
        else:
            self._queue.remove(uid)

    async def _give_back(self, entry: Entry, error: Exception) -> None:
        """Put a pod back into the queue and write why; what is bound by now, or gone, is dropped."""
        uid = entry.pod.uid
        known = self._pods.get(uid)
        if known is None or known[1].node:
            self._queue.remove(uid)
            return
        entry.raw, entry.pod = known
        unfit = isinstance(error, _UnfitError)
        put_back = self._queue.refuse if unfit else self._queue.fail
        put_back(entry, self._clock.monotonic())
        clear = self._clears_nominations or not unfit
        if clear:
            self._cache.nominate(uid, "", 0, {})
        await self._write(known[0], "Unschedulable" if unfit else "SchedulerError", str(error), clear=clear)

    async def _write(self, raw: Object, reason: str, message: str, *, clear: bool) -> None:
        """Write the condition, and clear the nomination where asked to, unless the pod says so already."""
        metadata, status = raw["metadata"], raw["status"]
        wanted = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
        wanted["observedGeneration"] = metadata.get("generation", 1)
        old: Object = next((one for one in status.get("conditions", ()) if one["type"] == "PodScheduled"), {})
        change: Object = {}
        if any(old.get(key) != value for key, value in wanted.items()):
            since = old["lastTransitionTime"] if old.get("status") == "False" else timestamp(self._clock.wall_us())
            change["conditions"] = [{**wanted, "lastTransitionTime": since}]
        if clear and status.get("nominatedNodeName"):
            change["nominatedNodeName"] = None
        if not change:
            return
        body = {"metadata": {"uid": metadata["uid"]}, "status": change}
        try:
            await self._cluster.patch(
                "pods", metadata["namespace"], metadata["name"], body, patch_type="strategic", subresource="status"
            )
        except (ApiError, UnknownOutcome):
            return  # only logged; the next attempt writes it again


def _scheduling_facts(node: Object) -> Object:
    """Return what of a node may change where pods fit."""
    metadata, status = node["metadata"], node.get("status") or {}
    return {
        "uid": metadata["uid"],
        "labels": metadata.get("labels"),
        "annotations": metadata.get("annotations"),
        "spec": node.get("spec"),
        "allocatable": status.get("allocatable"),
        "conditions": [(one.get("type"), one.get("status")) for one in status.get("conditions") or ()],
    }


def _sentence(nodes: int, reasons: Counter[str]) -> str:
    """Return the text of the condition, as kube-scheduler adds it up."""
    parts = sorted(f"{count} {reason}" for reason, count in reasons.items() if reason)
    return f"0/{nodes} nodes are available:" + (f" {', '.join(parts)}." if parts else "") + _AFTERWORD
