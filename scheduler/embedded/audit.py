"""What an outsider can see to be wrong from the cluster's own objects alone: node list and pod list.

Knows nothing of ledger, inventory or intake: demands and allocations are read here from their published forms. Every
function returns one sentence per finding, in a stable order; an empty list is a clean cluster.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from scheduler import ALLOCATION, GPU, MIG_PREFIX, PREFIX, SCHEDULER_NAME, SHARE
from scheduler.kube.port import Object

_SUFFIXES = {"m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}
_SUFFIXES |= {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)}
_SUFFIXES |= {letter + "i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)}
_KIND_RESOURCES = {"whole": GPU, "share": SHARE}
_NUMBERS = ("dev", "start", "size", "milli", "mib")
_DEVICE_MILLI = 1000

Amounts = dict[str, Decimal]


@dataclass(frozen=True, slots=True)
class Hold:
    """One device, or part of one, that a pod holds on an exact node."""

    pod: str
    uid: str
    container: str
    kind: str
    dev: int
    start: int
    size: int
    milli: int
    mib: int

    def overlaps(self, other: Hold) -> bool:
        """Say whether two MIG slices of one device share a memory slice."""
        return self.start < other.start + other.size and other.start < self.start + self.size


def look(nodes: Sequence[Object], pods: Sequence[Object]) -> list[str]:
    """Return everything that must never be seen at any moment: over-allocations, slice overlaps, doubled devices."""
    return [*over_allocations(nodes, pods), *slice_overlaps(nodes, pods), *doubled(pods)]


def over_allocations(nodes: Sequence[Object], pods: Sequence[Object]) -> list[str]:
    """Return nodes whose pods ask for more than is allocatable, and devices that hold more than one device can.

    Pods on nodes that are not listed are passed over; ended pods hold nothing, pods being deleted still do.
    """
    found: list[str] = []
    holders = _by_node(pods)
    for node in sorted(nodes, key=_name):
        here = holders.get(_name(node), [])
        allocatable = (node.get("status") or {}).get("allocatable") or {}
        asked: Amounts = {"pods": Decimal(len(here))}
        for pod in here:
            asked = _sum(asked, demand(pod))
        for resource in sorted(asked):
            there = _quantity(allocatable.get(resource, 0))
            if asked[resource] > there:
                found.append(f"{_name(node)}: {asked[resource]} {resource} asked of {there}")
        if _is_exact(node):
            found += _crowded(node, here)
    return found


def slice_overlaps(nodes: Sequence[Object], pods: Sequence[Object]) -> list[str]:
    """Return pairs of MIG slices that share memory slices of one device of an exact node."""
    found: list[str] = []
    holders = _by_node(pods)
    for node in sorted((one for one in nodes if _is_exact(one)), key=_name):
        for dev, holds in _by_device(holders.get(_name(node), [])):
            slices = [hold for hold in holds if hold.kind == "mig"]
            found += [
                f"{_name(node)} device {dev}: slices of {one.pod} and {other.pod} overlap"
                for at, one in enumerate(slices)
                for other in slices[at + 1 :]
                if one.overlaps(other)
            ]
    return found


def doubled(pods: Sequence[Object]) -> list[str]:
    """Return pods that hold one device twice, and allocations that two living pods carry."""
    found: list[str] = []
    carriers: dict[str, str] = {}
    for pod in (one for one in pods if _holds(one)):
        for dev, holds in _by_device([pod]):
            if _held_twice(holds):
                found.append(f"{_title(pod)}: holds device {dev} twice")
        name = str((_allocation(pod) or {}).get("id", ""))
        if name and name in carriers:
            found.append(f"{_title(pod)}: carries the allocation {name}, as {carriers[name]} does")
        carriers[name] = _title(pod)
    return found


def unannotated(pods: Sequence[Object]) -> list[str]:
    """Return our bound pods without an allocation that names their node and grants what they ask."""
    found: list[str] = []
    for pod in pods:
        spec = pod["spec"]
        if spec.get("schedulerName") != SCHEDULER_NAME or not spec.get("nodeName"):
            continue
        allocation = _allocation(pod)
        asked = {key: amount for key, amount in demand(pod).items() if amount and _is_device(key)}
        if allocation is None:
            found.append(f"{_title(pod)}: has no readable allocation")
        elif allocation.get("node") != spec["nodeName"]:
            found.append(f"{_title(pod)}: its allocation names another node")
        elif _granted(allocation) != asked:
            found.append(f"{_title(pod)}: its allocation does not grant what it asks")
    return found


def demand(pod: Object) -> Amounts:
    """Return what a pod takes of its node as its spec says, by resource name, in whole units (cpu in cores)."""
    spec = pod["spec"]
    running: Amounts = {}  # sidecars so far
    peak: Amounts = {}
    for container in spec.get("initContainers") or ():
        asks = _requests(container)
        if container.get("restartPolicy") == "Always":
            running, asks = _sum(running, asks), {}
        for resource, amount in _sum(running, asks).items():
            peak[resource] = max(peak.get(resource, Decimal(0)), amount)
    for container in spec.get("containers") or ():
        running = _sum(running, _requests(container))
    total = {key: max(running.get(key, Decimal(0)), peak.get(key, Decimal(0))) for key in {**running, **peak}}
    total |= {key: amount for key, amount in _requests(spec).items() if key in ("cpu", "memory")}
    return _sum(total, {key: _quantity(value) for key, value in (spec.get("overhead") or {}).items()})


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return {key: one.get(key, Decimal(0)) + other.get(key, Decimal(0)) for key in {**one, **other}}


def _requests(container: Object) -> Amounts:
    resources = container.get("resources") or {}
    asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: _quantity(amount) for name, amount in asked.items()}


@lru_cache(maxsize=4096)
def _quantity(written: str | float) -> Decimal:
    """Return a Kubernetes quantity in whole units; what an API server would not have let in counts as nothing."""
    text = str(written)
    suffix = next((text[-length:] for length in (2, 1) if text[-length:] in _SUFFIXES), "")
    try:
        return Decimal(text.removesuffix(suffix)) * _SUFFIXES.get(suffix, Decimal(1))
    except InvalidOperation:
        return Decimal(0)


def _name(one: Object) -> str:
    name: str = one["metadata"]["name"]
    return name


def _title(pod: Object) -> str:
    return f"{pod['metadata'].get('namespace', '')}/{_name(pod)}"


def _is_exact(node: Object) -> bool:
    return bool((node["metadata"].get("labels") or {}).get(PREFIX + "mode") == "exact")


def _is_device(resource: str) -> bool:
    return resource in (GPU, SHARE) or resource.startswith(MIG_PREFIX)


def _holds(pod: Object) -> bool:
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return bool(pod["spec"].get("nodeName")) and not ended


def _by_node(pods: Iterable[Object]) -> dict[str, list[Object]]:
    holders: defaultdict[str, list[Object]] = defaultdict(list)
    for pod in sorted((one for one in pods if _holds(one)), key=_title):
        holders[pod["spec"]["nodeName"]].append(pod)
    return holders


def _allocation(pod: Object) -> Object | None:
    """Return the pod's allocation, None where there is none of the published form."""
    written = (pod["metadata"].get("annotations") or {}).get(ALLOCATION)
    try:
        allocation = json.loads(written) if written else None
    except ValueError:
        return None
    if not isinstance(allocation, dict) or allocation.get("v") != 1:
        return None
    containers = allocation.get("containers")
    if not isinstance(containers, dict) or not all(isinstance(one, list) for one in containers.values()):
        return None
    return allocation if all(_is_grant(grant) for one in containers.values() for grant in one) else None


