"""Which pod uses which device or slice, and how much: shares and what is left over are exactly the device's figures.

Pure: what the kubelet lists and what the processes' cgroups say is read elsewhere and passed in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nodeagent.report import EXTERNAL, POD, SQUATTER, Device, Use

GPU_RESOURCE, MIG_RESOURCE, SHARE_RESOURCE = "nvidia.com/gpu", "nvidia.com/mig-", "tessera.dev/share"
_ROUNDING = 1e-9
_REPLICA = "::"  # NVIDIA's time-slicing names replicas of a device `uuid::n`


@dataclass(frozen=True, slots=True)
class Running:
    """A process on a device, or on a slice of it; `busy_ratio` is its share of the device's time where known."""

    device: str
    slice: str | None
    pid: int
    memory_mib: int
    busy_ratio: float | None


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A container as the kubelet names it."""

    namespace: str
    pod: str
    container: str


@dataclass(frozen=True, slots=True)
class Grant:
    """What the kubelet says a container was given: device ids or tokens of one resource."""

    holder: Holder
    resource: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a process belongs to by its cgroup: a pod's uid, and its names where they could be found."""

    uid: str
    holder: Holder | None


@dataclass(frozen=True, slots=True)
class Held:
    """Who holds what, by UUID of device or slice; and ids that name nothing we know."""

    by: Mapping[str, tuple[Holder, ...]]
    unknown: tuple[str, ...]


def held(grants: Iterable[Grant], devices: Sequence[Device], tokens: Mapping[str, Sequence[str]]) -> Held:
    """Find the devices and slices behind the kubelet's ids.

    Args:
        grants: of any resource; those of other resources are passed over.
        devices: as the report has them.
        tokens: the devices behind Tessera's own tokens (exact mode); empty in observed mode, where ids are UUIDs or
            device indices, perhaps with a replica's number.

    Returns:
        holders, sorted, by UUID.
    """
    names = {str(device.index): device.uuid for device in devices} | {device.uuid: device.uuid for device in devices}
    names |= {part.uuid: part.uuid for device in devices for part in device.slices if part.uuid}
    by: defaultdict[str, set[Holder]] = defaultdict(set)
    unknown: set[str] = set()
    for grant in grants:
        if not grant.resource.startswith((GPU_RESOURCE, MIG_RESOURCE, SHARE_RESOURCE)):
            continue
        for one in grant.ids:
            found = tokens.get(one) or [names[bare] for bare in (one.partition(_REPLICA)[0],) if bare in names]
            for uuid in found:
                by[uuid].add(grant.holder)
            if not found:
                unknown.add(one)
    return Held({uuid: tuple(sorted(who)) for uuid, who in by.items()}, tuple(sorted(unknown)))


def uses(
    devices: Iterable[Device], running: Iterable[Running], owners: Mapping[int, Owner], holding: Held
) -> list[Use]:
    """Say who uses every device that is not divided, and every slice.

    For each of them the memory of all uses together is its `memory_used_mib`, and their busy ratios together are its
    `busy_ratio` (absent in all where it is absent); the memory of all uses of a device, divided or not, is its own.
    What no process owns is a use of kind `external` without processes. A container that holds a device and runs
    nothing on it is listed with zeros.

    Args:
        devices: with activity.
        running: NVML's processes.
        owners: by pid; a process without one runs outside every pod.
        holding: who may be there.
    """
    at: defaultdict[tuple[str, str | None], list[Running]] = defaultdict(list)
    for one in running:
        at[one.device, one.slice].append(one)
    found: list[Use] = []
    for device in devices:
        for place in _places(device, at):
            here = at[place.device, place.slice]
            holders = holding.by.get(place.slice or place.device, ())
            found += _shared(place, here, owners, holders)
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """A device or slice, and what of it is to be divided; absent = nothing is known beyond what processes say."""

    device: str
    slice: str | None
    memory_mib: int | None
    busy_ratio: float | None


