"""What requests take of their queues' quota on each kind of node, and what is taken now, kept beside the claims. Pure.

Invariants: what is taken is the sum over the rows that hold something, each charged once with what was known when it
was charged; after a change of the tree everything is summed anew. Where no queue limits anything, nothing is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from policies.columns import BoolArray, Kind
from scheduler.inventory.asks import shape
from scheduler.inventory.registry import Registry
from scheduler.ledger.charges import MIB, charge_of
from scheduler.ledger.lifecycle import HOLDING
from scheduler.ledger.queues import Queues
from scheduler.ledger.quota import Quota, Usage, charge, lacking, refund
from scheduler.model.node import Node
from scheduler.model.pod import Request
from scheduler.model.queue import CPU_KEY, GPU_KEY, MEMORY_KEY, MIG_KEY, MILLI_KEY
from scheduler.model.reservation import Row

from .turn import Amounts, owing

BOUNDS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Alike:
    """Nodes on which every request is charged the same: one of them, and the rows of all."""

    node: Node
    rows: npt.NDArray[np.intp]


@dataclass(slots=True)
class Charging:
    """Quota as a decision needs it. The event loop that calls the methods owns it.

    Attributes:
        usage: what is taken now; read it through `settle`, which takes in a new tree first.
    """

    queues: Queues
    registry: Registry
    usage: Usage = field(default_factory=Usage)
    _quota: Quota | None = None
    _charged: dict[str, tuple[str, Amounts]] = field(default_factory=dict)
    _alike: list[Alike] = field(default_factory=list)
    _layout: int = -1
    _bounds: dict[Hashable, tuple[Amounts, Amounts]] = field(default_factory=dict)

    @property
    def limits(self) -> bool:
        """Say whether any queue limits anything."""
        return bool(self.queues.quota.total)

    def settle(self, rows: Mapping[str, Row]) -> Usage:
        """Return what is taken now; after a change of the tree, summed anew from these rows, which are all."""
        if self._quota is not self.queues.quota:
            self._quota = self.queues.quota
            before, self.usage, self._charged = self._charged, Usage(), {}
            self._bounds.clear()
            for row in rows.values():
                if row.state in HOLDING:
                    self._take(row, before)
        return self.usage

    def of(self, request: Request, node: Node, slots: Collection[int]) -> Amounts:
        """Return what a request takes on these devices of a node; nothing where nobody is limited."""
        return charge_of(request, self.queues.quota.model_keys, node, slots) if self.limits else {}

    def take(self, row: Row, amounts: Amounts | None = None) -> Amounts:
        """Charge what a row holds, if it is not charged yet; return what that is. None = it is read from the row."""
        if not self.limits or self._quota is not self.queues.quota:
            return {}  # nobody is limited, or all of it is summed anew when somebody asks
        if row.id not in self._charged:
            self._take(row, {}, amounts)
        return self._charged[row.id][1]

    def _take(self, row: Row, before: Mapping[str, tuple[str, Amounts]], amounts: Amounts | None = None) -> None:
        """Charge a row; while its node is gone, as it was charged before: the model is not known otherwise."""
        assert self._quota is not None, "a tree was taken in"
        pod, node = self.registry.pods.get(row.id), self.registry.nodes.get(row.node)
        if amounts is None:
            amounts = self.queues.amounts(row, pod, node)
        if node is None and row.id in before:
            amounts = {**before[row.id][1], **amounts}
        charge(self._quota, self.usage, row.queue, amounts)
        self._charged[row.id] = row.queue, amounts

    def give_back(self, uid: str) -> None:
        """Take back the charge of a row that no longer holds anything."""
        found = self._charged.pop(uid, None)
        if found is not None and self._quota is not None:
            refund(self._quota, self.usage, *found)

    def renew(self, rows: Mapping[str, Row], uids: Iterable[str]) -> None:
        """Charge these anew, as far as they are charged, since what they take may have changed."""
        for uid in uids:
            row = rows.get(uid)
            if uid in self._charged and row is not None:
                self.give_back(uid)
                self.take(row)

    def differences(self, rows: Mapping[str, Row], busy: Collection[str]) -> Iterator[str]:
        """Yield for each charge, and for each row that should have one, a sentence on what is wrong; empty = nothing.

        Args:
            rows: all rows.
            busy: ids about to change; they are passed over.
        """
        if not self.limits:
            return
        usage, quota = self.settle(rows), self.queues.quota
        anew = Usage()
        for queue, amounts in self._charged.values():
            charge(quota, anew, queue, amounts)
        yield "" if anew == usage else "the usage of the queues differs from the sum of its charges"
        for uid in [row.id for row in rows.values() if row.state in HOLDING and row.id not in self._charged]:
            yield "" if uid in busy else f"request {uid} holds something and is charged to no queue"
        for uid in list(self._charged):
            yield "" if uid in busy else self._difference(rows.get(uid), uid)

    def _difference(self, row: Row | None, uid: str) -> str:
        if uid not in self._charged:
            return ""
        if row is None or row.state not in HOLDING:
            return f"request {uid} holds nothing and is charged to queue {self._charged[uid][0]}"
        if row.node not in self.registry.nodes:
            return ""  # it keeps the charge that it had
        fresh = self.queues.amounts(row, self.registry.pods.get(uid), self.registry.nodes.get(row.node))
        same = self._charged[uid] == (row.queue, fresh)
        return "" if same else f"request {uid} is charged otherwise than what it holds"

    # what a decision may take

    def bounds(self, request: Request, could: Callable[[], BoolArray]) -> tuple[Amounts, Amounts]:
        """Return what a request takes by key on the node where that is least, and where it is most.

        Args:
            request: whose.
            could: gives ``[N]`` the nodes it could use; where there is none, the charge without a node.
        """
        if not self.queues.quota.keys(request.queue):
            return {}, {}
        self.alike()
        key = shape(request)
        found = self._bounds.get(key)
        if found is None:
            if len(self._bounds) >= BOUNDS_MAX:
                self._bounds.clear()
            found = self._bounds[key] = self._bounded(request, could)
        return found

    def _bounded(self, request: Request, could: Callable[[], BoolArray]) -> tuple[Amounts, Amounts]:
        if not self._differs(request):
            amounts = charge_of(request)
            return amounts, amounts
        there = could()
        nodes = [one.node for one in self.alike() if there[one.rows].any()]
        wholes = [charge_of(request, self.queues.quota.model_keys, node) for node in nodes] or [charge_of(request)]
        keys = sorted({key for whole in wholes for key in whole})
        return (
            {key: least for key in keys if (least := min(whole.get(key, 0) for whole in wholes))},
            {key: max(whole.get(key, 0) for whole in wholes) for key in keys},
        )

    def affordable(self, request: Request, owed: Amounts, tree: tuple[Quota, Usage] | None = None) -> BoolArray | bool:
        """Return where a request fits into its queue's quota beside what is owed: ``[N]``, or the same everywhere.

        Args:
            request: whose.
            owed: to those before it, by key.
            tree: another tree with what is taken of it; None = as it is.
        """
        quota, usage = tree or (self.queues.quota, self.usage)
        if not quota.keys(request.queue):
            return True
        if not self._differs(request):
            return not lacking(quota, usage, request.queue, owing(charge_of(request), owed))
        found = np.zeros(self.registry.snapshot().nodes, np.bool_)
        for one in self.alike():
            amounts = charge_of(request, quota.model_keys, one.node)
            found[one.rows] = not lacking(quota, usage, request.queue, owing(amounts, owed))
        return found

    def _differs(self, request: Request) -> bool:
        """Say whether the node decides what a request takes."""
        devices = request.devices
        if devices.kind is Kind.WHOLE:
            return bool(self.queues.quota.model_keys)
        return devices.kind is Kind.SHARE and not devices.milli

    def alike(self) -> list[Alike]:
        """Return the nodes grouped by what decides a charge."""
        columns = self.registry.columns
        if self._layout != columns.layout:
            groups: dict[Hashable, list[str]] = {}
            for name, node in self.registry.nodes.items():
                devices = tuple((device.model, device.memory_mib) for device in node.devices)
                groups.setdefault((node.product, devices), []).append(name)
            self._alike = [
                Alike(self.registry.nodes[names[0]], np.asarray([columns.rows[name] for name in names], np.intp))
                for names in groups.values()
            ]
            self._layout = columns.layout
            self._bounds.clear()
        return self._alike

    def capacity(self) -> dict[str, int]:
        """Return what the cluster has by key, for queues that list nothing; GPUs count as shares too."""
        found = {CPU_KEY: 0, MEMORY_KEY: 0, GPU_KEY: 0, MILLI_KEY: 0}
        for node in self.registry.nodes.values():
            found[CPU_KEY] += node.amounts.cpu_milli
            found[MEMORY_KEY] += node.amounts.memory_bytes // MIB
            found[GPU_KEY] += node.gpus
            found[MILLI_KEY] += 1000 * node.gpus
            for profile, count in node.slices:
                found[MIG_KEY + profile] = found.get(MIG_KEY + profile, 0) + count
        return found