def _is_grant(grant: object) -> bool:
    return isinstance(grant, dict) and all(isinstance(grant.get(key, 0), int) for key in (*_NUMBERS, "count"))


def _granted(allocation: Object) -> Amounts:
    """Return what an allocation grants, as device resources; a kind that is not known counts under its own name."""
    granted: Amounts = {}
    for grants in allocation["containers"].values():
        for grant in grants:
            kind = str(grant.get("kind"))
            mig = MIG_PREFIX + str(grant.get("profile")).replace("+", ".")
            resource = mig if kind == "mig" else _KIND_RESOURCES.get(kind, kind)
            granted[resource] = granted.get(resource, Decimal(0)) + grant.get("count", 1)
    return granted


def _holds_of(pod: Object) -> Iterator[Hold]:
    """Yield the devices that a pod's allocation names."""
    allocation = _allocation(pod)
    for container, grants in (allocation or {"containers": {}})["containers"].items():
        for grant in grants:
            if "dev" in grant:
                numbers: dict[str, int] = {key: grant.get(key, 0) for key in _NUMBERS}
                yield Hold(_title(pod), pod["metadata"]["uid"], container, str(grant.get("kind")), **numbers)


def _by_device(pods: Iterable[Object]) -> list[tuple[int, list[Hold]]]:
    devices: defaultdict[int, list[Hold]] = defaultdict(list)
    for pod in pods:
        for hold in _holds_of(pod):
            devices[hold.dev].append(hold)
    return sorted(devices.items())


def _crowded(node: Object, pods: Iterable[Object]) -> list[str]:
    """Return the devices of an exact node that hold too much, or that the node does not have."""
    labels = node["metadata"]["labels"]
    allocatable = (node.get("status") or {}).get("allocatable") or {}
    count = int(labels.get("nvidia.com/gpu.count", allocatable.get(GPU, 0)))
    mib = int(labels.get("nvidia.com/gpu.memory", 0))
    found: list[str] = []
    for dev, holds in _by_device(pods):
        where, who = f"{_name(node)} device {dev}", ", ".join(sorted({hold.pod for hold in holds}))
        kinds = {hold.kind for hold in holds}
        if dev >= count:
            found.append(f"{where}: held by {who}, and the node has {count} devices")
        if len(kinds) > 1 or ("whole" in kinds and len({hold.uid for hold in holds}) > 1):
            found.append(f"{where}: held by {who} at once")
        if sum(hold.milli for hold in holds) > _DEVICE_MILLI or (mib and sum(hold.mib for hold in holds) > mib):
            found.append(f"{where}: the shares of {who} are more than one device")
    return found


def _held_twice(holds: Sequence[Hold]) -> bool:
    """Say whether one pod's holds on one device contradict each other; containers may share a device by shares."""
    whole = sum(hold.kind == "whole" for hold in holds)
    shares = Counter(hold.container for hold in holds if hold.kind == "share")
    slices = [hold for hold in holds if hold.kind == "mig"]
    overlap = any(one.overlaps(other) for at, one in enumerate(slices) for other in slices[at + 1 :])
    return whole > 1 or max(shares.values(), default=0) > 1 or overlap
