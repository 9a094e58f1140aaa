"""What the annotation `tessera.dev/allocation` must say, and when two allocations cannot both be true.

Written from the annotation's published form alone; shares no code with Tessera.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from bench.oracle import (
    ALLOCATION,
    GPU,
    Json,
    annotation,
    bound_to,
    demand,
    exact,
    held_devices,
    labels,
    quantity,
    requests,
)

BYTES_MAX = 8192
_KEYS = {"v", "id", "epoch", "fence", "node", "mode", "containers"}
_MIG_KEYS = {"profile", "start", "size"}
_SHARE_KEYS = {"milli", "mib"}
_EXTRA = {"whole": set[str](), "mig": _MIG_KEYS, "share": _SHARE_KEYS}
_MILLI = 1000


def read_allocation(text: str) -> Json | None:
    """Return an allocation's JSON object; None when the text is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def flaw(pod: Json, node: Json) -> str:
    """Return what is wrong with a bound pod's allocation, empty when it says exactly what it must.

    Args:
        pod: a bound pod of ours; the demand of a finished one is judged as if it still ran.
        node: its node.
    """
    text = annotation(pod, ALLOCATION)
    if not text:
        return "has no allocation"
    if "\n" in text or len(text.encode()) > BYTES_MAX:
        return "is not one line of at most 8 KiB"
    allocation = read_allocation(text)
    if allocation is None or not allocation.keys() >= _KEYS:
        return "is no JSON object with all keys"
    mode = "exact" if exact(node) else "observed"
    said = {"v": 1, "id": pod["metadata"]["uid"], "node": bound_to(pod), "mode": mode}
    for key, value in said.items():
        if allocation[key] != value:
            return f"says {key} {allocation[key]!r}, not {value!r}"
    if not all(type(allocation[key]) is int and allocation[key] >= 1 for key in ("epoch", "fence")):
        return "has no epoch and fence above 0"
    return _form_flaw(allocation, exact(node)) or _count_flaw(pod, allocation["containers"], exact(node))


def _form_flaw(allocation: Json, on_exact: bool) -> str:  # noqa: FBT001 - which of the two published forms
    containers = allocation["containers"]
    if not isinstance(containers, dict) or not all(isinstance(one, list) and one for one in containers.values()):
        return "has containers that are no lists with something in them"
    grants = held_devices(allocation)
    if len(grants) != sum(len(one) for one in containers.values()):
        return "has a grant that is no object"
    for grant in grants:
        if grant.get("kind") not in _EXTRA:
            return f"has a grant of kind {grant.get('kind')!r}"
        needs, may = _grant_keys(str(grant["kind"]), on_exact)
        if not needs <= grant.keys() or not grant.keys() <= needs | may:
            return f"has a grant with keys {sorted(grant)}"
    return ""


def _grant_keys(kind: str, on_exact: bool) -> tuple[set[str], set[str]]:  # noqa: FBT001 - see _form_flaw
    if on_exact:
        return {"kind", "dev"} | _EXTRA[kind], {"uuid"}
    return {"kind", "count"} | ({"profile"} if kind == "mig" else set()), set()


def _count_flaw(pod: Json, containers: Mapping[str, list[Json]], on_exact: bool) -> str:  # noqa: FBT001
    asked = dict(_asked(pod))
    for name in sorted(asked.keys() | containers.keys()):
        has = _size(containers.get(name, []), on_exact)
        if has != asked.get(name, 0):
            return f"gives container {name} {has} GPUs, not {asked.get(name, 0)}"
    needs = demand({**pod, "status": {}})[GPU]
    if on_exact:
        total = len({grant["dev"] for grants in containers.values() for grant in grants})
        return "" if total == needs else f"names {total} devices, not {needs}"
    return ""


def _size(grants: list[Json], on_exact: bool) -> int:  # noqa: FBT001 - see _form_flaw
    return len({one["dev"] for one in grants}) if on_exact else sum(one["count"] for one in grants)


def _asked(pod: Json) -> Iterator[tuple[str, int]]:
    """Yield each container's own GPUs: lasting ones what they ask, ordinary init ones what no lasting one lends."""
    inits = pod["spec"].get("initContainers") or []
    apps = sum(requests(one)[GPU] for one in pod["spec"]["containers"])
    for one in pod["spec"]["containers"]:
        yield one["name"], requests(one)[GPU]
    for place, one in enumerate(inits):
        if one.get("restartPolicy") == "Always":
            yield one["name"], requests(one)[GPU]
            continue
        later = sum(requests(two)[GPU] for two in inits[place:] if two.get("restartPolicy") == "Always")
        yield one["name"], max(0, requests(one)[GPU] - apps - later)


