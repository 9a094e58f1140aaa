"""What a pod needs and where it fits, by brute force over the API server's own objects.

It shares no code with Tessera: own quantities, own demand formula, own label and taint matching, one pod against one
node at a time. Invariant: it judges what benches make (whole GPUs, MIG slices, shares, CPU-only, selectors, affinity to
nodes, taints); volumes, pod affinity, spread and host ports are kube-scheduler's and never used by a bench.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from bench.devices import GPU, SHARE, Ask, Device, devices_of, fits
from bench.geometry import MIG, card, plain

Json = dict[str, Any]

PREFIX = "tessera.dev/"
ALLOCATION = PREFIX + "allocation"
SCHEDULER = "tessera"

_SUFFIXES = {"": Fraction(1)}
_SUFFIXES |= {letter: Fraction(1000) ** power for power, letter in enumerate("kMGTPE", start=1)}
_SUFFIXES |= {f"{letter}i": Fraction(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_SUFFIXES |= {letter: Fraction(1000) ** -power for power, letter in enumerate("mun", start=1)}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d+)|([A-Za-z]{0,2}))")
_POD_LEVEL = ("cpu", "memory")


@functools.cache
def quantity(text: str | float, *, milli: bool = False) -> int:
    """Return a Kubernetes quantity as a whole number, rounded up; in thousandths when `milli`.

    Raises:
        ValueError: it is no quantity.
    """
    found = _QUANTITY.fullmatch(str(text).strip())
    if found is None or (found[3] or "") not in _SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    scale = Fraction(10) ** int(found[2]) if found[2] else _SUFFIXES[found[3] or ""]
    return math.ceil(Fraction(found[1]) * scale * (1000 if milli else 1))


def amounts(resources: Json | None) -> Counter[str]:
    """Return a resource list as whole numbers: cpu in thousandths, the rest in its own unit."""
    return Counter({name: quantity(value, milli=name == "cpu") for name, value in (resources or {}).items()})


def demand(pod: Json) -> Counter[str]:
    """Return what a pod takes from its node by the demand formula; nothing once it is terminal."""
    if terminal(pod):
        return Counter()
    spec = pod["spec"]
    running = _sum(_container(pod, one, "containerStatuses") for one in spec["containers"])
    peak, before = Counter[str](), Counter[str]()
    for init in spec.get("initContainers") or ():
        asks = _container(pod, init, "initContainerStatuses")
        if init.get("restartPolicy") == "Always":
            before += asks
        else:
            peak |= before + asks
    needs = (running + before) | peak
    level = amounts((spec.get("resources") or {}).get("requests"))
    needs.update({name: level[name] - needs[name] for name in _POD_LEVEL if name in level})
    return needs + amounts(spec.get("overhead"))


def _sum(parts: Iterable[Counter[str]]) -> Counter[str]:
    return sum(parts, Counter[str]())


def _container(pod: Json, container: Json, statuses: str) -> Counter[str]:
    """Return one container's requests; while it is resized in place, the most of spec, allocated and current."""
    asks = requests(container)
    for status in (pod.get("status") or {}).get(statuses) or ():
        if status.get("name") == container["name"]:
            asks |= amounts(status.get("allocatedResources")) | amounts((status.get("resources") or {}).get("requests"))
    return asks


