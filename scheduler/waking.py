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
from scheduler.kube.port import ApiError, Cluster, UnknownOutcome
from scheduler.ledger.lifecycle import TERMINAL
from scheduler.model.pod import DeviceAsk, Pod, Selection

log = structlog.get_logger(__name__)

FIRST_S, LONGEST_S = 2.0, 60.0
AT_ONCE = 64


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
        chosen = self._choose(now_s)
        self._seen = self.desk.registry.freed
        later = [after for _, after in self._tries.values() if after > now_s]
        self._next_s = min(later, default=now_s + LONGEST_S)
        for start in range(0, len(chosen), AT_ONCE):
            await asyncio.gather(*(self._wake(pod) for pod in chosen[start : start + AT_ONCE]))

    def _choose(self, now_s: float) -> list[Pod]:
        """Return the pods that fit, each with its room intended, highest priority first, then oldest."""
        chosen: list[Pod] = []
        hopeless: set[tuple[object, ...]] = set()
        for pod in self._in_order():
            times, after = self._tries.get(pod.uid, (0, 0.0))
            shape = _shape(pod)
            if now_s < after or shape in hopeless or self.desk.intents.get(pod.uid) is not None:
                continue
            if not self.desk.intend_anywhere(pod):
                if not self.desk.intents.excluded(pod.uid, now_s):
                    hopeless.add(shape)
                continue
            self._tries[pod.uid] = (times + 1, now_s + min(FIRST_S * 2.0**times, LONGEST_S))
            chosen.append(pod)
        return chosen

    def _in_order(self) -> list[Pod]:
        registry, book, now_us = self.desk.registry, self.desk.book, self.clock.wall_us()
        pods = [registry.pods[uid] for uid in self.waiting if uid in registry.pods]
        rows = book.rows
        fit = [
            pod
            for pod in pods
            if pod.request.refusal is None
            and ((row := rows.get(pod.uid)) is None or (row.state not in TERMINAL and row.not_before_us <= now_us))
        ]
        return sorted(fit, key=lambda pod: (-pod.request.priority, _arrival(pod, rows.get(pod.uid)), pod.request.name))

    async def _wake(self, pod: Pod) -> None:
        times, _ = self._tries.get(pod.uid, (1, 0.0))
        value = f"{self.desk.fence}.{times}.{self.desk.registry.generation}"  # an unchanged value would wake nobody
        body = {"metadata": {"uid": pod.uid, "annotations": {RETRY: value}}}
        try:
            await self.cluster.patch("pods", pod.request.namespace, pod.request.name, body)
        except (ApiError, UnknownOutcome) as error:
            self.desk.drop_intent(pod.uid)
            log.info("wake.failed", request=pod.uid, error=str(error))


def _arrival(pod: Pod, row: object) -> tuple[int, str]:
    arrival = getattr(row, "arrival_us", pod.request.arrival_us)  # the ledger's may be inherited and so earlier
    return arrival, pod.request.namespace


def _shape(pod: Pod) -> tuple[object, ...]:
    request = pod.request
    devices: DeviceAsk = request.devices
    selection: Selection = request.selection
    return request.amounts, devices.kind, devices.count, devices.models, devices.profile, devices.init_only, selection
