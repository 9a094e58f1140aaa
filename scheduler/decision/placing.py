"""From a node to its devices: which container gets which.

Invariant: what is handed out was free under the very masks that judged the node, and the union over the containers
is exactly what the request asks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from policies import fit
from policies.columns import Ask, Kind, Mix, Mode, Snapshot, empty_mix
from scheduler.errors import TesseraError
from scheduler.model.allocation import Grant
from scheduler.model.node import Node
from scheduler.model.pod import ContainerAsk, Request

from .catalog import FILTER_MASKS, TURN_MASKS, Policies
from .pipeline import judge

Containers = tuple[tuple[str, tuple[Grant, ...]], ...]


class DoesNotFit(TesseraError):  # noqa: N818 - an expected answer, named after what it says
    """The node no longer takes this request; decide again.

    Attributes:
        reason: per-node reason word.
    """

    code = "placement.does_not_fit"

    def __init__(self, reason: str) -> None:
        """Keep the reason word."""
        super().__init__(f"the node does not take this request now: {reason}")
        self.reason = reason


def judge_row(
    snapshot: Snapshot, row: int, ask: Ask, mix: Mix, policies: Policies, *, masks: Collection[str] = TURN_MASKS
) -> str:
    """Judge an ask on one node without touching the others; return the reason word, empty when it fits."""
    alone = slice(row, row + 1)
    here = replace(ask, allowed=ask.allowed[alone])
    return judge(snapshot.take(alone), here, mix, policies, masks).headline()


def place(snapshot: Snapshot, row: int, request: Request, ask: Ask, *, node: Node) -> Containers:
    """Choose the devices of every container on one node.

    App and sidecar containers get devices of their own. An ordinary init container reuses those (save the devices of
    sidecars that started before it) and has a key only for what it needs beyond them; init containers run one after
    another, so they share that part.

    Args:
        snapshot: columns in which this request's own intent or reservation is not booked.
        row: the node's row.
        request: whose containers ask, in declaration order.
        ask: the same request in numbers.
        node: the Node of that row; its devices lend their UUIDs.

    Returns:
        (container, grants) in declaration order; empty for a CPU-only request. Exact nodes: one Grant a device.
        Observed nodes: one Grant with a count, where init containers count only what no earlier one has counted.

    Raises:
        DoesNotFit: a mask for devices rejects the node.
    """
    if ask.kind == Kind.NONE:
        return ()
    if reason := judge_row(snapshot, row, ask, empty_mix(len(ask.models)), Policies(), masks=FILTER_MASKS):
        raise DoesNotFit(reason)
    asks = request.devices.containers
    own = sum(each.count for each in asks if each.role != "init")
    extra = _beyond(asks, own)
    assert own + max(extra.values(), default=0) == ask.count, "the ask and its containers disagree"
    if snapshot.mode[row] != Mode.EXACT:
        return _counts(asks, extra)
    devices = _choose(snapshot, row, ask)
    grants = [
        Grant(kind="whole", dev=dev, uuid=node.devices[dev].uuid if dev < len(node.devices) else "") for dev in devices
    ]
    return _hand_out(asks, extra, grants[:own], grants[own:])


def totals(containers: Containers) -> int:
    """Return how many devices these containers hold together, each counted once."""
    grants = [grant for _, part in containers for grant in part]
    return len({grant.dev for grant in grants if grant.dev >= 0}) + sum(g.count for g in grants if g.dev < 0)


def _beyond(asks: tuple[ContainerAsk, ...], own: int) -> dict[str, int]:
    """Return per ordinary init container how many devices it needs beyond those it can reuse, where it needs any."""
    beyond: dict[str, int] = {}
    sidecars = 0
    for each in asks:
        if each.role == "sidecar":
            sidecars += each.count
        elif each.role == "init" and each.count > own - sidecars:
            beyond[each.name] = each.count - (own - sidecars)
    return beyond


def _counts(asks: tuple[ContainerAsk, ...], extra: dict[str, int]) -> Containers:
    """Observed nodes: numbers only, which add up to the whole request."""
    counted = 0
    containers: list[tuple[str, tuple[Grant, ...]]] = []
    for each in asks:
        count = max(extra.get(each.name, 0) - counted, 0) if each.role == "init" else each.count
        if each.role == "init":
            counted += count
        if count:
            containers.append((each.name, (Grant(kind="whole", count=count),)))
    return tuple(containers)


def _hand_out(
    asks: tuple[ContainerAsk, ...], extra: dict[str, int], own: list[Grant], beyond: list[Grant]
) -> Containers:
    """Exact nodes: cut the devices into parts, one after another; init containers share the part beyond."""
    containers: list[tuple[str, tuple[Grant, ...]]] = []
    start = 0
    for each in asks:
        if each.role == "init":
            part = beyond[: extra.get(each.name, 0)]
        else:
            part = own[start : start + each.count]
            start += each.count
        if part:
            containers.append((each.name, tuple(part)))
    return tuple(containers)


def _choose(snapshot: Snapshot, row: int, ask: Ask) -> list[int]:
    """Choose `ask.count` free devices: of one link group and NUMA node, else of one link group, else the lowest.

    Of the groups that are large enough the smallest is taken, so that large ones stay whole; then the lowest index.
    """
    alone = snapshot.take(slice(row, row + 1))
    free = np.flatnonzero(fit.free_devices(alone, ask)[:, 0]).tolist()
    link, numa = alone.link_group[:, 0].tolist(), alone.numa[:, 0].tolist()
    for near in ([(link[dev], numa[dev]) for dev in free], [link[dev] for dev in free]):
        groups: dict[object, list[int]] = {}
        for dev, group in zip(free, near, strict=True):
            groups.setdefault(group, []).append(dev)
        if enough := [group for group in groups.values() if len(group) >= ask.count]:
            return min(enough, key=lambda group: (len(group), group[0]))[: ask.count]
    return free[: ask.count]