def _places(device: Device, at: Mapping[tuple[str, str | None], Sequence[Running]]) -> list[_Place]:
    """Return where work may be: the device, or its slices and what of the device is in none of them.

    Compute instances of one GPU instance all report that instance's figures: the first answers for the instance, the
    others for what their processes say.
    """
    whole = device.activity
    parts = [part for part in device.slices if part.uuid]
    if not parts:
        return [_Place(device.uuid, None, whole.memory_used_mib, whole.busy_ratio)]
    places: list[_Place] = []
    seen: set[int] = set()
    inside = 0
    for part in parts:
        siblings = [one.uuid for one in parts if one.gi == part.gi and one.uuid != part.uuid]
        memory = part.activity.memory_used_mib
        if part.gi in seen:
            memory = None
        elif memory is not None:
            inside += memory
            memory -= min(memory, sum(one.memory_mib for uuid in siblings for one in at.get((device.uuid, uuid), ())))
        seen.add(part.gi)
        places.append(_Place(device.uuid, part.uuid, memory, None if siblings else part.activity.busy_ratio))
    rest = None if whole.memory_used_mib is None else max(whole.memory_used_mib - inside, 0)
    return [_Place(device.uuid, None, rest, None), *places]


def _shared(
    place: _Place, running: Sequence[Running], owners: Mapping[int, Owner], holders: Sequence[Holder]
) -> list[Use]:
    """Divide one place among those who run there and those who hold it."""
    groups: defaultdict[tuple[str, Holder | None, str], list[Running]] = defaultdict(list)
    for one in running:
        groups[_identify(owners.get(one.pid), holders)].append(one)
    present = {holder for kind, holder, _ in groups if kind == POD}
    for holder in holders:
        if holder not in present:
            groups[POD, holder, ""] = []
    keys = sorted(groups, key=lambda key: (key[0], key[1] or Holder("", "", ""), key[2]))
    claimed = [sum(one.memory_mib for one in groups[key]) for key in keys]
    total_mib = sum(claimed) if place.memory_mib is None else place.memory_mib
    memory = fit(claimed, total_mib)
    busy = _busy([groups[key] for key in keys], place.busy_ratio)
    rows = [
        Use(
            device=place.device,
            slice=place.slice,
            kind=kind,
            memory_mib=mib,
            busy_ratio=ratio,
            namespace=holder.namespace if holder else "",
            pod=holder.pod if holder else "",
            container=holder.container if holder else "",
            uid=uid,
            processes=len(groups[kind, holder, uid]),
        )
        for (kind, holder, uid), mib, ratio in zip(keys, memory, busy, strict=True)
    ]
    left_mib = total_mib - sum(memory)
    left = None if place.busy_ratio is None else max(place.busy_ratio - sum(one or 0.0 for one in busy), 0.0)
    if left_mib or (left or 0.0) > _ROUNDING:
        rows.append(Use(place.device, place.slice, EXTERNAL, left_mib, left))
    return rows


def _identify(owner: Owner | None, holders: Sequence[Holder]) -> tuple[str, Holder | None, str]:
    """Say what kind of user a process's owner is here, its name, and its uid."""
    if owner is None:
        return EXTERNAL, None, ""
    if owner.holder is None:  # no name: the only one who may be here, if there is but one
        return (POD, holders[0], owner.uid) if len(holders) == 1 else (SQUATTER, None, owner.uid)
    if owner.holder in holders:
        return POD, owner.holder, owner.uid
    siblings = [one for one in holders if (one.namespace, one.pod) == (owner.holder.namespace, owner.holder.pod)]
    return (POD, owner.holder, owner.uid) if siblings else (SQUATTER, owner.holder, owner.uid)


def _busy(groups: Sequence[Sequence[Running]], total: float | None) -> list[float | None]:
    """Divide a device's busy ratio.

    By what the driver says of each process; where it says nothing (MIG, old cards) only a user who is alone on the
    device gets it, for nobody can know how two share it.
    """
    if total is None:
        return [None] * len(groups)
    told = [[one.busy_ratio for one in group if one.busy_ratio is not None] for group in groups]
    if any(told):
        shares = [sum(group) for group in told]
        scale = min(1.0, total / sum(shares)) if sum(shares) > 0 else 0.0
        return [share * scale for share in shares]
    active = sum(1 for group in groups if group)
    return [total if group and active == 1 else 0.0 for group in groups]


def fit(amounts: Sequence[int], total: int) -> list[int]:
    """Return the amounts, made smaller in proportion where together they exceed the total; never more than it.

    Processes and memory are read one after the other, so what processes say may be a little more than the device.
    """
    claimed = sum(amounts)
    if claimed <= total:
        return list(amounts)
    scaled = [amount * total // claimed for amount in amounts]
    order = sorted(range(len(amounts)), key=lambda at: (-(amounts[at] * total % claimed), at))
    for at in order[: total - sum(scaled)]:
        scaled[at] += 1
    return scaled