def self_overlap(pod: Json, allocation: Json) -> str:
    """Return which device two containers that run together both hold, empty when none."""
    inits = {one["name"] for one in pod["spec"].get("initContainers") or () if one.get("restartPolicy") != "Always"}
    containers = allocation.get("containers")
    if not isinstance(containers, dict):
        return ""
    lasting = {"containers": {name: grants for name, grants in containers.items() if name not in inits}}
    held = Counter(one["dev"] for one in held_devices(lasting) if one.get("kind") == "whole" and "dev" in one)
    return ", ".join(f"device {dev}" for dev, times in sorted(held.items()) if times > 1)


Fault = tuple[str, str]
"""What is held twice (`device 3`, `nvidia.com/gpu`), and a sentence that says by whom."""


def over_held(node: Json, holders: Mapping[str, Json]) -> list[Fault]:
    """Return what the allocations of different pods take more of than the node has; slices apart.

    Args:
        node: the Node object.
        holders: allocation by pod, all of this node and all in force together.
    """
    return list(_devices_over(node, holders) if exact(node) else _counts_over(node, holders))


def _counts_over(node: Json, holders: Mapping[str, Json]) -> Iterator[Fault]:
    taken: Counter[str] = Counter()
    for allocation in holders.values():
        for grant in held_devices(allocation):
            resource = f"nvidia.com/mig-{grant['profile'].replace('+', '.')}" if "profile" in grant else GPU
            taken[resource] += grant.get("count", 0)
    for resource, count in sorted(taken.items()):
        has = quantity(node["status"]["allocatable"].get(resource, "0"))
        if count > has:
            yield resource, f"{count} of {has} {resource} given to {', '.join(sorted(holders))}"


def _by_device(holders: Mapping[str, Json]) -> dict[int, list[tuple[str, Json]]]:
    taken: dict[int, list[tuple[str, Json]]] = defaultdict(list)
    for pod, allocation in holders.items():
        for grant in {json.dumps(one, sort_keys=True): one for one in held_devices(allocation)}.values():
            if isinstance(grant.get("dev"), int):
                taken[grant["dev"]].append((pod, grant))
    return taken


def _devices_over(node: Json, holders: Mapping[str, Json]) -> Iterator[Fault]:
    has = quantity(node["status"]["allocatable"].get(GPU, "0"))
    for dev, taken in sorted(_by_device(holders).items()):
        pods = sorted({pod for pod, _ in taken})
        kinds = {grant["kind"] for _, grant in taken}
        if not 0 <= dev < has:
            yield f"device {dev}", f"{', '.join(pods)} on a node with {has} devices"
        elif len(kinds) > 1 or (len(pods) > 1 and kinds == {"whole"}) or _shares_over(node, [one for _, one in taken]):
            yield f"device {dev}", f"held by {', '.join(pods)}"


def _shares_over(node: Json, grants: list[Json]) -> bool:
    memory = int(labels(node).get(GPU + ".memory", "0"))
    mib = sum(one.get("mib", 0) for one in grants)
    return sum(one.get("milli", 0) for one in grants) > _MILLI or (memory > 0 and mib > memory)


def slices_overlapping(holders: Mapping[str, Json]) -> list[Fault]:
    """Return MIG instances of one device whose memory slices overlap."""
    faults = []
    for dev, taken in sorted(_by_device(holders).items()):
        slices = [(pod, one["start"], one["start"] + one["size"]) for pod, one in taken if one["kind"] == "mig"]
        for (pod, start, end), (other, begin, stop) in itertools.combinations(slices, 2):
            if start < stop and begin < end:
                faults.append((f"device {dev}", f"slices {start}-{end} of {pod} and {begin}-{stop} of {other}"))
    return faults


def parsed(pods: list[Json]) -> dict[str, Any]:
    """Return the readable allocations of pods, by pod UID."""
    found = {pod["metadata"]["uid"]: read_allocation(annotation(pod, ALLOCATION)) for pod in pods}
    return {uid: allocation for uid, allocation in found.items() if allocation is not None}
