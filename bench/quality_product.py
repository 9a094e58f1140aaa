"""The product's own decision in a replay: its registry, boards, policies and mix, without desk, queue or API server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.quality_replay import Place
from bench.trace import Machine, Task, node_of, pod_of
from policies.columns import Kind
from scheduler import geometry
from scheduler.decision.board import Boards
from scheduler.decision.catalog import TURN_MASKS, Policies
from scheduler.decision.placing import place
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import Asks, shape
from scheduler.inventory.mix import Arrivals
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.model.allocation import Allocation
from scheduler.model.pod import Pod

BETWEEN_US = 10_000_000
"""Arrivals are so far apart; a day's pods, the half-life of what is learned, are 8,640 of them."""


@dataclass(slots=True)
class Tessera:
    """Places tasks as Tessera would.

    Attributes:
        machines: of the cluster; their names are distinct.
        oracle: tasks whose classes it knows from the start; None learns them from those that come.
        policies: the product's default ones unless told otherwise.
    """

    machines: Sequence[Machine]
    oracle: Sequence[Task] | None
    policies: Policies = field(default_factory=Policies)
    _registry: Registry = field(init=False)
    _asks: Asks = field(init=False)
    _arrivals: Arrivals = field(init=False)
    _boards: Boards = field(init=False)
    _indices: dict[str, int] = field(init=False)
    _pods: dict[Task, Pod] = field(default_factory=dict)
    _came: int = 0

    def __post_init__(self) -> None:
        """Take in the nodes."""
        self._registry = Registry(geometry.placements())
        products = geometry.products()
        for machine in self.machines:
            raw = node_of(machine)
            raw["metadata"] |= {"uid": machine.name, "resourceVersion": "1"}
            node = read_node(raw, products)
            assert node is not None, "a machine of a trace is a node"
            self._registry.put_node(node)
        self._asks = Asks(self._registry)
        self._arrivals = Arrivals(self._asks)
        self._boards = Boards(self.policies)
        self._indices = {machine.name: index for index, machine in enumerate(self.machines)}
        for task in self.oracle or ():
            self._arrivals.learn(self.pod(task).request, 0)

    def pod(self, task: Task) -> Pod:
        """Return the task as a pod that was read from its object."""
        known = self._pods.get(task)
        if known is None:
            raw = pod_of(task, task.name)
            raw["metadata"] |= {"uid": task.name, "resourceVersion": "1"}
            known = self._pods[task] = read_pod(raw)
            assert known.request.refusal is None, known.request.refusal
        return known

    def meet(self, tasks: Sequence[Task]) -> None:
        """Read the pods of these tasks ahead: that is intake, no decision."""
        for task in tasks:
            self.pod(task)

    def place(self, task: Task) -> Place | None:
        """Decide, choose devices and book, as one turn of the queue does for one pod."""
        pod, registry = self.pod(task), self._registry
        self._came += 1
        now_us = self._came * BETWEEN_US if self.oracle is None else 0
        if self.oracle is None:
            self._arrivals.learn(pod.request, now_us)
        mix, layout = self._arrivals.mix(now_us), registry.columns.layout
        snapshot = registry.snapshot()
        board = self._boards.of(shape(pod.request), TURN_MASKS)
        ask = board.ask_for(mix, layout) or self._asks.ask(pod.request)
        best = board.turn(snapshot, ask, mix, layout).best()
        if not len(best):
            return None
        row = int(best[0])
        name = registry.columns.names[row]
        containers = place(snapshot, row, pod.request, ask, node=registry.nodes[name], mix=mix, judged=True)
        uid = f"pod-{self._came}"
        registry.say(uid, Source.CLAIMED, booking(pod, name, Allocation(uid, 1, 1, name, "exact", containers)))
        cards = tuple(grant.dev for _, grants in containers for grant in grants)
        return self._indices[name], cards if ask.kind != Kind.NONE else ()
