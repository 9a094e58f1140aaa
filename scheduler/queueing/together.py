"""Whether all pods of a gang could ever run at the same time: what the nodes hold of them, were they empty. Pure.

Nodes of one make take the same, so one of each make is filled by the very masks and placing that decide. Invariant: a
gang of equal pods is judged exactly; for one of different pods "no" is certain, and "yes" may be wrong, because each
kind is counted alone and all of them only by their sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from policies.columns import BoolArray, Kind, empty_mix
from scheduler.decision.catalog import TURN_MASKS
from scheduler.decision.pipeline import Policies, judge
from scheduler.decision.placing import DoesNotFit, place
from scheduler.inventory.asks import Asks, shape
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.model.allocation import Allocation
from scheduler.model.node import Node
from scheduler.model.pod import Pod

KNOWN_MAX = 4096
NAME = "empty"


@dataclass(slots=True)
class _Filled:
    """How many pods of one shape an empty node of one make takes: so many at least, and no more where it is full."""

    asks: Asks
    count: int = 0
    full: bool = False


@dataclass(slots=True)
class Together:
    """What empty nodes hold. The event loop that calls the methods owns it.

    Attributes:
        registry: the live one; only its nodes are read.
        policies: whose masks decide.
    """

    registry: Registry
    policies: Policies
    _layout: int = -1
    _makes: list[tuple[Hashable, Node, npt.NDArray[np.intp]]] = field(default_factory=list)
    _filled: dict[Hashable, _Filled] = field(default_factory=dict)

    def able(self, pods: Sequence[Pod], could: Sequence[BoolArray]) -> bool:
        """Say whether the nodes could hold all of these at the same time, were they empty.

        Args:
            pods: at least one.
            could: of each, ``[N]`` the nodes that it could use by itself.
        """
        self._group()
        kinds: dict[Hashable, list[int]] = {}
        for at, pod in enumerate(pods):
            kinds.setdefault((shape(pod.request), could[at].tobytes()), []).append(at)
        if not all(self._holds(pods[kind[0]], could[kind[0]], len(kind)) for kind in kinds.values()):
            return False
        return len(kinds) == 1 or self._sums(pods, np.logical_or.reduce(could))

    def _holds(self, pod: Pod, could: BoolArray, count: int) -> bool:
        """Say whether so many pods like this one fit; a node is filled no further than that needs."""
        left = count
        for key, node, rows in self._makes:
            there = int(np.count_nonzero(could[rows]))
            if there:
                left -= there * self._fill(key, node, pod, -(-left // there))
            if left <= 0:
                return True
        return False

    def _fill(self, make: Hashable, node: Node, pod: Pod, wanted: int) -> int:
        """Return how many pods like this one an empty node takes, at most as many as wanted."""
        key = make, shape(pod.request, everywhere=True), pod.request.amounts
        found = self._filled.get(key)
        if found is None:
            if len(self._filled) >= KNOWN_MAX:
                self._filled.clear()
            registry = Registry(self.registry.columns.placements)
            registry.put_node(replace(node, name=NAME, uid=NAME, unschedulable=False))
            found = self._filled[key] = _Filled(Asks(registry))
        while found.count < wanted and not found.full:
            found.full = not self._one_more(found, pod, f"{found.count}")
            found.count += not found.full
        return min(found.count, wanted)

    def _one_more(self, filled: _Filled, pod: Pod, uid: str) -> bool:
        registry, request = filled.asks.registry, replace(pod.request, id=uid)
        ask, row = filled.asks.ask(request, everywhere=True), registry.columns.rows[NAME]
        snapshot, node = registry.snapshot(), registry.nodes[NAME]
        if not judge(snapshot, ask, empty_mix(len(ask.models)), self.policies, TURN_MASKS).passes[row]:
            return False
        try:
            chosen = place(snapshot, row, request, ask, node=node, judged=True)
        except DoesNotFit:
            return False
        held = booking(replace(pod, request=request), NAME, Allocation(uid, 0, 0, NAME, "", chosen))
        registry.say(uid, Source.CLAIMED, held)
        return True

    def _sums(self, pods: Iterable[Pod], could: BoolArray) -> bool:
        """Say whether the nodes have enough of what all ask in sum."""
        nodes = [(node, int(np.count_nonzero(could[rows]))) for _, node, rows in self._makes]
        asked = [pod.request for pod in pods]
        gpus = sum(one.devices.count for one in asked if one.devices.kind is Kind.WHOLE)
        cpu, memory = sum(one.amounts.cpu_milli for one in asked), sum(one.amounts.memory_bytes for one in asked)
        return (
            gpus <= sum(node.gpus * there for node, there in nodes)
            and cpu <= sum(node.amounts.cpu_milli * there for node, there in nodes)
            and memory <= sum(node.amounts.memory_bytes * there for node, there in nodes)
        )

    def _group(self) -> None:
        """Group the nodes by what decides what they hold; the largest groups first."""
        columns = self.registry.columns
        if self._layout == columns.layout:
            return
        self._layout = columns.layout
        groups: dict[Hashable, list[str]] = {}
        for name, node in self.registry.nodes.items():
            groups.setdefault(_make(node), []).append(name)
        self._makes = [
            (make, self.registry.nodes[names[0]], np.asarray([columns.rows[name] for name in names], np.intp))
            for make, names in sorted(groups.items(), key=lambda pair: -len(pair[1]))
        ]


def _make(node: Node) -> Hashable:
    """Return what nodes that hold the same have in common."""
    devices = tuple((device.model, device.memory_mib, device.mig_mode) for device in node.devices)
    tokens = node.gpus, node.slices, node.shares, node.whole_gpus
    return node.mode, node.amounts, node.pods, tokens, node.product, devices
