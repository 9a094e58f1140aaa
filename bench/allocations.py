"""What the annotation `tessera.dev/allocation` must say, and when two allocations cannot both be true.

Written from the annotation's published form alone; shares no code with Tessera.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from bench.devices import GPU, Ask, Device, devices_of, slice_faults
from bench.geometry import card, resource_of
from bench.oracle import (
    ALLOCATION,
    Json,
    annotation,
    bound_to,
    device_ask,
    distinct,
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
    ask = device_ask(pod)
    return (
        _form_flaw(allocation, exact(node))
        or _count_flaw(pod, allocation["containers"], exact(node))
        or _kind_flaw(ask, node, held_devices(allocation))
    )


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
    ask = device_ask(pod)
    asked = dict(_asked(pod, ask.resource))
    for name in sorted(asked.keys() | containers.keys()):
        has = _size(ask.kind, containers.get(name, []), on_exact)
        if has != asked.get(name, 0):
            return f"gives container {name} {has} of {ask.resource or 'no device'}, not {asked.get(name, 0)}"
    if on_exact and ask.kind == "whole":
        total = len({grant["dev"] for grants in containers.values() for grant in grants})
        return "" if total == ask.count else f"names {total} devices, not {ask.count}"
    return ""


def _size(kind: str, grants: list[Json], on_exact: bool) -> int:  # noqa: FBT001 - see _form_flaw
    """Return how many devices, slices or shares one container has; -1 for two shares of one device."""
    if not on_exact:
        return sum(one["count"] for one in grants)
    if kind == "share":
        return len(grants) if len({one["dev"] for one in grants}) == len(grants) else -1
    return len({(one["dev"], one.get("start") if kind == "mig" else None) for one in grants})


def _kind_flaw(ask: Ask, node: Json, grants: list[Json]) -> str:
    """Return which grant is of another kind, profile or size than the pod asked, empty when none."""
    product, mib = labels(node).get(GPU + ".product", ""), int(labels(node).get(GPU + ".memory", "0"))
    for grant in grants:
        if grant["kind"] != ask.kind:
            return f"has a grant of kind {grant['kind']} for {ask.resource or 'no device'}"
        if ask.kind == "mig" and resource_of(str(grant["profile"])) != ask.resource:
            return f"has a slice of profile {grant['profile']} for {ask.resource}"
        share = (grant["milli"], grant["mib"]) if ask.kind == "share" else None
        if share and share != ask.share_of(mib):
            return f"has a share of {share}, not {ask.share_of(mib)} milli and MiB of a {product}"
    return ""


def _asked(pod: Json, resource: str) -> Iterator[tuple[str, int]]:
    """Yield each container's own devices: lasting ones what they ask, ordinary init ones what no lasting one lends."""
    inits = pod["spec"].get("initContainers") or []
    apps = sum(requests(one)[resource] for one in pod["spec"]["containers"])
    for one in pod["spec"]["containers"]:
        yield one["name"], requests(one)[resource]
    for place, one in enumerate(inits):
        if one.get("restartPolicy") == "Always":
            yield one["name"], requests(one)[resource]
            continue
        later = sum(requests(two)[resource] for two in inits[place:] if two.get("restartPolicy") == "Always")
        yield one["name"], max(0, requests(one)[resource] - apps - later)


def self_overlap(pod: Json, allocation: Json) -> str:
    """Return which device or slice two containers that run together both hold, empty when none."""
    inits = {one["name"] for one in pod["spec"].get("initContainers") or () if one.get("restartPolicy") != "Always"}
    containers = allocation.get("containers")
    if not isinstance(containers, dict):
        return ""
    lasting = {"containers": {name: grants for name, grants in containers.items() if name not in inits}}
    held = Counter(
        f"device {one['dev']}" + (f" slice {one.get('start')}" if one["kind"] == "mig" else "")
        for one in held_devices(lasting)
        if one.get("kind") in {"whole", "mig"} and "dev" in one
    )
    return ", ".join(what for what, times in sorted(held.items()) if times > 1)


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
            taken[resource_of(grant["profile"]) if "profile" in grant else GPU] += grant.get("count", 0)
    for resource, count in sorted(taken.items()):
        has = quantity(node["status"]["allocatable"].get(resource, "0"))
        if count > has:
            yield resource, f"{count} of {has} {resource} given to {', '.join(sorted(holders))}"


def _devices_over(node: Json, holders: Mapping[str, Json]) -> Iterator[Fault]:
    devices: list[Device] = devices_of(labels(node), quantity(node["status"]["allocatable"].get(GPU, "0")))
    pods: dict[int, set[str]] = defaultdict(set)
    for pod, grant in _grants(holders):
        pods[grant["dev"]].add(pod)
        if 0 <= grant["dev"] < len(devices):
            devices[grant["dev"]].take(grant)
    for dev, names in sorted(pods.items()):
        who = ", ".join(sorted(names))
        if not 0 <= dev < len(devices):
            yield f"device {dev}", f"{who} on a node with {len(devices)} devices"
            continue
        if faults := ", ".join(devices[dev].faults()):
            yield f"device {dev}", f"{faults}: held by {who}"


def _grants(holders: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Yield pod and grant of every device that is named."""
    for pod, allocation in sorted(holders.items()):
        for grant in distinct(allocation):
            if isinstance(grant.get("dev"), int):
                yield pod, grant


def slices_wrong(node: Json, holders: Mapping[str, Json]) -> list[Fault]:
    """Return MIG instances whose memory slices overlap on one device, and those that are legal nowhere on the model.

    Args:
        node: the Node object.
        holders: allocation by pod, all of this node and all in force together.
    """
    known = card(labels(node).get(GPU + ".product", ""))
    slices: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    faults = []
    for pod, grant in _grants(holders):
        if grant.get("kind") == "mig":
            if wrong := slice_faults(known, grant):
                faults.append((f"device {grant['dev']} start {grant.get('start')}", f"{wrong}: held by {pod}"))
            start = grant.get("start", 0)
            slices[grant["dev"]].append((pod, start, start + grant.get("size", 0)))
    for dev, taken in sorted(slices.items()):
        for (pod, start, end), (other, begin, stop) in itertools.combinations(taken, 2):
            if start < stop and begin < end:
                faults.append((f"device {dev}", f"slices {start}-{end} of {pod} and {begin}-{stop} of {other}"))
    return faults


def parsed(pods: list[Json]) -> dict[str, Any]:
    """Return the readable allocations of pods, by pod UID."""
    found = {pod["metadata"]["uid"]: read_allocation(annotation(pod, ALLOCATION)) for pod in pods}
    return {uid: allocation for uid, allocation in found.items() if allocation is not None}
