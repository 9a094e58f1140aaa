"""Order and quota by brute force, from the published rules alone: who may go before whom, and what a queue may hold.

Nothing of Tessera is imported. A tree is looked at whole, key by key, whenever somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench.allocations import read_allocation
from bench.oracle import (
    Json,
    Oracle,
    bound_to,
    demand,
    device_ask,
    distinct,
    forbidden,
    labels,
    model_matches,
    observe,
    ours,
    quantity,
    terminal,
)

GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-"
SHARE = "tessera.dev/share"
QUEUE = "tessera.dev/queue"
GATE = "tessera.dev/hold"
MIB = 1 << 20
LATE_US, BACK_OFF_US = 2_000_000, 310_000_000
PLAIN = ("gpu", "milli", "cpu", "memory")
LIMITS = ("nominal", "borrowLimit", "lendLimit")


@dataclass(frozen=True, slots=True)
class Tree:
    """Queues as their documents say: specs by name, amounts as whole numbers (thousandths of cores, MiB)."""

    specs: dict[str, Json] = field(default_factory=dict)

    def children(self, name: str) -> list[str]:
        """Return the queues right below."""
        return [one for one, spec in self.specs.items() if spec.get("parent") == name]

    def leaves(self) -> list[str]:
        """Return the queues that have none below, sorted."""
        return sorted(name for name in self.specs if not self.children(name))

    def keys(self) -> set[str]:
        """Return all keys that any queue lists."""
        return {key for spec in self.specs.values() for limit in LIMITS for key in spec[limit]}

    def limited(self, name: str, key: str) -> bool:
        """Say whether the queue or one above lists the key."""
        spec = self.specs.get(name)
        return spec is not None and (any(key in spec[one] for one in LIMITS) or self.limited(spec["parent"], key))

    def brings(self, name: str, key: str) -> int:
        """Return what a queue has with what those below lend."""
        own: int = self.specs[name]["nominal"].get(key, 0)
        return own + sum(self.brings(one, key) - self.keeps(one, key) for one in self.children(name))

    def keeps(self, name: str, key: str) -> int:
        """Return what a queue lends to nobody."""
        lend = self.specs[name]["lendLimit"].get(key)
        return 0 if lend is None else max(self.brings(name, key) - lend, 0)

    def stands(self, held: Counter[tuple[str, str]], name: str, key: str) -> int:
        """Return what stands against a queue: its own, and of those below what they do not keep."""
        below = sum(max(self.stands(held, one, key) - self.keeps(one, key), 0) for one in self.children(name))
        return (held[name, key] if self.limited(name, key) else 0) + below

    def most(self, name: str, key: str) -> int | None:
        """Return the most that may stand against a queue; None = it may borrow without limit."""
        spec = self.specs[name]
        limit = spec["borrowLimit"].get(key) if spec["parent"] else 0
        return None if limit is None else self.brings(name, key) + limit

    def beyond(self, held: Counter[tuple[str, str]], queue: str, key: str) -> str:
        """Return the first queue on the path that has more than it may, and how much; empty = none."""
        if not self.limited(queue, key):
            return ""
        while queue in self.specs:
            most, there = self.most(queue, key), self.stands(held, queue, key)
            if most is not None and there > most:
                return f"queue {queue} has {there} {key} of {most}"
            queue = self.specs[queue]["parent"]
        return ""


def read_queues(path: Path | None) -> Tree:
    """Read queue documents; None = no queues."""
    if path is None:
        return Tree()
    specs = {}
    for document in yaml.safe_load_all(path.read_text()):
        if document:
            spec = document.get("spec") or {}
            limits = {one: {key: _amount(key, text) for key, text in (spec.get(one) or {}).items()} for one in LIMITS}
            specs[document["metadata"]["name"]] = {"parent": spec.get("parent") or "", **limits}
    return Tree(specs)


def _amount(key: str, text: str | int) -> int:
    if key == "cpu":
        return quantity(text, milli=True)
    return quantity(text) // MIB if key == "memory" else quantity(text)


def charge(pod: Json, node: Json | None, keys: Iterable[str], allocation: Json | None = None) -> Counter[str]:
    """Return what a pod takes of these keys on a node (None = not known yet)."""
    needs, ask = demand(pod), device_ask(pod)
    found = Counter({"cpu": needs["cpu"], "memory": -(-needs["memory"] // MIB)})
    if ask.kind == "whole":
        found["gpu"] = ask.count
        product = labels(node).get(GPU + ".product", "") if node else ""
        found.update({key: ask.count for key in keys if _is_model(key) and product and model_matches(key, product)})
    elif ask.kind == "mig":
        found["mig:" + _profile(ask.resource, keys)] = ask.count
    elif ask.kind == "share":
        held = [grant["milli"] for grant in distinct(allocation or {}) if grant.get("kind") == "share"]
        found["milli"] = sum(held) if held and not ask.milli else ask.count * max(ask.milli, 1)
    return found


def _is_model(key: str) -> bool:
    return key not in PLAIN and ":" not in key


def _profile(resource: str, keys: Iterable[str]) -> str:
    """Return a profile as queues spell it: the resource name has "." where that has "+"."""
    written = resource.removeprefix(MIG)
    known = {key.removeprefix("mig:").replace("+", "."): key.removeprefix("mig:") for key in keys}
    return known.get(written, written)


def alive(pod: Json) -> Json:
    """Return the pod as it was before it ended: one that has ended asks for nothing."""
    return {**pod, "status": {**(pod.get("status") or {}), "phase": "Running"}}


def queue_of(pod: Json) -> str:
    """Return the name of a pod's queue."""
    return labels(pod).get(QUEUE, "default")


