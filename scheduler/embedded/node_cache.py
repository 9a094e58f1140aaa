"""kube-scheduler's view of the nodes: what each has, what its pods take, and what is held for nominated pods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from scheduler.intake.node import read_node
from scheduler.intake.quantity import QuantityError, milli, whole
from scheduler.inventory.selection import admits
from scheduler.kube.port import Object
from scheduler.model.node import Node
from scheduler.model.pod import Pod, Selection

PODS = "pods"
_ADMITTED_KEPT = 256  # distinct selections whose answers are remembered
MISPLACED = "node(s) didn't match Pod's node affinity/selector, taints or cordon"


def needs_of(pod: Pod) -> dict[str, int]:
    """Return what a pod takes from its node by resource name; cpu in thousandths, `pods` 1."""
    amounts = pod.request.amounts
    core = {"cpu": amounts.cpu_milli, "memory": amounts.memory_bytes, "ephemeral-storage": amounts.storage_bytes}
    taken = {**core, **dict(amounts.extended), **dict(pod.tokens)}
    return {PODS: 1, **{name: amount for name, amount in taken.items() if amount}}


def allocatable_of(node: Object) -> dict[str, int]:
    """Return what a node has by resource name; a quantity that cannot be read counts as nothing."""
    has: dict[str, int] = {}
    for name, written in ((node.get("status") or {}).get("allocatable") or {}).items():
        try:
            has[name] = milli(written) if name == "cpu" else whole(written)
        except QuantityError:
            has[name] = 0
    return has


@dataclass(frozen=True, slots=True)
class Held:
    """Room that a pod takes, or that is held for it, on a node."""

    node: str
    needs: Mapping[str, int]
    priority: int = 0
    assumed: bool = False


@dataclass(eq=False, slots=True)
class Room:
    """One node: what it has and what is taken."""

    node: Node
    has: dict[str, int]
    taken: dict[str, int] = field(default_factory=dict)


class NodeCache:
    """Nodes with their pods, assumed ones included, and the nominated pods."""

    def __init__(self) -> None:
        """Start empty."""
        self.rooms: dict[str, Room] = {}
        self._pods: dict[str, Held] = {}
        self._taken: dict[str, dict[str, int]] = {}  # also for nodes not seen yet
        self._nominated: dict[str, Held] = {}
        self._nominated_on: dict[str, dict[str, Held]] = {}
        self._admitted: dict[Selection, dict[str, bool]] = {}

    def put_node(self, raw: Object) -> None:
        """Take in a node's new state."""
        node = read_node(raw, {})
        if node is None:
            return
        self.rooms[node.name] = Room(node, allocatable_of(raw), self._taken.setdefault(node.name, {}))
        for answers in self._admitted.values():
            answers.pop(node.name, None)

    def remove_node(self, name: str) -> None:
        """Forget a node; its pods stay until they are deleted."""
        self.rooms.pop(name, None)
        for answers in self._admitted.values():
            answers.pop(name, None)

    def put_pod(self, uid: str, node: str, needs: Mapping[str, int], *, assumed: bool = False) -> None:
        """Count a pod on a node, instead of where it was counted before."""
        self.remove_pod(uid)
        self._pods[uid] = Held(node, needs, assumed=assumed)
        self._add(node, needs, 1)

    def remove_pod(self, uid: str) -> None:
        """Stop counting a pod."""
        held = self._pods.pop(uid, None)
        if held is not None:
            self._add(held.node, held.needs, -1)

    def forget(self, uid: str) -> None:
        """Stop counting a pod if it was only assumed."""
        if self.is_assumed(uid):
            self.remove_pod(uid)

    def is_assumed(self, uid: str) -> bool:
        """Say whether a pod is counted though nobody has seen it bound yet."""
        return uid in self._pods and self._pods[uid].assumed

    def nominate(self, uid: str, node: str, priority: int, needs: Mapping[str, int]) -> None:
        """Hold room for a pod; an empty node ends that."""
        held = self._nominated.pop(uid, None)
        if held is not None:
            del self._nominated_on[held.node][uid]
        if node:
            new = self._nominated[uid] = Held(node, needs, priority)
            self._nominated_on.setdefault(node, {})[uid] = new

    def judge(self, pod: Pod, needs: Mapping[str, int]) -> Callable[[str], list[str]]:
        """Return what says why a node does not take the pod, in kube-scheduler's words; an empty list when it does."""
        selection, asked = pod.request.selection, tuple(needs.items())
        admitted = self._answers(selection)
        priority, uid = pod.request.priority, pod.uid

        def refusals(name: str) -> list[str]:
            room = self.rooms[name]
            admits_pod = admitted.get(name)
            if admits_pod is None:
                admits_pod = admitted[name] = admits(selection, room.node)
            if not admits_pod:
                return [MISPLACED]
            has, taken = room.has, room.taken
            nominated = self._nominated_on.get(name)
            if nominated:
                held = [one.needs for key, one in nominated.items() if key != uid and one.priority >= priority]
                taken = {key: taken.get(key, 0) + sum(one.get(key, 0) for one in held) for key in needs}
            return [
                "Too many pods" if resource == PODS else f"Insufficient {resource}"
                for resource, amount in asked
                if amount > has.get(resource, 0) - taken.get(resource, 0)
            ]

        return refusals

    def least_allocated(self, needs: Mapping[str, int], name: str) -> int:
        """Score a node 0..100: the more cpu and memory are left, the better."""
        room = self.rooms[name]
        shares = [
            (has - room.taken.get(resource, 0) - needs.get(resource, 0)) * 100 // has
            for resource, has in ((resource, room.has.get(resource, 0)) for resource in ("cpu", "memory"))
            if has > 0
        ]
        return sum(max(share, 0) for share in shares) // max(len(shares), 1)

    def names(self, start: int) -> Iterator[str]:
        """Yield all node names once, beginning with the one at `start`."""
        names = list(self.rooms)
        yield from names[start:]
        yield from names[:start]

    def _add(self, node: str, needs: Mapping[str, int], sign: int) -> None:
        taken = self._taken.setdefault(node, {})
        for resource, amount in needs.items():
            taken[resource] = taken.get(resource, 0) + sign * amount

    def _answers(self, selection: Selection) -> dict[str, bool]:
        """Return what is known of where a selection admits, to read and to add to; filled anew after node changes."""
        answers = self._admitted.get(selection)
        if answers is None:
            if len(self._admitted) >= _ADMITTED_KEPT:
                self._admitted.clear()
            answers = self._admitted[selection] = {}
        return answers
