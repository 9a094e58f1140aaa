"""Which devices of one node a request gets: whole ones near each other, MIG instances and shares where they fit best.

Invariant: on a node that passes the masks every chooser finds all that is asked, and the same columns give the same
devices every time.
"""

from __future__ import annotations

import numpy as np

from policies import fit, mig, sharing, waste
from policies.columns import Ask, Kind, Mix, Snapshot
from scheduler.model.allocation import Grant
from scheduler.model.node import Node


def choose(alone: Snapshot, ask: Ask, mix: Mix, *, node: Node, profile: str) -> list[Grant]:
    """Choose the devices of one exact node.

    Args:
        alone: the columns of this node alone, which passes every mask for devices.
        ask: numbers of the request.
        mix: what is asked lately.
        node: for the UUIDs of its devices.
        profile: name of the MIG profile asked; empty for asks of another kind.

    Returns:
        ``ask.count`` grants; of shares container by container, in the order of `ask.parts`.
    """
    if ask.kind == Kind.MIG:
        return _instances(alone, ask, node, profile)
    if ask.kind == Kind.SHARE:
        return _shares(alone, ask, mix, node)
    return [Grant(kind="whole", dev=dev, uuid=_uuid(node, dev)) for dev in whole(alone, 0, ask)]


def whole(snapshot: Snapshot, row: int, ask: Ask) -> list[int]:
    """Choose `ask.count` free devices: of one link group and NUMA node, else of one link group, else the lowest.

    Of the groups that are large enough the smallest is taken, so that large ones stay whole; then the lowest index.
    """
    free = fit.free_slots(snapshot, row, ask)
    link, numa = snapshot.link_group[:, row].tolist(), snapshot.numa[:, row].tolist()
    if max(link) < 0 and max(numa) < 0:
        return free[: ask.count]
    for near in ([(link[dev], numa[dev]) for dev in free], [link[dev] for dev in free]):
        groups: dict[object, list[int]] = {}
        for dev, group in zip(free, near, strict=True):
            groups.setdefault(group, []).append(dev)
        if enough := [group for group in groups.values() if len(group) >= ask.count]:
            return min(enough, key=lambda group: (len(group), group[0]))[: ask.count]
    return free[: ask.count]


def _instances(alone: Snapshot, ask: Ask, node: Node, profile: str) -> list[Grant]:
    """Place one instance after the other, each on the device and at the start that cost least; then the lowest."""
    offer, rows = ask.offer, alone.mig_row[:, 0].astype(np.intp)
    open_to = mig.takers(alone, ask)[:, 0]
    grants = []
    for _ in range(ask.count):
        dev = int(np.where(open_to, offer.worth.take(rows), 0).argmax())
        row = rows[dev]
        assert open_to[dev], "a node that passes the masks takes every instance asked"
        assert offer.fits[row], "a node that passes the masks takes every instance asked"
        rows[dev] = offer.after[row]
        size = int(offer.sizes[row])
        grants.append(
            Grant(kind="mig", dev=dev, uuid=_uuid(node, dev), profile=profile, start=int(offer.start[row]), size=size)
        )
    return grants


def _shares(alone: Snapshot, ask: Ask, mix: Mix, node: Node) -> list[Grant]:
    """Give each container its shares on different devices: where they waste least first, then the fullest."""
    room = sharing.rooms(alone, ask)[:, 0].tolist()
    cost = waste.card_costs(alone, ask, mix, waste.open_milli(alone))[:, 0].tolist()
    free = alone.milli_free[:, 0].tolist()
    tightest = sorted(range(len(room)), key=lambda dev: (cost[dev], free[dev], dev))
    parts = ask.parts or (ask.count,)
    mib, milli = (np.broadcast_to(size, alone.exists.shape)[:, 0].tolist() for size in sharing.sizes(alone, ask))
    chosen = _packed(parts, room, tightest) or _levelled(parts, room, tightest)
    return [
        Grant(kind="share", dev=dev, uuid=_uuid(node, dev), milli=milli[dev], mib=mib[dev])
        for devices in chosen
        for dev in devices
    ]


def _packed(parts: tuple[int, ...], room: list[int], order: list[int]) -> list[list[int]]:
    """Give each container the first devices in this order that have room; empty when one finds too few."""
    left, chosen = list(room), list[list[int]]()
    for count in parts:
        devices = [dev for dev in order if left[dev] > 0][:count]
        for dev in devices:
            left[dev] -= 1
        chosen.append(devices)
    return chosen if all(len(devices) == count for devices, count in zip(chosen, parts, strict=True)) else []


def _levelled(parts: tuple[int, ...], room: list[int], order: list[int]) -> list[list[int]]:
    """Serve the largest container first, from the devices with most room: this finds a way whenever there is one."""
    left, chosen = list(room), [list[int]() for _ in parts]
    for index in sorted(range(len(parts)), key=lambda index: -parts[index]):
        chosen[index] = sorted(order, key=lambda dev: -left[dev])[: parts[index]]
        for dev in chosen[index]:
            assert left[dev] > 0, "a node that passes the masks takes every share asked"
            left[dev] -= 1
    return chosen


def _uuid(node: Node, dev: int) -> str:
    return node.devices[dev].uuid if dev < len(node.devices) else ""
