"""The queues as the API server or a file tells of them: their tree, who may use which, and what is taken of each. Pure.

Invariant: there is always a tree. A queue that cannot be read, or whose parent leads nowhere, is in it as a root that
admits nothing, and `wrong` says why; a queue whose object is gone is unknown, and what still runs in it is not limited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.intake.allocation import read_allocation
from scheduler.intake.queue import selects, sound
from scheduler.model.node import Node
from scheduler.model.pod import Pod
from scheduler.model.queue import Queue, Selector
from scheduler.model.reservation import Row, State

from .charges import charge_of, charge_of_allocation
from .lifecycle import HOLDING
from .quota import Quota, Usage, charge, grow
from .spent import Spent

WAITING = frozenset({State.HELD, State.QUEUED})


@dataclass(frozen=True, slots=True)
class _Charged:
    """What a row holds, and what that was made from."""

    row: Row
    pod: Pod | None
    node: Node | None
    models: tuple[str, ...]
    amounts: dict[str, int]


class Queues:
    """All queues and namespaces. The event loop that calls the methods owns it.

    Attributes:
        spent: the decayed usage of all queues, by which they compete.
        generation: grows with every change of queues or namespaces: what was refused may pass now.
    """

    def __init__(self) -> None:
        """Start with the built-in queue `default` alone."""
        self._told: dict[str, tuple[Queue, str]] = {}
        self._namespaces: dict[str, dict[str, str]] = {}
        self._charged: dict[str, _Charged] = {}
        self._tree: tuple[Quota, dict[str, str]] | None = None
        self.generation = 0
        self.spent = Spent()

    @property
    def quota(self) -> Quota:
        """The tree; another object after each change."""
        return self._grown()[0]

    @property
    def wrong(self) -> Mapping[str, str]:
        """Queue -> sentence, for each that admits nothing because of how it is written."""
        return self._grown()[1]

    def replace(self, told: Iterable[tuple[Queue, str]]) -> None:
        """Hold exactly these queues, each with a sentence where it cannot be used (see `intake.queue.told_queue`)."""
        self._told = {queue.name: (queue, sentence) for queue, sentence in told}
        self._change()

    def put(self, queue: Queue, sentence: str = "") -> None:
        """Take in a new or changed queue."""
        before = self._told.get(queue.name)
        self._told[queue.name] = queue, sentence
        if before is None or before[1] != sentence or not before[0].same_as(queue):
            self._change()

    def drop(self, name: str) -> None:
        """Forget a queue that is gone."""
        if self._told.pop(name, None) is not None:
            self._change()

    def told(self, name: str) -> Queue | None:
        """Return a queue as its object says, None where there is no object."""
        found = self._told.get(name)
        return found[0] if found else None

    def put_namespace(self, name: str, labels: Mapping[str, str]) -> None:
        """Take in a new or changed namespace."""
        if self._namespaces.get(name) != labels:
            self._namespaces[name] = dict(labels)
            self.generation += 1

    def drop_namespace(self, name: str) -> None:
        """Forget a namespace that is gone."""
        if self._namespaces.pop(name, None) is not None:
            self.generation += 1

    def namespaces(self, queue: str) -> list[str]:
        """Return the known namespaces that may use a queue, sorted."""
        return [name for name in sorted(self._namespaces) if self._may_use(name, queue)]

    def refusal(self, queue: str, namespace: str) -> str:
        """Return why no request of this namespace is admitted to the queue, as a word; empty = nothing is against it.

        A namespace of which nothing was heard yet may use only queues that select every namespace.
        """
        if queue not in self.quota.queues:
            return "QueueNotFound"
        if queue in self.wrong:
            return "QueueStopped"  # who may use it is not known either
        if not self._may_use(namespace, queue):
            return "NotAuthorized"
        return "QueueStopped" if self.quota.stopped(queue) else ""

    def _may_use(self, namespace: str, queue: str) -> bool:
        selector = self.quota.queues[queue].namespaces
        labels = self._namespaces.get(namespace)
        return selects(selector, labels) if labels is not None else selector == Selector()

    def _change(self) -> None:
        self._tree = None
        self.generation += 1

    def _grown(self) -> tuple[Quota, dict[str, str]]:
        """Return the tree and the sentences; many changes at once cost one tree."""
        if self._tree is None:
            queues, wrong = sound(queue for queue, _ in self._told.values())
            said = {queue.name: sentence for queue, sentence in self._told.values() if sentence}
            self._tree = grow(queues), wrong | said
        return self._tree

    # what is taken

    def usage(self, rows: Mapping[str, Row], pods: Mapping[str, Pod], nodes: Mapping[str, Node]) -> Usage:
        """Return what the ledger's rows hold now, summed anew; charges are kept for rows that did not change.

        Args:
            rows: all rows, by request id.
            pods: by uid; a row without its pod is charged by its allocation.
            nodes: by name; a node that is gone charges no model.
        """
        own: dict[str, dict[str, int]] = {}
        before, self._charged, models = self._charged, {}, self.quota.model_keys
        for uid, row in rows.items():
            if row.state in HOLDING:
                pod, node = pods.get(uid), nodes.get(row.node)
                charged = before.get(uid)
                if charged is None or not _made_from(charged, row, pod, node, models):
                    charged = _Charged(row, pod, node, models, self.amounts(row, pod, node))
                self._charged[uid] = charged
                sums = own.setdefault(row.queue, {})
                for key, amount in charged.amounts.items():
                    sums[key] = sums.get(key, 0) + amount
        usage = Usage()
        for queue in sorted(own):
            charge(self.quota, usage, queue, own[queue])
        return usage

    def amounts(self, row: Row, pod: Pod | None, node: Node | None) -> dict[str, int]:
        """Return what a row that holds something takes of its queue's quota, by key; pod and node where known."""
        allocation = read_allocation(row.allocation) if row.allocation else None
        if pod is None:
            return charge_of_allocation(row.cpu_milli, row.memory_mib, allocation)
        slots = allocation.devices() if allocation is not None else ()
        return charge_of(pod.request, self.quota.model_keys, node, slots)

    def pending(self, rows: Mapping[str, Row]) -> dict[str, int]:
        """Return how many requests wait in each queue and those below it; zeros are left out."""
        own: dict[str, int] = {}
        for row in rows.values():
            if row.state in WAITING:
                own[row.queue] = own.get(row.queue, 0) + 1
        below: dict[str, int] = {}
        for queue, count in own.items():
            for name in self.quota.path(queue):
                below[name] = below.get(name, 0) + count
        return below


def _made_from(charged: _Charged, row: Row, pod: Pod | None, node: Node | None, models: tuple[str, ...]) -> bool:
    return charged.row is row and charged.pod is pod and charged.node is node and charged.models == models
