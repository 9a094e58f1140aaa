"""Waiting pods that fit again: find them in fair order, keep their room, and nudge kube-scheduler.

kube-scheduler parks a pod that was refused. When the ledger has given room back, the pods that now fit get an intent
(so that nobody else takes the room meanwhile) and a new value of `tessera.dev/retry`, which wakes exactly that pod.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog

from scheduler import RETRY
from scheduler.clock import Clock
from scheduler.desk import Desk
from scheduler.inventory.asks import shape
from scheduler.kube.port import ApiError, Cluster, UnknownOutcome
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.model.pod import Pod

log = structlog.get_logger(__name__)

FIRST_S, LONGEST_S = 2.0, 60.0
DOUBLINGS_MAX = 5  # 2 s doubled so often is past the longest wait
SLICE_S = 0.02
AT_ONCE = 64
ASK_S = 2.0  # a nudge that hangs holds up those behind it no longer; if it arrives later it does no harm


@dataclass(slots=True)
class Waker:
    """Wakes refused pods; each pod backs off when waking it did not get it bound.

    Attributes:
        waiting: uids of our unbound, ungated pods that kube-scheduler calls unschedulable.
    """

    desk: Desk
    cluster: Cluster
    clock: Clock
    waiting: dict[str, None] = field(default_factory=dict)
    _tries: dict[str, tuple[int, float]] = field(default_factory=dict)  # uid -> (times woken, not before)
    _seen: int = -1
    _next_s: float = 0.0

    def watch(self, pod: Pod) -> None:
        """Take note of a pod as the API server shows it."""
        if pod.ours and pod.unschedulable and not (pod.node or pod.terminal or pod.deleting or pod.gates):
            if pod.uid not in self.waiting and not self.desk.known_refusal(pod):
                self._seen = -1  # something was freed between its refusal and the news of it: look again
            self.waiting.setdefault(pod.uid)
        elif pod.uid in self.waiting:
            self.forget(pod.uid)

    def forget(self, uid: str) -> None:
        """The pod is bound or gone."""
        self.waiting.pop(uid, None)
        self._tries.pop(uid, None)

    async def step(self) -> None:
        """Wake what fits, if something was freed since the last look or a pod's back-off has ended."""
        self.desk.lapse()
        now_s = self.clock.monotonic()
        if self.desk.registry.freed == self._seen and now_s < self._next_s:
            return
        self._seen = self.desk.registry.freed
        self._next_s = now_s + LONGEST_S
        chosen: list[Pod] = []
        hopeless: set[tuple[object, ...]] = set()
        for pod in self._in_order():
            if self._try(pod, now_s, hopeless):
                chosen.append(pod)
            if self.clock.monotonic() - now_s > SLICE_S:
                await self.clock.sleep(0)
                now_s = self.clock.monotonic()
        for start in range(0, len(chosen), AT_ONCE):
            await asyncio.gather(*(self._wake(pod) for pod in chosen[start : start + AT_ONCE]))

    def _try(self, pod: Pod, now_s: float, hopeless: set[tuple[object, ...]]) -> bool:
        """Intend a node for the pod if one fits; what fits nowhere is not tried again for others of its shape."""
        if not self._waits(pod):
            return False
        times, not_before_s = self._tries.get(pod.uid, (0, 0.0))
        row = self.desk.book.rows.get(pod.uid)
        if row is not None and row.not_before_us > (now_us := self.clock.wall_us()):
            not_before_s = max(not_before_s, now_s + (row.not_before_us - now_us) / 1_000_000)
        if now_s < not_before_s:
            self._next_s = min(self._next_s, not_before_s)
            return False
        kind = shape(pod.request)
        if kind in hopeless or self.desk.intents.get(pod.uid) is not None:
            return False
        if not self.desk.intend_anywhere(pod):
            if not self.desk.intents.excluded(pod.uid, now_s):
                hopeless.add(kind)
            return False
        self._tries[pod.uid] = (times + 1, now_s + min(FIRST_S * 2.0 ** min(times, DOUBLINGS_MAX), LONGEST_S))
        return True

    def _waits(self, pod: Pod) -> bool:
        """Say whether a pod waits for Tessera: not gone, not refused for good, and no bind that a nudge would void."""
        row = self.desk.book.rows.get(pod.uid)
        decided = row is not None and row.state in HOLDING | TERMINAL
        return pod.uid in self.waiting and not decided and not pod.request.claims and pod.request.refusal is None

    def _in_order(self) -> list[Pod]:
        """Return the pods that may be woken, highest priority first, then oldest; the ledger's arrival may be older."""
        pods, rows = self.desk.registry.pods, self.desk.book.rows
        found: list[tuple[tuple[int, int, str, str], Pod]] = []
        for uid in self.waiting:
            pod, row = pods.get(uid), rows.get(uid)
            if pod is None or not self._waits(pod):
                continue
            request = pod.request
            arrival_us = request.arrival_us if row is None else row.arrival_us
            found.append(((-request.priority, arrival_us, request.namespace, request.name), pod))
        return [pod for _, pod in sorted(found, key=lambda pair: pair[0])]

    async def _wake(self, pod: Pod) -> None:
        times, _ = self._tries.get(pod.uid, (1, 0.0))
        value = f"{self.desk.fence}.{times}.{self.desk.registry.generation}"  # an unchanged value would wake nobody
        body = {"metadata": {"uid": pod.uid, "annotations": {RETRY: value}}}
        try:
            async with asyncio.timeout(ASK_S):
                await self.cluster.patch("pods", pod.request.namespace, pod.request.name, body)
        except (ApiError, UnknownOutcome, TimeoutError) as error:
            self.desk.drop_intent(pod.uid)
            log.info("wake.failed", request=pod.uid, error=str(error) or "no answer in time")
