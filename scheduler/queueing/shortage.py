"""How much more quota would admit a request that nothing else keeps waiting: in one queue, and verified. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from policies.columns import BoolArray
from scheduler.ledger.charges import charge_of
from scheduler.ledger.quota import Quota, Usage, charge, grow, lacking
from scheduler.model.pod import Request

from .charging import Charging
from .turn import Amounts, owing


@dataclass(frozen=True, slots=True)
class Shortage:
    """What to add to one queue's nominal.

    Attributes:
        queue: the nearest one that lists the keys.
        more: by key.
        nodes: on how many nodes the request would be admitted then.
    """

    queue: str
    more: Mapping[str, int]
    nodes: int


def shortage(charging: Charging, request: Request, owed: Amounts, there: BoolArray) -> Shortage | None:
    """Return the least addition to the nominal of one queue that would admit a request; None = there is none.

    Args:
        charging: settled.
        request: whose queue lacks something.
        owed: quota that those before it need, by key.
        there: ``[N]`` the nodes that take it, if only quota allowed.
    """
    quota, usage = charging.queues.quota, charging.usage
    least: dict[str, int] | None = None
    for one in charging.alike():
        if there[one.rows].any():
            amounts = owing(charge_of(request, quota.model_keys, one.node), owed)
            short = lacking(quota, usage, request.queue, amounts)
            if least is None or (len(short), sum(short.values())) < (len(least), sum(least.values())):
                least = short
    queues = {quota.lister(request.queue, key) for key in least or ()}
    if least is None or len(queues) != 1:
        return None
    queue = queues.pop()
    more_still = {key: amount + beyond(quota, usage, request.queue, key) for key, amount in least.items()}
    for more in (least, more_still):
        found = charging.affordable(request, owed, raised(quota, usage, queue, more))
        nodes = int((there & found).sum())
        if nodes:
            return Shortage(queue, more, nodes)
    return None


def beyond(quota: Quota, usage: Usage, queue: str, key: str) -> int:
    """Return what is used beyond the totals on the path, as after a limit was lowered."""
    return sum(max(usage.counted.get(pair, 0) - total, 0) for pair, total, _, _ in quota.levels(queue, key))


def raised(quota: Quota, usage: Usage, name: str, more: Mapping[str, int]) -> tuple[Quota, Usage]:
    """Return the tree with more for one queue, and the same things taken of it."""
    queue = quota.queues[name]
    nominal = {**queue.nominal, **{key: queue.nominal.get(key, 0) + amount for key, amount in more.items()}}
    raised = grow([*(one for one in quota.queues.values() if one.name != name), replace(queue, nominal=nominal)])
    own = {pair: amount for pair, amount in usage.held.items() if pair[1] in more}  # less what is below
    for (below, key), amount in usage.held.items():
        parent = quota.queues[below].parent if key in more and below in quota.queues else ""
        if parent:
            own[parent, key] -= amount
    taken = Usage()
    for (below, key), amount in own.items():
        charge(raised, taken, below, {key: amount})
    others = {pair: amount for pair, amount in usage.counted.items() if pair[1] not in more}
    return raised, Usage(usage.held, others | taken.counted)
