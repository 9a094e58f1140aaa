"""Whether all pods of a gang would be admitted now, changed as somebody might change them: tried, and taken back. Pure.

Invariant: what is tried is booked one pod after the other, as the turn does, and nothing of it is left afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from policies.columns import BoolArray, Kind, Mix
from scheduler import MIG_PREFIX
from scheduler.decision.board import Boards
from scheduler.decision.catalog import TURN_MASKS
from scheduler.decision.pipeline import Policies
from scheduler.decision.placing import DoesNotFit, place
from scheduler.inventory.asks import Asks, shape
from scheduler.inventory.registry import Source, booking
from scheduler.ledger.charges import charge_of
from scheduler.ledger.quota import Quota, Usage, charge, lacking
from scheduler.model.allocation import Allocation
from scheduler.model.pod import Pod, Request

from .charging import Charging
from .shortage import Shortage, beyond, raised
from .turn import Barrier, owing

PLACED_MAX = 128
"""Pods that one rehearsal places at most, a tenth of a second; what comes after that fits nowhere."""

Tree = tuple[Quota, Usage]


@dataclass(slots=True)
class Rehearsal:
    """A gang that waits, and what a turn would judge it by.

    Attributes:
        pods: as many as it takes, first one first; none of them holds anything.
        barrier: what those before it leave; None = nobody is in its way.
        taught: says of a pod ``[N]`` which nodes it may have, as far as that was learnt.
        left: pods that may still be placed.
    """

    pods: Sequence[Pod]
    asks: Asks
    policies: Policies
    mix: Mix
    charging: Charging
    barrier: Barrier | None
    taught: Callable[[str], BoolArray]
    left: int = PLACED_MAX
    _boards: Boards = field(init=False)

    def __post_init__(self) -> None:
        """Keep boards of its own: what is asked here is asked by nobody else."""
        self._boards = Boards(self.policies)

    def nodes(self, change: Callable[[Request], Request], tree: Tree | None = None) -> BoolArray:
        """Return ``[N]`` the nodes on which the changed pods would be; none where not all of them would be admitted.

        Args:
            change: makes of a pod's request another one.
            tree: another tree of queues, with what is taken of it; None = as it is.
        """
        registry, (quota, usage) = self.asks.registry, tree or (self.charging.queues.quota, self.charging.usage)
        freed, usage, booked = registry.freed, usage.copy(), list[str]()
        found = np.zeros(registry.snapshot().nodes, np.bool_)
        try:
            for pod in self.pods:
                row = self._one(pod, change(pod.request), (quota, usage))
                if row < 0:
                    return np.zeros_like(found)
                booked.append(pod.uid)
                found[row] = True
        finally:
            for uid in reversed(booked):
                registry.unsay(uid, Source.CLAIMED)
            registry.freed = freed  # what was taken for a moment only is no news
        return found

    def _one(self, pod: Pod, request: Request, tree: Tree) -> int:
        """Book one pod on the best node that takes it, and return its row; -1 = none does."""
        self.left -= 1
        registry = self.asks.registry
        snapshot, ask, columns = registry.snapshot(), self.asks.ask(request), registry.columns
        open_ = self._open(request, tree)
        if self.left < 0 or not open_.any():
            return -1
        board = self._boards.of(shape(request), TURN_MASKS).turn(snapshot, ask, self.mix, columns.layout)
        best = board.best(np.flatnonzero(open_ & self.taught(pod.uid)))
        if not best.size:
            return -1
        row = int(best[0])
        name = columns.names[row]
        node = registry.nodes[name]
        try:
            chosen = place(snapshot, row, request, ask, node=node, judged=True)
        except DoesNotFit:
            return -1
        allocation = Allocation(pod.uid, 0, 0, name, "", chosen)
        amounts = charge_of(request, tree[0].model_keys, node, allocation.devices())
        if lacking(*tree, request.queue, amounts):
            return -1
        charge(*tree, request.queue, amounts)
        changed = replace(pod, request=request, tokens=_tokens(pod, request))
        registry.say(pod.uid, Source.CLAIMED, booking(changed, name, allocation))
        return row

    def _open(self, request: Request, tree: Tree) -> BoolArray:
        nodes = self.asks.registry.snapshot().nodes
        open_ = np.ones(nodes, np.bool_) if self.barrier is None else self.barrier.open
        found = self.charging.affordable(request, {} if self.barrier is None else self.barrier.owed, tree)
        return (open_ if found else np.zeros(nodes, np.bool_)) if isinstance(found, bool) else open_ & found

    def shortage(self, least: Mapping[str, int]) -> Shortage | None:
        """Return the least addition to one queue's nominal that would admit all; None = there is none.

        Args:
            least: what they take of the quota in sum, on the nodes where that is least.
        """
        tree, queue = (self.charging.queues.quota, self.charging.usage), self.pods[0].request.queue
        short = lacking(*tree, queue, owing(least, {} if self.barrier is None else self.barrier.owed))
        queues = {tree[0].lister(queue, key) for key in short}
        if len(queues) != 1:
            return None
        name = queues.pop()
        for more in (short, {key: amount + beyond(*tree, queue, key) for key, amount in short.items()}):
            nodes = int(self.nodes(lambda request: request, raised(*tree, name, more)).sum())
            if nodes:
                return Shortage(name, more, nodes)
        return None


def _tokens(pod: Pod, request: Request) -> tuple[tuple[str, int], ...]:
    """Return the device resources that the pod would ask, were its request this one."""
    devices = request.devices
    if devices == pod.request.devices:
        return pod.tokens
    resource = MIG_PREFIX + devices.profile.replace("+", ".") if devices.kind is Kind.MIG else devices.resource
    return ((resource, devices.count),)
