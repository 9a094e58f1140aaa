"""From a node to its devices: which container gets which.

Invariant: what is handed out was free under the very masks that judged the node, and the union over the containers
is exactly what the request asks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from policies.columns import Ask, Kind, Mix, Mode, Snapshot, empty_mix
from scheduler.errors import TesseraError
from scheduler.model.allocation import Grant
from scheduler.model.node import Node
from scheduler.model.pod import ContainerAsk, Request

from .catalog import FILTER_MASKS, TURN_MASKS, Policies
from .choosing import choose
from .near import Near
from .pipeline import judge

Containers = tuple[tuple[str, tuple[Grant, ...]], ...]
_KINDS = {Kind.WHOLE: "whole", Kind.MIG: "mig", Kind.SHARE: "share"}


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
    return judge(snapshot.take(alone), here, mix, policies, masks).failed.headline()


def place(
    snapshot: Snapshot,
    row: int,
    request: Request,
    ask: Ask,
    *,
    node: Node,
    mix: Mix | None = None,
    judged: bool = False,
) -> Containers:
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
        mix: what is asked lately, by which shares choose their devices; None = nothing.
        judged: this row has just passed all masks for devices in these columns, so they are not asked again.

    Returns:
        (container, grants) in declaration order; empty for a CPU-only request. Exact nodes: one Grant a device.
        Observed nodes: one Grant with a count, where init containers count only what no earlier one has counted.

    Raises:
        DoesNotFit: a mask for devices rejects the node.
    """
    if ask.kind == Kind.NONE:
        return ()
    mix = mix or empty_mix(len(ask.models))
    if not judged and (reason := judge_row(snapshot, row, ask, mix, Policies(), masks=FILTER_MASKS)):
        raise DoesNotFit(reason)
    asks = request.devices.containers
    own = sum(each.count for each in asks if each.role != "init")
    extra = _beyond(asks, own)
    assert own + max(extra.values(), default=0) == ask.count, "the ask and its containers disagree"
    if snapshot.mode[row] != Mode.EXACT:
        return _counts(asks, extra, Grant(kind=_KINDS[ask.kind], profile=request.devices.profile))
    grants = choose(Near(snapshot, slice(row, row + 1)), ask, mix, node=node, profile=request.devices.profile)
    return _hand_out(asks, extra, grants[:own], grants[own:])


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


def _counts(asks: tuple[ContainerAsk, ...], extra: dict[str, int], one: Grant) -> Containers:
    """Observed nodes: numbers only, which add up to the whole request."""
    counted = 0
    containers: list[tuple[str, tuple[Grant, ...]]] = []
    for each in asks:
        count = max(extra.get(each.name, 0) - counted, 0) if each.role == "init" else each.count
        if each.role == "init":
            counted += count
        if count:
            containers.append((each.name, (replace(one, count=count),)))
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
