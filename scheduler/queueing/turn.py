"""One turn of the queue: which queue is next, which of its requests, what each gets, and what blocks. Pure.

Queues compete by `ordering.queue_rank`, which is made anew for those queues whose numbers a decision changed. Inside a
queue the order is fixed. Who does not fit, or lacks quota, keeps its place: it *blocks*, and those behind it there may
have only nodes that it could not use even if they were empty, and only quota that leaves what it needs. Who could run
on no node at all, and for whom none is asked, or exceeds what its queue can ever have, blocks nobody.

Invariants: a turn decides each unit at most once; capacity and quota only shrink in it, as far as its own doing goes,
so what was refused once is not asked again for units of the same kind. If something else was freed meanwhile, the next
turn sees to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np

from policies.columns import BoolArray
from policies.ordering import MICRO, QueueRank, RequestRank, queue_rank, share_milli
from scheduler.ledger.quota import Quota, Usage, entitled, exceeding, lacking, would_borrow

HEADS_MAX = 512
"""Kinds of units that may be refused in one queue and turn; after that the queue is set aside."""

Amounts = Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What is decided at once: a request alone, or the members of a gang.

    Attributes:
        queue: its name.
        rank: its place in the queue, that of its first member.
        kind: units of one kind ask nodes and quota for the same.
        members: request ids, first member first.
        least, most: what it takes of the quota by key, on the node where that is least, and where it is most.
    """

    queue: str
    rank: RequestRank
    kind: Hashable
    members: tuple[str, ...]
    least: Amounts
    most: Amounts


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a unit: what it took of the quota, or the word why it waits; neither = it waits no longer."""

    unit: Unit
    granted: Amounts | None = None
    word: str = ""


@dataclass(frozen=True, slots=True)
class Barrier:
    """What a blocked unit leaves to those behind it.

    Attributes:
        rank: of the blocked unit; it holds for whoever comes after.
        open: ``[N]`` the nodes that no blocked unit up to this one could use.
        owed: quota by key that those units need; keys that are limited for the queue.
    """

    rank: RequestRank
    open: BoolArray
    owed: Amounts


class Floor(Protocol):
    """The cluster, as far as a turn needs it."""

    def waits(self, unit: Unit) -> bool:
        """Say whether all members still wait; others act between two steps."""
        ...

    def place(self, unit: Unit, barrier: Barrier | None) -> Amounts | None:
        """Take nodes and quota for all members, within the barrier, or nothing; return what it took of the quota."""
        ...

    def could(self, unit: Unit) -> BoolArray:
        """Return ``[N]`` the nodes that any member could use, were they empty, or once they are ready."""
        ...

    def awaited(self, unit: Unit) -> bool:
        """Say whether a new node is asked for on its behalf: it then blocks others even where no node could take it."""
        ...


@dataclass(slots=True)
class _Line:
    units: Sequence[Unit]
    at: int = 0
    barriers: list[Barrier] = field(default_factory=list)
    refused: set[Hashable] = field(default_factory=set)  # kinds
    harmless: set[Hashable] = field(default_factory=set)  # those of them that no node could ever take
    granted: dict[str, int] = field(default_factory=dict)

    @property
    def barrier(self) -> Barrier | None:
        return self.barriers[-1] if self.barriers else None


class Turn:
    """One turn over all lines; `step` makes one decision."""

    def __init__(
        self,
        units: Iterable[Unit],
        quota: Quota,
        usage: Usage,
        floor: Floor,
        *,
        used: Mapping[str, Amounts] | None = None,
        capacity: Amounts | None = None,
    ) -> None:
        """Line up.

        Args:
            units: all that may be decided, in any order; their queues are in the tree.
            quota: the tree; it must not change while the turn lasts.
            usage: the live one, which `floor.place` charges.
            floor: the cluster.
            used: queue -> decayed usage in millionths.
            capacity: what the cluster has by key, for queues that list nothing.
        """
        self._quota, self._usage, self._floor = quota, usage, floor
        self._used, self._capacity = used or {}, capacity or {}
        lines: dict[str, list[Unit]] = {}
        for unit in sorted(units, key=lambda unit: unit.rank):
            lines.setdefault(unit.queue, []).append(unit)
        self._lines = {name: _Line(lines[name]) for name in sorted(lines)}
        self._hopeless: set[Hashable] = set()  # kinds that fit on no node, whatever their queue
        self._entitled = {name: entitled(quota, name, self._capacity) for name in self._lines}
        self._touched = {name: self._touched_by(name) for name in self._lines}
        self._ranks: dict[str, QueueRank] = {name: self._rank(name) for name in self._lines}
        self._heap = list(self._ranks.values())
        heapify(self._heap)

    def step(self) -> Decision | None:
        """Decide the next unit; None = the turn is over."""
        while self._heap:
            rank = heappop(self._heap)
            if self._ranks.get(rank[-1]) == rank:
                del self._ranks[rank[-1]]
                return self._decide(self._lines[rank[-1]])
        return None

    def barriers(self, nodes: int) -> dict[str, list[Barrier]]:
        """Return by queue what its blocked units leave to those behind, first one first; without any: no key.

        Units that were not decided leave nothing.

        Args:
            nodes: rows of the inventory.
        """
        found = {name: list(line.barriers) for name, line in self._lines.items()}
        for name, line in self._lines.items():
            if line.at < len(line.units):
                owed = line.barrier.owed if line.barrier is not None else {}
                found[name].append(Barrier(line.units[line.at].rank, np.zeros(nodes, np.bool_), owed))
        return {name: barriers for name, barriers in found.items() if barriers}

    def undecided(self) -> Iterator[Unit]:
        """Yield the units of queues that were set aside, and those whose turn has not come."""
        for line in self._lines.values():
            yield from line.units[line.at :]

    def _decide(self, line: _Line) -> Decision:
        unit = line.units[line.at]
        line.at += 1
        granted, word = self._judge(line, unit) if self._floor.waits(unit) else (None, "")
        if word and word != "ExceedsQuotaLimit" and self._block(line, unit):
            return Decision(unit, word=word)  # its queue is set aside
        for key, amount in (granted or {}).items():
            line.granted[key] = line.granted.get(key, 0) + amount
        if line.at < len(line.units):
            self._enter(unit.queue)
        if granted:
            for name in self._touched[unit.queue]:
                if name in self._ranks:
                    self._enter(name)
        return Decision(unit, granted, word)

    def _judge(self, line: _Line, unit: Unit) -> tuple[Amounts | None, str]:
        """Place the unit, or say in a word why it waits."""
        quota, barrier = self._quota, line.barrier
        if self._limited(unit.queue):
            if exceeding(quota, unit.queue, unit.least):
                return None, "ExceedsQuotaLimit"
            if lacking(quota, self._usage, unit.queue, unit.least):
                return None, "WaitingForQuota"
            if barrier is not None and lacking(quota, self._usage, unit.queue, owing(unit.least, barrier.owed)):
                return None, "WaitingBehindPriority"
        word = "WaitingForCapacity" if barrier is None else "WaitingBehindPriority"
        if unit.kind in self._hopeless or unit.kind in line.refused:
            return None, word
        granted = self._floor.place(unit, barrier)
        if granted is not None:
            return granted, ""
        if barrier is None and not self._limited(unit.queue):
            self._hopeless.add(unit.kind)
        return None, word

    def _block(self, line: _Line, unit: Unit) -> bool:
        """Let the unit stand in the way of those behind; True = none of them can pass, or too many were refused."""
        if unit.kind in line.harmless:
            return False
        before = line.barrier
        if unit.kind not in line.refused:
            line.refused.add(unit.kind)
            could = self._floor.could(unit)
            if not could.any() and not self._floor.awaited(unit):
                line.harmless.add(unit.kind)
                return len(line.refused) >= HEADS_MAX
            open_ = ~could if before is None else before.open & ~could
        else:
            assert before is not None, "what was refused and could run has left a barrier"
            open_ = before.open
        needs = {key: unit.most[key] for key in self._quota.keys(unit.queue) if unit.most.get(key)}
        if before is None or needs or open_ is not before.open:
            owed = before.owed if before is not None else {}
            line.barriers.append(Barrier(unit.rank, open_, owing(needs, owed, every=True)))
        return len(line.refused) >= HEADS_MAX or not open_.any()

    def _limited(self, queue: str) -> bool:
        return bool(self._quota.keys(queue))

    def _touched_by(self, name: str) -> tuple[str, ...]:
        """Return the queues whose rank changes with what is granted to this one: those that draw on the same pool."""
        path = set(self._quota.path(name))
        return tuple(
            other
            for other in self._lines
            if other != name and any(self._quota.lister(other, key) in path for key in self._quota.keys(other))
        )

    def _enter(self, name: str) -> None:
        """Let a queue compete with its present rank."""
        rank = self._rank(name)
        if self._ranks.get(name) != rank:
            self._ranks[name] = rank
            heappush(self._heap, rank)

    def _rank(self, name: str) -> QueueRank:
        line = self._lines[name]
        if len(self._lines) == 1:
            return queue_rank(borrows=False, share=0, name=name)
        borrows = would_borrow(self._quota, self._usage, name, line.units[line.at].least)
        used = dict(self._used.get(name, {}))
        for key, amount in line.granted.items():
            used[key] = used.get(key, 0) + amount * MICRO
        weight = self._quota.queues[name].weight
        return queue_rank(borrows=borrows, share=share_milli(used, self._entitled[name], weight), name=name)


def owing(amounts: Amounts, owed: Amounts, *, every: bool = False) -> dict[str, int]:
    """Return amounts with what is owed to others added; only of the keys that are asked, unless `every`.

    Whoever asks `lacking` for the sum learns whether the amounts fit beside what is owed: taking the one leaves just so
    much less for the other.
    """
    found = {key: amount + owed.get(key, 0) for key, amount in amounts.items() if amount}
    return {**owed, **found} if every else found


def barrier_for(barriers: Sequence[Barrier], rank: RequestRank) -> Barrier | None:
    """Return what holds for a request of this rank: the barrier of the last blocked unit before it, if any."""
    before = bisect_left(barriers, rank, key=lambda barrier: barrier.rank)
    return barriers[before - 1] if before else None
