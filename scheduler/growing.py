"""New nodes on the live state: after a turn, those for whom one is asked lose their gate without a nomination.

kube-scheduler then finds no node for them, says so in their condition PodScheduled, and whoever adds nodes to the
cluster (cluster-autoscaler, Karpenter) sees it. Their own condition keeps since when that is so, for the next process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from policies.columns import BoolArray
from scheduler import AUTOSCALE, geometry
from scheduler.clock import Clock
from scheduler.config import Settings
from scheduler.desk import Desk
from scheduler.intake.node import read_node
from scheduler.model.pod import Pod
from scheduler.model.reservation import State
from scheduler.queueing.growth import LOOKED_AT, NEVER, Growth, Template
from scheduler.queueing.turn import Unit
from scheduler.releasing import Releaser

FOR_ROOM = frozenset({"WaitingForCapacity", "WaitingBehindPriority", "PendingEvaluation", NEVER})
"""Words that say no more of who waits for a new node than that."""


@dataclass(slots=True)
class Grower:
    """Asks for new nodes on behalf of those that wait.

    Attributes:
        growth: for whom.
        waits: says whether all members of a unit still wait.
        found: first member of a gang -> how many members found a node in this turn before it was given up.
    """

    desk: Desk
    releaser: Releaser
    clock: Clock
    growth: Growth
    waits: Callable[[Unit], bool] = bool
    found: dict[str, int] = field(default_factory=dict)
    _fitting: dict[Hashable, bool] = field(default_factory=dict)  # kind of a unit -> whether nodes take it now
    _able: dict[Hashable, bool] = field(default_factory=dict)  # the same, were they empty

    @classmethod
    def of(cls, desk: Desk, releaser: Releaser, clock: Clock, settings: Settings) -> Grower:
        """Return one with the configured groups, that asks for nobody yet."""
        read = ((read_node(group.node(), geometry.products()), group.maxNodes) for group in settings.nodeGroups)
        templates = tuple(Template(node, most) for node, most in read if node is not None)
        placements, timeout_s = desk.registry.columns.placements, settings.queue.autoscaleTimeout
        return cls(desk, releaser, clock, Growth(templates, desk.policies, placements, timeout_s))

    def watch(self, pod: Pod) -> bool:
        """Take note of a pod that waits, as the API server shows it; True = a new node is asked for it."""
        if pod.asked_us and self.growth.keep(pod.uid, pod.asked_us, self.clock.wall_us()) and pod.gates:
            self.releaser.ask({pod.uid: pod.asked_us})  # the last process ended between the two writes
        return pod.uid in self.growth.asked

    def say(self, members: Iterable[str], word: str) -> None:
        """Say why these wait; where a new node is asked for, what lacks on the others is no news."""
        words, asked = self.desk.order.words, self.growth.asked
        if asked and word in FOR_ROOM:
            words |= {uid: AUTOSCALE if uid in asked else word for uid in members}
        else:
            words |= dict.fromkeys(members, word)

    # before a turn, in it, and after it

    def begin(self) -> None:
        """Ask no more for those who wait no longer, or have waited too long."""
        self.found.clear()
        self._fitting.clear()
        self._able.clear()
        if self.growth.templates:
            self.growth.expire(self.clock.wall_us())
            self._strike_out()
            self.growth.settle(self.desk.registry.nodes, self.desk.registry.columns.layout)

    def _strike_out(self) -> None:
        """Ask no more for those who wait no longer."""
        rows = self.desk.book.rows
        for uid in list(self.growth.asked):
            row = rows.get(uid)
            if row is None or row.state is not State.QUEUED:
                self.growth.forget(uid)

    def awaited(self, unit: Unit, could: BoolArray) -> BoolArray:
        """Return ``[N]`` with a unit's nodes, where a new one is asked for it, those that may be and are not ready."""
        if not self.growth.asks(unit.members):
            return could
        requests = [pod.request for pod in self.members(unit)]
        return could | self.growth.awaited(requests, self.desk.registry.columns.rows, len(could))

    def after(self, units: Iterable[tuple[Unit, str]]) -> Iterator[bool]:
        """See for whom of those that were not placed a new node is asked; yields after each whether one is now."""
        desk, growth = self.desk, self.growth
        growing = growth.grows(desk.queues.quota)
        if not growing:
            return
        self._strike_out()
        lines: dict[str, list[tuple[Unit, str]]] = {}
        for unit, word in units:
            if unit.queue in growing and len(line := lines.setdefault(unit.queue, [])) < LOOKED_AT:
                line.append((unit, word))
        turns = filter(None, chain.from_iterable(zip_longest(*lines.values())))  # one of each queue, then the next
        usage, window = desk.order.charging.settle(desk.book.rows), self.releaser.window.size
        now = self.clock.monotonic(), self.clock.wall_us()
        for members in growth.look(turns, desk.queues.quota, usage, self, now, window):
            self.say(members, "WaitingForCapacity")
            self.releaser.ask({uid: growth.asked[uid] for uid in members})
            yield bool(members)

    def due_s(self) -> float:
        """Return when the time alone makes another turn worth while, on the monotonic clock; infinite = never."""
        now_s = self.clock.monotonic()
        return now_s + self.growth.due_s(now_s, self.clock.wall_us())

    # what has to be known of a unit

    def members(self, unit: Unit) -> list[Pod]:
        """Return its pods."""
        return [self.desk.registry.pods[uid] for uid in unit.members]

    def able(self, unit: Unit) -> bool:
        """Say whether the nodes that are there could take it, were they empty."""
        known = self._able.get(unit.kind)
        if known is None:
            known = self._able[unit.kind] = all(self.desk.could(pod).any() for pod in self.members(unit))
        return known

    def fits(self, unit: Unit) -> bool:
        """Say whether each member finds a node now, whoever is before it."""
        known = self._fitting.get(unit.kind)
        if known is None:
            known = self._fitting[unit.kind] = all(self.desk.fits_now(pod) for pod in self.members(unit))
        return known

    def placed(self, unit: Unit) -> int:
        """Return for how many members the turn found a node before it gave the unit up."""
        return self.found.get(unit.members[0], 0)
