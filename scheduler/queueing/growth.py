"""New nodes: what an autoscaler may add, and for whom one is asked. Pure.

A unit is asked for once it has fitted on no node for a while, its queue may pay for it beside all that wait before it,
and new nodes of the configured groups take all its members. It holds nothing then: when a node is there, the turn
decides in order as ever.

Invariants: what is asked for at one time fits into the tree of queues together with what is taken, into the window, and
into as many new nodes as the groups may still get; a unit is asked for as a whole; nobody is asked for twice who was
asked for in vain.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from policies.columns import BoolArray, empty_mix
from policies.placements import NO_PLACEMENTS, Placements
from scheduler.decision.catalog import Policies
from scheduler.decision.pipeline import judge
from scheduler.decision.placing import DoesNotFit, place
from scheduler.inventory.asks import Asks, shape
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.ledger.charges import charge_of
from scheduler.ledger.quota import Quota, Usage, charge, lacking
from scheduler.model.allocation import Allocation
from scheduler.model.node import Node
from scheduler.model.pod import Pod, Request

from .turn import Amounts, Unit

AFTER_S = 30.0
LOOKED_AT = 512
"""Units of one queue that a look is meant for, first ones first."""
NEVER = "ExceedsClusterSize"
"""Of gangs that the nodes could not hold at the same time, were they empty."""
SHAPES_MAX = 4096
LATER = ("nvidia.com/", "tessera.dev/")
"""Labels with these prefixes may come after the node: GPU Feature Discovery and people write them."""


@dataclass(frozen=True, slots=True)
class Template:
    """What a new node of a group looks like.

    Attributes:
        node: as it will be when all of it is there; its name is the group's.
        most: how many nodes the group may have; None = any number.
    """

    node: Node
    most: int | None = None

    @property
    def marks(self) -> frozenset[tuple[str, str]]:
        """The labels by which a node of the group is known from its first moment on."""
        labels = frozenset(self.node.labels)
        return frozenset(label for label in labels if not label[0].startswith(LATER)) or labels


class Ground(Protocol):
    """What has to be known of the units that wait."""

    def waits(self, unit: Unit) -> bool:
        """Say whether all members still wait."""
        ...

    def members(self, unit: Unit) -> Sequence[Pod]:
        """Return its pods, in its order."""
        ...

    def able(self, unit: Unit) -> bool:
        """Say whether the nodes that are there could take it, were they empty."""
        ...

    def fits(self, unit: Unit) -> bool:
        """Say whether each member finds a node now, whoever is before it."""
        ...

    def placed(self, unit: Unit) -> int:
        """Return for how many members, first ones first, the turn found a node before it gave the unit up."""
        ...


@dataclass(slots=True)
class Growth:
    """The groups, and for whom a node is asked. The event loop that calls the methods owns it.

    Attributes:
        templates: one per group.
        timeout_s: for so long a node is asked for; then no more.
        asked: request -> since when a node is asked for it, microseconds.
    """

    templates: tuple[Template, ...] = ()
    policies: Policies = field(default_factory=Policies)
    placements: Placements = NO_PLACEMENTS
    timeout_s: float = 900.0
    asked: dict[str, int] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)  # first member -> since when no node takes the unit
    _coming: Registry = field(init=False)  # new nodes, with those on them for whom they are asked
    _asks: Asks = field(init=False)
    _of: dict[str, int] = field(default_factory=dict)  # name of such a node -> its template
    _takes: dict[Hashable, BoolArray] = field(default_factory=dict)
    _empty: Asks = field(init=False)  # one node of each template
    _marks: tuple[frozenset[tuple[str, str]], ...] = field(init=False)
    _there: dict[str, tuple[Node, frozenset[int]]] = field(default_factory=dict)
    _layout: int = -1
    _made: int = 0

    def __post_init__(self) -> None:
        """Draw up one node of each group."""
        self._coming = Registry(self.placements)
        self._asks = Asks(self._coming)
        self._empty = Asks(Registry(self.placements))
        for template in self.templates:
            self._empty.registry.put_node(template.node)
        self._marks = tuple(template.marks for template in self.templates)

    def grows(self, quota: Quota) -> frozenset[str]:
        """Return the queues for which nodes are asked; none where no group is configured."""
        return frozenset(name for name, queue in quota.queues.items() if queue.autoscale) if self.templates else _NONE

    # for whom

    def keep(self, uid: str, since_us: int, now_us: int) -> bool:
        """Take note that a pod tells since when a node is asked for it; True = that is news."""
        if uid in self.asked or not self.templates or now_us - since_us >= self.timeout_s * 1e6:
            return False
        self.asked[uid] = since_us
        return True

    def forget(self, uid: str) -> None:
        """Ask no more for this request."""
        self._since.pop(uid, None)
        if self.asked.pop(uid, None) is not None:
            self._unbook(uid)

    def expire(self, now_us: int) -> None:
        """Ask no more for those for whom nothing came in time."""
        late = [uid for uid, since_us in self.asked.items() if now_us - since_us >= self.timeout_s * 1e6]
        for uid in late:
            self.forget(uid)

    def asks(self, members: Iterable[str]) -> bool:
        """Say whether a node is asked for on behalf of any of these."""
        return not self.asked.keys().isdisjoint(members)

    # the nodes

    def settle(self, nodes: Mapping[str, Node], layout: int) -> None:
        """Take note of the nodes that are there.

        Args:
            nodes: by name.
            layout: grows whenever a Node object came, changed or went.
        """
        if layout == self._layout:
            return
        self._layout = layout
        for name in self._there.keys() - nodes.keys():
            del self._there[name]
        for name, node in nodes.items():
            known = self._there.get(name)
            if known is None or known[0] is not node:
                self._there[name] = node, self._groups(node)

    def _groups(self, node: Node) -> frozenset[int]:
        labels = frozenset(node.labels)
        return frozenset(at for at, marks in enumerate(self._marks) if marks and marks <= labels)

    def awaited(self, requests: Iterable[Request], rows: Mapping[str, int], nodes: int) -> BoolArray:
        """Return ``[N]`` the nodes of all groups of which a new one would take any of these: some are not ready yet.

        Args:
            requests: for which nodes are asked.
            rows: of the inventory, by node name.
            nodes: how many rows there are.
        """
        found, taking = np.zeros(nodes, np.bool_), set[int]()
        for request in requests:
            taking.update(np.flatnonzero(self.takes(request)).tolist())
        for name, (_, groups) in self._there.items():
            if name in rows and not groups.isdisjoint(taking):
                found[rows[name]] = True
        return found

    def takes(self, request: Request) -> BoolArray:
        """Return which groups' new nodes take a request, `[T]`; the masks say so."""
        kind = shape(request)
        known = self._takes.get(kind)
        if known is None:
            if len(self._takes) >= SHAPES_MAX:
                self._takes.clear()
            known = self._takes[kind] = self._passes(self._empty, request)
        return known

    def _passes(self, asks: Asks, request: Request) -> BoolArray:
        ask = asks.ask(request)
        return judge(asks.registry.snapshot(), ask, empty_mix(len(ask.models)), self.policies).passes

    def _pack(self, pods: Sequence[Pod]) -> bool:
        """Book all of these on new nodes, or none of them."""
        for at, pod in enumerate(pods):
            if not self._book(pod):
                for other in pods[:at]:
                    self._unbook(other.uid)
                return False
        return True

    def _book(self, pod: Pod) -> bool:
        """Book a request on the first new node that takes it, else on one more."""
        rows = np.flatnonzero(self._passes(self._asks, pod.request))
        name = self._coming.columns.names[int(rows[0])] if len(rows) else self._one_more(pod.request)
        if not name:
            return False
        row, node = self._coming.columns.rows[name], self._coming.nodes[name]
        try:
            chosen = place(
                self._coming.snapshot(), row, pod.request, self._asks.ask(pod.request), node=node, judged=True
            )
        except DoesNotFit:
            self._clear(name)
            return False
        held = booking(pod, name, Allocation(pod.uid, 0, 0, name, "", chosen))
        self._coming.say(pod.uid, Source.INTENDED, held)
        return True

    def _one_more(self, request: Request) -> str:
        """Return the name of one more new node that takes a request; empty = no group may get one."""
        for at in np.flatnonzero(self.takes(request)).tolist():
            template = self.templates[at]
            there = sum(at in groups for _, groups in self._there.values()) + sum(of == at for of in self._of.values())
            if template.most is None or there < template.most:
                self._made += 1
                name = f"{template.node.name} {self._made}"  # no node has a space in its name
                self._of[name] = at
                self._coming.put_node(replace(template.node, name=name, uid=name))
                self._asks.node_changed(name)
                return name
        return ""

    def _unbook(self, uid: str) -> None:
        held = self._coming.held(uid)
        if held is not None:
            self._coming.unsay(uid, Source.INTENDED)
            self._clear(held.node)

    def _clear(self, name: str) -> None:
        """Strike a new node out that nobody is on."""
        if not self._coming.holders(name):
            self._coming.remove_node(name, name)
            del self._of[name]

    # the look

    def look(  # noqa: PLR0917 - the state of a turn, part by part
        self,
        units: Iterable[tuple[Unit, str]],
        quota: Quota,
        usage: Usage,
        ground: Ground,
        now: tuple[float, int],
        window: int,
    ) -> Iterator[tuple[str, ...]]:
        """Go through the units that wait; yield after each the members for whom a node is asked from now on.

        Args:
            units: with the word why each waits; in each queue first ones first, all of queues that grow.
            quota: the tree.
            usage: what is taken of it now.
            ground: what is known of the units.
            now: seconds on the monotonic clock, and the time in microseconds.
            window: requests for which nodes may be asked at the same time.
        """
        walk = _Walk(quota, usage.copy(), ground, window, window - len(self.asked))
        for unit, word in units:
            if word == "ExceedsQuotaLimit" or not ground.waits(unit):
                continue
            pods = ground.members(unit)
            needs = self._needs(unit, pods, quota)
            if self.asks(unit.members):
                charge(quota, walk.usage, unit.queue, needs)
                yield self._again(unit, pods, ground.placed(unit))
            elif self._may(unit, pods, word, walk, needs):
                charge(quota, walk.usage, unit.queue, needs)
                since_s = walk.since[unit.members[0]] = self._since.get(unit.members[0], now[0])
                if now[0] < since_s + AFTER_S or not self._ask(unit, pods, walk):
                    yield ()
                    continue
                self.asked |= dict.fromkeys(unit.members, now[1])
                walk.room -= len(unit.members)
                yield unit.members
            elif word != NEVER and ground.able(unit):
                charge(quota, walk.usage, unit.queue, needs)
                yield ()
        self._since = {first: since_s for first, since_s in walk.since.items() if first not in self.asked}

    def _needs(self, unit: Unit, pods: Sequence[Pod], quota: Quota) -> Amounts:
        """Return what a unit takes of its queue's quota at most: which group an autoscaler grows is its own choice."""
        keys = quota.keys(unit.queue)
        if not keys:
            return {}
        new: dict[str, int] = {}
        for pod in pods:
            nodes = [self.templates[at].node for at in np.flatnonzero(self.takes(pod.request)).tolist()]
            charges = [charge_of(pod.request, quota.model_keys, node) for node in nodes]
            for key in keys:
                new[key] = new.get(key, 0) + max((one.get(key, 0) for one in charges), default=0)
        return {key: max(unit.most.get(key, 0), new.get(key, 0)) for key in keys}

    def _may(self, unit: Unit, pods: Sequence[Pod], word: str, walk: _Walk, needs: Amounts) -> bool:
        """Say whether a unit lacks nothing but a node, and new ones would do."""
        return (
            word != "WaitingForQuota"
            and not lacking(walk.quota, walk.usage, unit.queue, needs)
            and not any(pod.request.claims or pod.asked_us for pod in pods)  # what claims ask is not judged here
            and all(self.takes(pod.request).any() for pod in pods)
            and (word in {"WaitingForCapacity", NEVER} or not walk.ground.fits(unit))
        )

    def _ask(self, unit: Unit, pods: Sequence[Pod], walk: _Walk) -> bool:
        """Find room on new nodes for those members that need one."""
        if len(pods) > walk.room:
            walk.room = walk.room if len(pods) > walk.window else 0  # nobody passes, unless it can never be its turn
            return False
        if unit.kind in walk.full or not self._pack(pods[walk.ground.placed(unit) :]):
            walk.full.add(unit.kind)
            return False
        return True

    def _again(self, unit: Unit, pods: Sequence[Pod], placed: int) -> tuple[str, ...]:
        """Go on asking; return members that are not asked for yet, as after a kill in the middle."""
        since_us = min(self.asked[uid] for uid in unit.members if uid in self.asked)
        news = tuple(uid for uid in unit.members if uid not in self.asked)
        self.asked |= dict.fromkeys(news, since_us)
        if all(self._coming.held(uid) is None for uid in unit.members):
            self._pack(pods[placed:])  # it was asked for already: what the groups may get does not matter any more
        return news

    def due_s(self, now_s: float, now_us: int) -> float:
        """Return in how many seconds the time alone makes another look worth while; infinite = never."""
        soon = [since_s + AFTER_S - now_s for since_s in self._since.values() if since_s + AFTER_S > now_s]
        late = [since_us / 1e6 + self.timeout_s - now_us / 1e6 for since_us in self.asked.values()]
        return min((*soon, *late), default=float("inf"))


@dataclass(slots=True)
class _Walk:
    """What one look has found so far."""

    quota: Quota
    usage: Usage  # with all that wait before the next one
    ground: Ground
    window: int
    room: int
    since: dict[str, float] = field(default_factory=dict)
    full: set[Hashable] = field(default_factory=set)  # kinds for which the groups get no more nodes


_NONE: frozenset[str] = frozenset()