def rank(pod: Json) -> tuple[int, str, str, str]:
    """Return a pod's place in its queue: priority, age, name."""
    meta = pod["metadata"]
    return (
        -(pod["spec"].get("priority") or 0),
        meta.get("creationTimestamp", ""),
        meta.get("namespace", ""),
        meta["name"],
    )


@dataclass(slots=True)
class Rule:
    """Who may pass whom, on the nodes of one cluster."""

    nodes: Mapping[str, Json]
    tree: Tree = field(default_factory=Tree)
    _empty: Oracle = field(init=False)
    _could: dict[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make every node empty."""
        self._empty = observe(list(self.nodes.values()), [], {})

    def could(self, pod: Json) -> frozenset[str]:
        """Return the nodes that a pod could use, were they empty."""
        uid = pod["metadata"]["uid"]
        if uid not in self._could:
            needs, ask = demand(alive(pod)), device_ask(pod)
            self._could[uid] = frozenset(
                name
                for name, room in self._empty.rooms.items()
                if not forbidden(pod, room.node, ask) and not room.misfit(needs, ask)
            )
        return self._could[uid]

    def free_to(
        self, pod: Json, fits: Iterable[str], waiting: Sequence[Json], held: Counter[tuple[str, str]]
    ) -> list[str]:
        """Return on which of these nodes nobody before a pod, and no quota, keeps it from running.

        Args:
            pod: who waits.
            fits: nodes with room for it.
            waiting: all that wait.
            held: what is held by queue and key.
        """
        queue = queue_of(pod)
        before = [one for one in waiting if queue_of(one) == queue and rank(one) < rank(pod) and self.could(one)]
        before = [one for one in before if not self.never(one)]
        taken = frozenset[str]().union(*(self.could(one) for one in before))
        return [name for name in fits if name not in taken and not self._short(pod, name, before, held)]

    def never(self, pod: Json) -> bool:
        """Say whether a pod asks for more than its queue could ever have."""
        return bool(self._lacks(queue_of(pod), charge(pod, None, self.tree.keys()), Counter()))

    def _short(self, pod: Json, name: str, before: Sequence[Json], held: Counter[tuple[str, str]]) -> bool:
        """Say whether a pod's queue lacks quota for it beside those before it, on this node."""
        queue, keys = queue_of(pod), self.tree.keys()
        with_them = held.copy()
        for one in before:
            nodes = [charge(one, self.nodes[node], keys) for node in self.could(one)]
            for key in keys:
                with_them[queue, key] += max((there[key] for there in nodes), default=0)
        return bool(self._lacks(queue, charge(pod, self.nodes[name], keys), with_them))

    def _lacks(self, queue: str, needs: Counter[str], held: Counter[tuple[str, str]]) -> str:
        after = held.copy()
        after.update({(queue, key): amount for key, amount in needs.items()})
        return next(
            (why for key, amount in needs.items() if amount and (why := self.tree.beyond(after, queue, key))), ""
        )


def violations(lines: Iterable[Json], pods: Mapping[str, Json], nodes: Mapping[str, Json], tree: Tree) -> list[str]:
    """Return each reservation by which a queue came to hold more than it may; a pod found bound is booked anyway.

    Args:
        lines: the journal.
        pods: by uid; a pod that is gone is charged by its line.
        nodes: by name.
        tree: the queues.
    """
    keys, held, charged = tree.keys(), Counter[tuple[str, str]](), dict[str, Counter[tuple[str, str]]]()
    found: list[str] = []
    for line in lines:
        uid, queue = str(line.get("request")), str(line.get("queue"))
        takes = line.get("to") in {"RESERVED", "BINDING", "BOUND", "RUNNING", "RECLAIMING"}
        if takes and uid in charged and not (line.get("allocation") and line.get("event") != "reserve"):
            continue
        held.subtract(charged.pop(uid, Counter()))
        if takes:
            needs = _needs(line, pods.get(uid), nodes, keys)
            charged[uid] = Counter({(queue, key): amount for key, amount in needs.items()})
            held.update(charged[uid])
            if line.get("event") in {"reserve", "bind"}:
                why = (tree.beyond(held, queue, key) for key in keys if needs[key])
                found += [f"line {line.get('seq')}: {line.get('name')}: {one}" for one in why if one]
    return found


def waiting_pods(pods: Iterable[Json]) -> list[Json]:
    """Return our pods that are neither bound nor ended nor being deleted."""
    ended = (terminal, bound_to, lambda pod: pod["metadata"].get("deletionTimestamp"))
    return [pod for pod in pods if ours(pod) and not any(over(pod) for over in ended)]


def runnable(pods: Sequence[Json], oracle: Oracle, rule: Rule, allocations: Mapping[str, Json]) -> dict[str, list[str]]:
    """Return who waits though order, quota and room would let it run now: its nodes by uid.

    Args:
        pods: all pods of ours.
        oracle: the nodes as they are.
        rule: nodes and queues.
        allocations: by uid.
    """
    waiting = waiting_pods(pods)
    runs = [pod for pod in pods if ours(pod) and bound_to(pod) and not terminal(pod)]
    held = held_now(runs, rule.nodes, rule.tree.keys(), allocations)
    found = {}
    for pod in waiting:
        other = {one["name"] for one in pod["spec"].get("schedulingGates") or ()} - {GATE}
        fits = [] if other else oracle.judge(pod)
        found[pod["metadata"]["uid"]] = rule.free_to(pod, fits, waiting, held) if fits else []
    return {uid: nodes for uid, nodes in found.items() if nodes}


def held_now(
    pods: Iterable[Json], nodes: Mapping[str, Json], keys: Iterable[str], allocations: Mapping[str, Json]
) -> Counter[tuple[str, str]]:
    """Return what these pods, which are bound and have not ended, hold by queue and key."""
    held = Counter[tuple[str, str]]()
    for pod in pods:
        there = charge(pod, nodes.get(pod["spec"]["nodeName"]), keys, allocations.get(pod["metadata"]["uid"]))
        held.update({(queue_of(pod), key): amount for key, amount in there.items()})
    return held


def _needs(line: Json, pod: Json | None, nodes: Mapping[str, Json], keys: Iterable[str]) -> Counter[str]:
    told = line.get("allocation") or {}
    allocation = told if isinstance(told, dict) else read_allocation(str(told)) or {}
    node = nodes.get(str(line.get("node")))
    if pod is not None:
        return charge(alive(pod), node, keys, allocation)
    found = Counter({"cpu": int(line.get("cpu_milli", 0)), "memory": int(line.get("memory_mib", 0))})
    product = labels(node).get(GPU + ".product", "") if node else ""
    for grant in distinct(allocation):
        count, kind = int(grant.get("count", 1)), grant.get("kind")
        if kind == "mig":
            found["mig:" + str(grant.get("profile"))] += count
        elif kind == "share":
            found["milli"] += int(grant.get("milli", 0)) * count
        else:
            found["gpu"] += count
            found.update({key: count for key in keys if _is_model(key) and product and model_matches(key, product)})
    return found


def misordered(lines: Iterable[Json], pods: Mapping[str, Json], rule: Rule) -> list[str]:
    """Return each reservation that passed somebody who was before it, waited, and could have used that node.

    Who began to wait, or to back off, less than two seconds ago is passed over: the turn may have lined up before.

    Args:
        lines: the journal.
        pods: by uid; held pods alone: of one without the gate the journal does not tell when kube-scheduler gave it
            back, nor whether it has asked again since Tessera was away.
        rule: who may pass whom.
    """
    waits: dict[str, int] = {}
    found: list[str] = []
    for line in lines:
        uid, at = str(line.get("request")), int(line.get("at", 0))
        pod = pods.get(uid)
        if line.get("event") == "reserve" and pod is not None:
            for other, since in waits.items():
                first = pods[other]
                if at - since < LATE_US or queue_of(first) != queue_of(pod) or rank(first) >= rank(pod):
                    continue
                if line.get("node") in rule.could(first) and not rule.never(first):
                    names = f"{pod['metadata']['name']} passed {first['metadata']['name']}"
                    found.append(f"line {line.get('seq')}: {names} to {line.get('node')}")
        if line.get("to") == "QUEUED" and pod is not None:
            waits[uid] = at + (BACK_OFF_US if line.get("event") == "void" else 0)
        else:
            waits.pop(uid, None)
    return found


def was_held(pod: Json) -> bool:
    """Say whether a pod went the queue way: its gate is there, or the condition that was written before it went."""
    gates = [one["name"] for one in pod["spec"].get("schedulingGates") or ()]
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return GATE in gates or any(one.get("type") == "tessera.dev/Admitted" for one in conditions)
