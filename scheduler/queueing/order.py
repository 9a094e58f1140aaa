"""What order and quota say of one pod between two turns of the queue, from what the last turn found. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from policies.columns import BoolArray
from policies.ordering import RequestRank, request_rank
from scheduler import AUTOSCALE
from scheduler.ledger.queues import Queues
from scheduler.model.pod import Pod, Request
from scheduler.model.reservation import Row

from .charging import Charging
from .turn import Barrier, barrier_for

NOWHERE = np.zeros(1, np.bool_)


def rank_of(request: Request, row: Row | None) -> RequestRank:
    """Return a request's place in its queue; the ledger may know an older arrival of its workload."""
    arrival_us = request.arrival_us if row is None else row.arrival_us
    return request_rank(
        priority=request.priority, arrival_us=arrival_us, namespace=request.namespace, name=request.name
    )


@dataclass(slots=True)
class Order:
    """The queues, what is taken of them, and what the last turn left behind.

    Attributes:
        queues: tree and namespaces.
        charging: what is taken.
        words: request -> why it waits.
        barriers: queue -> what its blocked requests leave to those behind, first one first.
        layout: of the columns whose rows the barriers speak of.
        astray: reservations that have to be given up: request -> epoch of the reservation, and why.
    """

    queues: Queues
    charging: Charging
    words: dict[str, str] = field(default_factory=dict)
    barriers: Mapping[str, Sequence[Barrier]] = field(default_factory=dict)
    layout: int = -1
    astray: dict[str, tuple[int, str]] = field(default_factory=dict)

    def refusal(self, pod: Pod) -> str:
        """Return why a pod without a reservation waits for its turn wherever there is room; empty = it need not."""
        request = pod.request
        word = self.words.get(pod.uid, "")
        if word == "WaitingForGate" and not pod.gates:
            word = ""  # kube-scheduler has heard of it sooner than the watch
        if word == AUTOSCALE:
            return "GpusBusy"
        if word := word or self.queues.refusal(request.queue, request.namespace):
            return word
        return "WaitingForGang" if request.gang and request.gang_size > 1 else ""

    def open(self, pod: Pod, rows: Mapping[str, Row], layout: int) -> tuple[BoolArray | None, str]:
        """Return where those before it and the quota let a pod go: ``[N]``, None = everywhere; and the word elsewhere.

        Args:
            pod: without a reservation.
            rows: of the ledger, all.
            layout: of the columns now.
        """
        request = pod.request
        barriers = self.barriers.get(request.queue)
        barrier = barrier_for(barriers, rank_of(request, rows.get(pod.uid))) if barriers else None
        if barrier is None and not self.queues.quota.keys(request.queue):
            return None, ""
        word = "WaitingForQuota" if barrier is None else "WaitingBehindPriority"
        if barrier is not None and self.layout != layout:
            return NOWHERE, word  # the next turn, which is due, says where
        self.charging.settle(rows)
        return self.affordable(request, barrier), word

    def affordable(self, request: Request, barrier: Barrier | None) -> BoolArray | None:
        """Return where a request fits into its quota and leaves what is owed to those before it; None = everywhere."""
        found = self.charging.affordable(request, {} if barrier is None else barrier.owed)
        if isinstance(found, bool):
            if not found:
                return np.zeros(self.charging.registry.snapshot().nodes, np.bool_)
            return None if barrier is None else barrier.open
        return found if barrier is None else found & barrier.open

    def forget(self, uid: str) -> None:
        """Drop what is remembered of a request that is over."""
        self.words.pop(uid, None)
        self.astray.pop(uid, None)