def requests(container: Json) -> Counter[str]:
    """Return what a container's spec requests; a limit without a request is one."""
    resources = container.get("resources") or {}
    return amounts({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def terminal(pod: Json) -> bool:
    """Say whether the pod has ended and holds nothing."""
    return (pod.get("status") or {}).get("phase") in {"Succeeded", "Failed"}


def bound_to(pod: Json) -> str:
    """Return the node a pod is bound to, or an empty string."""
    return str(pod["spec"].get("nodeName") or "")


def ours(pod: Json) -> bool:
    """Say whether Tessera answers for the pod."""
    return bool(pod["spec"].get("schedulerName") == SCHEDULER)


def annotation(pod: Json, key: str) -> str:
    """Return an annotation's text, empty when absent."""
    return str((pod["metadata"].get("annotations") or {}).get(key, ""))


def labels(thing: Json) -> dict[str, str]:
    """Return an object's labels."""
    return thing["metadata"].get("labels") or {}


def exact(node: Json) -> bool:
    """Say whether Tessera chooses the devices on this node."""
    return labels(node).get(PREFIX + "mode") == "exact"


def model_matches(entry: str, product: str) -> bool:
    """Say whether one entry of gpu-model names the product: key, family, whole label or a whole token of it."""
    known = card(product)
    entry, product = entry.strip().lower(), plain(product).lower()
    key = known.key.lower() if known else product
    return entry in (key, product) or key.startswith(entry + "-") or entry in product.split("-")


def _expression_holds(expression: Json, have: dict[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    there = key in have
    match operator:
        case "In":
            return there and have[key] in values
        case "NotIn":
            return not there or have[key] not in values
        case "Exists":
            return there
        case "DoesNotExist":
            return not there
        case "Gt" | "Lt":
            if not there or re.fullmatch(r"[+-]?\d+", have[key]) is None:
                return False
            return int(have[key]) > int(values[0]) if operator == "Gt" else int(have[key]) < int(values[0])
        case _:
            raise ValueError(f"operator {operator!r} is none of Kubernetes'")


def _selected(pod: Json, node: Json) -> bool:
    have = labels(node)
    wants = pod["spec"].get("nodeSelector") or {}
    if any(have.get(key) != value for key, value in wants.items()):
        return False
    affinity = ((pod["spec"].get("affinity") or {}).get("nodeAffinity")) or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    fields = {"metadata.name": node["metadata"]["name"]}
    return any(_term_holds(term, have, fields) for term in required["nodeSelectorTerms"])


def _term_holds(term: Json, have: dict[str, str], fields: dict[str, str]) -> bool:
    on_labels, on_fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    if not on_labels and not on_fields:
        return False
    return all(_expression_holds(one, have) for one in on_labels) and all(
        _expression_holds(one, fields) for one in on_fields
    )


def _tolerates(toleration: Json, taint: Json) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return True
    return bool(toleration.get("key")) and toleration.get("value", "") == taint.get("value", "")


def _untolerated(pod: Json, node: Json) -> bool:
    taints = [one for one in node["spec"].get("taints") or () if one["effect"] in {"NoSchedule", "NoExecute"}]
    if node["spec"].get("unschedulable"):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    tolerations = pod["spec"].get("tolerations") or ()
    return any(not any(_tolerates(one, taint) for one in tolerations) for taint in taints)


def init_only(pod: Json) -> bool:
    """Say whether only ordinary init containers ask for devices; exact nodes refuse such pods."""
    inits = pod["spec"].get("initContainers") or ()
    lasting = [*pod["spec"]["containers"], *(one for one in inits if one.get("restartPolicy") == "Always")]
    return _asks_devices(demand(pod)) and not any(_asks_devices(requests(one)) for one in lasting)


def _asks_devices(needs: Counter[str]) -> bool:
    return any(count and is_device(name) for name, count in needs.items())


def is_device(resource: str) -> bool:
    """Say whether a resource counts whole GPUs, MIG slices or shares."""
    return resource in {GPU, SHARE} or resource.startswith(MIG)


def device_ask(pod: Json) -> Ask:
    """Return what a pod asks of devices, as if it had not ended."""
    asked = {name: count for name, count in demand({**pod, "status": {}}).items() if is_device(name) and count}
    memory, milli = annotation(pod, PREFIX + "gpu-memory"), annotation(pod, PREFIX + "gpu-milli")
    if len(asked) > 1:
        return Ask(*max(asked.items()), flaw="mixed devices")
    if bool(memory or milli) != (SHARE in asked):
        return Ask(*next(iter(asked.items()), ("", 0)), flaw="share without size, or size without share")
    if not asked:
        return Ask()
    mib = -(-quantity(memory) // (1 << 20)) if memory else 0
    return Ask(*next(iter(asked.items())), milli=int(milli or 0), mib=mib, parts=_parts(pod) if SHARE in asked else ())


def _parts(pod: Json) -> tuple[int, ...]:
    """Return the shares of each container; nothing where an ordinary init container asks too.

    That one uses shares of the others and could find two of them on one device, so all of the pod's are apart.
    """
    inits = pod["spec"].get("initContainers") or []
    if any(requests(one)[SHARE] for one in inits if one.get("restartPolicy") != "Always"):
        return ()
    return tuple(count for one in [*pod["spec"]["containers"], *inits] if (count := requests(one)[SHARE]))


def _undivided(node: Json) -> bool:
    """Say whether `nvidia.com/gpu` is a whole GPU on an observed node."""
    have = labels(node)
    product = have.get(GPU + ".product", "")
    parts = plain(product) != product or have.get("nvidia.com/mig.strategy") == "single"
    return not parts and int(have.get(GPU + ".replicas", "1")) <= 1


def forbidden(pod: Json, node: Json, ask: Ask | None = None) -> str:
    """Return why this pod can never run on this node; empty when it could, were the node idle or larger.

    Args:
        pod: the pod.
        node: the node.
        ask: its `device_ask`, where the caller has it at hand.
    """
    if not _selected(pod, node):
        return "selector"
    if _untolerated(pod, node):
        return "taint"
    ask = ask or device_ask(pod)
    if not ask.resource and not ask.flaw:
        return ""
    wanted = [one for one in annotation(pod, PREFIX + "gpu-model").split(",") if one.strip()]
    product = labels(node).get(GPU + ".product", "")
    if wanted and not any(model_matches(one, product) for one in wanted):
        return "model"
    return ask.flaw or _wrong_kind(pod, node, ask)


def _wrong_kind(pod: Json, node: Json, ask: Ask) -> str:
    """Return why a node cannot serve this kind of ask, whatever is free."""
    if exact(node):
        return "init only" if init_only(pod) else ""
    if ask.kind == "share":
        return "sharing"
    return "not whole" if ask.kind == "whole" and not _undivided(node) else ""


def held_devices(allocation: Json) -> list[Json]:
    """Return every device or count that an allocation names, over all its containers."""
    containers = allocation.get("containers")
    lists = containers.values() if isinstance(containers, dict) else ()
    return [one for grants in lists if isinstance(grants, list) for one in grants if isinstance(one, dict)]


def distinct(allocation: Json) -> list[Json]:
    """Return what an allocation takes of devices, each once: containers name a whole GPU or a slice again to reuse it.

    Shares count as often as they are named: two containers may hold shares of one device.
    """
    once = {}
    for place, grant in enumerate(held_devices(allocation)):
        once[place if grant.get("kind") == "share" else (grant.get("dev"), grant.get("start", -1))] = grant
    return list(once.values())


@dataclass(slots=True)
class Room:
    """What is free on one node; `devices` None where a count is all that is known (observed nodes)."""

    node: Json
    free: Counter[str]
    pods: int
    devices: list[Device] | None
    strangers: bool = False  # a pod without an allocation holds devices here

    def misfit(self, needs: Counter[str], ask: Ask) -> str:
        """Return what is short for a pod of this demand, empty when it fits now."""
        if self.pods < 1:
            return "pods"
        for name, count in needs.items():
            if count > self.free[name]:
                return name
        if self.devices is None or not ask.count:
            return ""
        if self.strangers:
            return "stranger"
        return "" if fits(self.devices, ask) else "devices"

    def take(self, pod: Json, allocation: Json) -> None:
        """Book a pod that runs here."""
        needs = demand(pod)
        self.free.subtract(needs)
        self.pods -= 1
        if self.devices is None:
            return
        held = distinct(allocation)
        for grant in held:
            if isinstance(grant.get("dev"), int) and 0 <= grant["dev"] < len(self.devices):
                self.devices[grant["dev"]].take(grant)
        self.strangers |= _asks_devices(needs) and not held


@dataclass(slots=True)
class Oracle:
    """A cluster at one moment, every pod that runs in it booked on its node."""

    rooms: dict[str, Room] = field(default_factory=dict)

    def judge(self, pod: Json) -> list[str]:
        """Return the names of all nodes on which an unbound pod fits now."""
        needs, ask = demand(pod), device_ask(pod)
        return [
            name
            for name, room in self.rooms.items()
            if not room.misfit(needs, ask) and not forbidden(pod, room.node, ask)
        ]


def observe(nodes: Sequence[Json], pods: Sequence[Json], allocations: dict[str, Json]) -> Oracle:
    """Book every bound, unfinished pod.

    Args:
        nodes: Node objects.
        pods: all pods of the cluster, whoever schedules them.
        allocations: parsed allocations by pod UID.
    """
    oracle = Oracle({node["metadata"]["name"]: _empty(node) for node in nodes})
    for pod in pods:
        room = oracle.rooms.get(bound_to(pod))
        if room is not None and not terminal(pod):
            room.take(pod, allocations.get(pod["metadata"]["uid"], {}))
    return oracle


def _empty(node: Json) -> Room:
    free = amounts(node["status"]["allocatable"])
    return Room(node, free, free.pop("pods", 0), devices_of(labels(node), free[GPU]) if exact(node) else None)
