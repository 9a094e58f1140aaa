"""What a pod needs and where it fits, by brute force over the API server's own objects.

It shares no code with Tessera: own quantities, own demand formula, own label and taint matching, one pod against one
node at a time. Invariant: it judges what benches make (whole GPUs, CPU-only, selectors, affinity to nodes, taints);
volumes, pod affinity, spread and host ports are kube-scheduler's and never used by a bench.
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

Json = dict[str, Any]

GPU = "nvidia.com/gpu"
PREFIX = "tessera.dev/"
ALLOCATION = PREFIX + "allocation"
SCHEDULER = "tessera"

_SUFFIXES = {"": Fraction(1)}
_SUFFIXES |= {letter: Fraction(1000) ** power for power, letter in enumerate("kMGTPE", start=1)}
_SUFFIXES |= {f"{letter}i": Fraction(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_SUFFIXES |= {letter: Fraction(1000) ** -power for power, letter in enumerate("mun", start=1)}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d+)|([A-Za-z]{0,2}))")
_POD_LEVEL = ("cpu", "memory")

# Product label -> key of the geometry table, for the products that benches put on nodes.
_KEYS = {
    "nvidia-h100-80gb-hbm3": "h100-80",
    "nvidia-a100-sxm4-80gb": "a100-80",
    "nvidia-a100-sxm4-40gb": "a100-40",
}


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
    entry, product = entry.strip().lower(), product.lower()
    key = _KEYS.get(product, product)
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
    """Say whether only ordinary init containers ask for GPUs; exact nodes refuse such pods."""
    inits = pod["spec"].get("initContainers") or ()
    lasting = [*pod["spec"]["containers"], *(one for one in inits if one.get("restartPolicy") == "Always")]
    return demand(pod)[GPU] > 0 and not any(requests(one)[GPU] for one in lasting)


def _whole_gpus(node: Json) -> bool:
    have = labels(node)
    shared = have.get(GPU + ".product", "").endswith("-SHARED") or have.get("nvidia.com/mig.strategy") == "single"
    return not shared and int(have.get(GPU + ".replicas", "1")) <= 1


def forbidden(pod: Json, node: Json, gpus: int) -> str:
    """Return why this pod, which asks `gpus` in all, can never run on this node; empty when it could, given room."""
    if not _selected(pod, node):
        return "selector"
    if _untolerated(pod, node):
        return "taint"
    if not gpus:
        return ""
    if not _whole_gpus(node):
        return "not whole"
    wanted = [one for one in annotation(pod, PREFIX + "gpu-model").split(",") if one.strip()]
    product = labels(node).get(GPU + ".product", "")
    if wanted and not any(model_matches(one, product) for one in wanted):
        return "model"
    return "init only" if exact(node) and init_only(pod) else ""


def held_devices(allocation: Json) -> list[Json]:
    """Return every device or count that an allocation names, over all its containers."""
    containers = allocation.get("containers")
    lists = containers.values() if isinstance(containers, dict) else ()
    return [one for grants in lists if isinstance(grants, list) for one in grants if isinstance(one, dict)]


@dataclass(slots=True)
class Room:
    """What is free on one node; `devices` None where a count is all that is known (observed nodes)."""

    node: Json
    free: Counter[str]
    pods: int
    devices: set[int] | None
    strangers: bool = False  # a pod without an allocation holds GPUs here

    def misfit(self, needs: Counter[str]) -> str:
        """Return what is short for a pod of this demand, empty when it fits now."""
        if self.pods < 1:
            return "pods"
        for name, count in needs.items():
            if count > self.free[name]:
                return name
        if self.devices is None or not needs[GPU]:
            return ""
        if self.strangers:
            return "stranger"
        return "" if needs[GPU] <= len(self.devices) else "devices"


@dataclass(slots=True)
class Oracle:
    """A cluster at one moment, every pod that runs in it booked on its node."""

    rooms: dict[str, Room] = field(default_factory=dict)

    def judge(self, pod: Json) -> list[str]:
        """Return the names of all nodes on which an unbound pod fits now."""
        needs = demand(pod)
        return [
            name
            for name, room in self.rooms.items()
            if not room.misfit(needs) and not forbidden(pod, room.node, needs[GPU])
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
        if room is None or terminal(pod):
            continue
        needs = demand(pod)
        room.free.subtract(needs)
        room.pods -= 1
        held = {one.get("dev") for one in held_devices(allocations.get(pod["metadata"]["uid"], {}))}
        if room.devices is not None:
            room.devices -= held
            room.strangers |= bool(needs[GPU]) and not held
    return oracle


def _empty(node: Json) -> Room:
    free = amounts(node["status"]["allocatable"])
    return Room(node, free, free.pop("pods", 0), set(range(free[GPU])) if exact(node) else None)
