"""Why one Request is where it is, for people and `tessera why`: reasons, place in line, funnel, what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np

from policies.columns import BoolArray
from policies.ordering import RequestRank
from scheduler import AUTOSCALE, GATE
from scheduler.decision import explain
from scheduler.decision.changes import CHANGE_MAX, ideas
from scheduler.decision.explain import Cause, Why
from scheduler.decision.pipeline import judge
from scheduler.decision.reasons import REASONS
from scheduler.desk import Desk
from scheduler.inventory.asks import shape
from scheduler.ledger.ledger import NOBODY_THERE
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.ledger.queues import WAITING
from scheduler.ledger.quota import exceeding as beyond
from scheduler.ledger.quota import lacking
from scheduler.ledger.reconcile import HELD_UP
from scheduler.ledger.standing import plain
from scheduler.model.pod import Pod, Request
from scheduler.model.reservation import Row, State
from scheduler.queueing.order import rank_of
from scheduler.queueing.rehearsal import Rehearsal
from scheduler.queueing.shortage import Shortage, shortage
from scheduler.queueing.turn import Barrier, barrier_for
from scheduler.waiting import BEHIND, CAPACITY, PENDING

SHOWN = {State.BINDING: State.RESERVED, State.RECLAIMING: State.RUNNING}
"""Inner states as people see them."""

RESERVED = frozenset({State.RESERVED, State.BINDING})
SETTLED = frozenset({State.BOUND, State.RUNNING, State.RECLAIMING, State.RELEASED})
"""Nobody need act: it runs, or it ran."""

GANG, QUOTA, SIZE = "WaitingForGang", "WaitingForQuota", "ExceedsNodeSize"
FIRST = (
    ("QueueNotFound", "NotAuthorized", "QueueStopped", "ExceedsQuotaLimit"),  # no turn ever comes to it
    (AUTOSCALE,),  # what the masks say of the nodes that are there matters less
    (),  # the masks' word, where no node could ever take it
    ("ExceedsClusterSize",),
    (HELD_UP, "SchedulerNotRunning", "WaitingForGate", "BackingOff"),  # it takes no part in the turn
    (GANG,),
    (QUOTA,),
    (BEHIND,),
)
"""Reasons in the order in which they must go; those of capacity come last."""

DEADLINES = {
    "Job": "The pod belongs to a Job: if that sets activeDeadlineSeconds, the time that the pod waits counts, and the"
    " Job fails when it is over. A pod does not show it. (activeDeadlineSeconds of a pod itself begins on its node.)",
    "ReplicaSet": "The pod belongs to a ReplicaSet: if that is a Deployment's, its progressDeadlineSeconds (600 unless"
    " set) goes on while the pod waits; then the rollout is reported as failed, and nothing is stopped.",
}
"""What may run out while a pod waits, by the kind of its controller; a pod tells no more than that."""

RANKED = frozenset(word for tier in FIRST for word in tier)

SENTENCES: dict[str, tuple[str, str]] = {
    BEHIND: (" It is number {0} of {1} in queue {2}.", " 큐 {2}에서 {1}개 중 {0}번째입니다."),
    GANG: (" {0} of {1} are there, {2} of them ready.", " {1}개 중 {0}개가 있으며 그중 {2}개가 준비되었습니다."),
    QUOTA: (" Queue {0} lacks {1}.", " 큐 {0}에 부족한 양: {1}."),
    "ExceedsQuotaLimit": (" Queue {0} could never have {1} of it.", " 큐 {0}의 한도를 넘는 양: {1}."),
    SIZE: (" No node has {0}.", " 다음을 가진 노드가 없습니다: {0}."),
}
"""What an explanation adds to the constant sentence of a word."""

IN_VAIN = (
    " A new node was asked for {0} min ago, and none that takes it has come.",
    " {0}분 전에 새 노드를 요청했으나 맞는 노드가 오지 않았습니다.",
)
"""What is added to the first reason where a new node was asked for and that is no longer what the request waits for."""


def explanation(desk: Desk, row: Row) -> dict[str, Any]:
    """Return the explanation of one Request as the API shows it.

    `class` is that of the first reason; null once the Request was bound, and for one that was withdrawn. `position`
    counts from 1 in its queue and `position_overall` over all that wait, by priority and age; null for what does not
    wait. `waiting` and `waiting_overall` say of how many.
    """
    pod = desk.registry.pods.get(row.id)
    places = positions(desk, row)
    found = _why(desk, row, pod, places)
    kind: str | None = found["reasons"][0]["class"] if found["reasons"] else None
    judged = row.state is State.QUEUED and found["funnel"]
    if row.state in RESERVED:
        kind = "wait"
    return {
        "state": SHOWN.get(row.state, row.state).value,
        "class": kind,
        "reasons": found["reasons"],
        **places,
        "warnings": _warnings(row, pod) if pod is not None else [],
        "funnel": found["funnel"],
        "changes": _changes(desk, row, pod) if judged and pod is not None else [],
    }


def _warnings(row: Row, pod: Pod) -> list[str]:
    """Return what has no effect in a pod, and while it waits which time of its controller may run out."""
    waits = row.state in WAITING or row.state in RESERVED
    return [*pod.warnings, *([DEADLINES[pod.owner]] if waits and pod.owner in DEADLINES else [])]


def positions(desk: Desk, row: Row) -> dict[str, int | None]:
    """Return where a request stands in its queue and overall, and of how many."""
    rank, own, overall, waiting, waiting_overall = _rank(row), 1, 1, 0, 0
    for one in desk.book.rows.values():
        if one.state in WAITING:
            before, same = _rank(one) < rank, one.queue == row.queue
            waiting_overall += 1
            overall += before
            waiting += same
            own += before and same
    waits = row.state in WAITING and row.id in desk.book.rows
    return {
        "position": own if waits else None,
        "waiting": waiting,
        "position_overall": overall if waits else None,
        "waiting_overall": waiting_overall,
    }


def _rank(row: Row) -> tuple[int, int, str, str, str]:
    return -row.priority, row.arrival_us, row.namespace, row.name, row.id


# reasons


def _why(desk: Desk, row: Row, pod: Pod | None, places: dict[str, int | None]) -> Why:
    if row.state in SETTLED or row.state in RESERVED:
        return _alone()
    if pod is not None and pod.request.refusal is not None:
        return explain.why_refused(pod.request.refusal)
    if row.state is not State.QUEUED:
        lost = row.state is State.FAILED and row.reason != "PodFailed"
        return _alone("AttemptsSpent" if lost else row.reason)
    if pod is None or desk.intents.get(row.id) is not None:
        return _alone(PENDING)
    found = explain.why(desk.fits(pod), desk.asks.nearest(pod.request))
    words = set(_words(desk, row, pod)) & RANKED
    asked = AUTOSCALE in words  # then nobody need change what a node that comes will take
    masks = [
        one
        for one in found["reasons"]
        if not (words and one["code"] == PENDING) and not (asked and one["class"] == "change")
    ]
    masks = [_told(desk, pod, SIZE, places) if one["code"] == SIZE else one for one in masks]
    hopeless = masks[:1] if masks and masks[0]["class"] != "wait" else []
    ranked: list[Cause] = []
    for tier in FIRST:
        ranked += [_told(desk, pod, word, places) for word in tier if word in words] if tier else hopeless
    found["reasons"] = ranked + masks[len(hopeless) :]
    if pod.asked_us and not asked:
        minutes = max(0, desk.clock.wall_us() - pod.asked_us) // 60_000_000
        _add(found["reasons"][0], IN_VAIN, minutes)
    return found


def _words(desk: Desk, row: Row, pod: Pod) -> Iterator[str]:
    """Yield the words of order and quota that keep a request waiting: what the turn said, and what is so now."""
    request, order = pod.request, desk.order
    said = order.words.get(row.id, "") or (NOBODY_THERE if row.reason == NOBODY_THERE else "")
    if said not in {CAPACITY, "BackingOff"}:  # of capacity the masks tell more
        yield said
    if not desk.dependencies.closed:
        yield HELD_UP
    if set(pod.gates) - {GATE}:
        yield "WaitingForGate"
    if word := desk.queues.refusal(request.queue, request.namespace):
        yield word
        return
    if row.not_before_us > desk.clock.wall_us():
        yield "BackingOff"
    if _short(desk, pod, exceeding=True):
        yield "ExceedsQuotaLimit"
    elif _short(desk, pod):
        yield QUOTA


def _short(desk: Desk, pod: Pod, *, exceeding: bool = False) -> dict[str, int]:
    """Return what a request's queue lacks for it, by key: now, or even with nothing in use."""
    request, charging = pod.request, desk.order.charging
    usage = charging.settle(desk.book.rows)
    least, _ = charging.bounds(request, lambda: desk.could(pod))
    if exceeding:
        return beyond(desk.queues.quota, request.queue, least)
    return lacking(desk.queues.quota, usage, request.queue, least)


def _told(desk: Desk, pod: Pod, word: str, places: dict[str, int | None]) -> Cause:
    """Return a reason with what is known of this request: a place, a count or an amount, and never another's name."""
    parts: tuple[object, ...] = ()
    if word == BEHIND:
        parts = places["position"], places["waiting"], pod.request.queue
    elif word == GANG:
        parts = _gang(desk, pod)
    elif word in {QUOTA, "ExceedsQuotaLimit"}:
        short = plain(_short(desk, pod, exceeding=word != QUOTA))
        parts = (pod.request.queue, ", ".join(f"{amount} {key}" for key, amount in short.items())) if short else ()
    elif word == SIZE and (missing := _offered_nowhere(desk, pod)):
        parts = (", ".join(missing),)
    found = explain.cause(word)
    if parts:
        _add(found, SENTENCES[word], *parts)
    return found


def _add(found: Cause, sentence: tuple[str, str], *parts: object) -> None:
    english, korean = sentence
    found["text"] += english.format(*parts)
    found["text_ko"] += korean.format(*parts)


def _offered_nowhere(desk: Desk, pod: Pod) -> list[str]:
    """Return the extended resources that a pod asks and no node has, or not as many."""
    nodes = desk.registry.nodes.values()
    return [
        f"{count} {resource}"
        for resource, count in pod.request.amounts.extended
        if not any(dict(node.amounts.extended).get(resource, 0) >= count for node in nodes)
    ]


def _gang(desk: Desk, pod: Pod) -> tuple[int, int, int]:
    """Return how many members of a pod's gang are there, how many it takes, and how many may be decided or hold."""
    mine, now_us = pod.request, desk.clock.wall_us()
    there = ready = size = 0
    for row in desk.book.rows.values():
        same = (row.gang, row.namespace, row.queue) == (mine.gang, mine.namespace, mine.queue)
        other = desk.registry.pods.get(row.id) if same and row.state not in TERMINAL else None
        if other is not None:
            there, size = there + 1, max(size, other.request.gang_size)
            idle = row.state is State.QUEUED and (set(other.gates) - {GATE} or row.not_before_us > now_us)
            ready += not idle
    return there, size, ready


def _alone(word: str = "") -> Why:
    """Return one reason without a funnel; a word that is no reason of waiting, such as PodGone, gives none."""
    causes: list[Cause] = [explain.cause(word)] if word in REASONS else []
    return {"funnel": [], "reasons": causes}


# changes


def _changes(desk: Desk, row: Row, pod: Pod) -> list[dict[str, Any]]:
    """Return what would admit a request now; nothing where what keeps it waiting is none of its asks or quota."""
    request, order, columns = pod.request, desk.order, desk.registry.columns
    gang = _together(desk, pod)
    first = gang[0] if gang else pod
    barriers = order.barriers.get(request.queue)
    barrier = barrier_for(barriers, rank_of(first.request, desk.book.rows.get(first.uid))) if barriers else None
    if (
        (gang is not None and pod not in gang)
        or request.claims
        or set(pod.gates) - {GATE}
        or row.not_before_us > desk.clock.wall_us()
        or desk.queues.refusal(request.queue, request.namespace)
        or order.words.get(row.id) == "SchedulerNotRunning"
        or (barrier is not None and order.layout != columns.layout)
    ):
        return []
    order.charging.settle(desk.book.rows)
    if gang:
        return _gang_changes(desk, pod, gang, barrier)
    passing = _passing(desk, pod)

    def fits(changed: Request, *, everywhere: bool = False) -> BoolArray:
        open_ = order.affordable(changed, barrier)
        found = passing(changed, everywhere=everywhere)
        return found if open_ is None else found & open_

    found: list[dict[str, Any]] = [dict(one) for one in ideas(request, desk.registry, desk.asks.nearest(request), fits)]
    there = passing(request) if barrier is None else passing(request) & barrier.open
    short = None if fits(request).any() else shortage(order.charging, request, _owed(barrier), there)
    return [*found, *_raise(short)]


def _raise(short: Shortage | None) -> list[dict[str, Any]]:
    if short is None:
        return []
    amounts = ", ".join(f"{key} {amount}" for key, amount in plain(short.more).items())
    return [{"change": f"raise the quota of queue {short.queue} by {amounts}"[:CHANGE_MAX], "nodes": short.nodes}]


def _together(desk: Desk, pod: Pod) -> list[Pod] | None:
    """Return the members of a pod's gang that a turn decides at once; empty = too few may be decided, None = it is one.

    Where a member holds something already, each of the others stands alone.
    """
    mine, now_us = pod.request, desk.clock.wall_us()
    if not mine.gang or mine.gang_size <= 1:
        return None
    ready: list[tuple[RequestRank, Pod]] = []
    for row in desk.book.rows.values():
        if (row.gang, row.namespace, row.queue) != (mine.gang, mine.namespace, mine.queue) or row.state in TERMINAL:
            continue
        if row.state in HOLDING:
            return None
        other = desk.registry.pods.get(row.id)
        held_up = other is None or set(other.gates) - {GATE} or row.not_before_us > now_us
        if other is not None and not held_up and desk.intents.get(row.id) is None:
            ready.append((rank_of(other.request, row), other))
    size = max((other.request.gang_size for _, other in ready), default=mine.gang_size)
    members = [other for _, other in sorted(ready, key=itemgetter(0))[:size]]
    return members if len(members) == size else []


def _gang_changes(desk: Desk, pod: Pod, gang: list[Pod], barrier: Barrier | None) -> list[dict[str, Any]]:
    """Return what would admit a whole gang now, if each of its pods that ask as this one does were changed so."""
    request, charging, alike = pod.request, desk.order.charging, shape(pod.request)
    rehearsal = Rehearsal(gang, desk.asks, desk.policies, desk.mix(), charging, barrier, lambda uid: _left(desk, uid))

    def fits(changed: Request, *, everywhere: bool = False) -> BoolArray:
        if everywhere:
            return np.zeros(desk.registry.snapshot().nodes, np.bool_)
        return rehearsal.nodes(
            lambda one: replace(one, devices=changed.devices, amounts=changed.amounts) if shape(one) == alike else one
        )

    same = "" if all(shape(one.request) == alike for one in gang) else " that asks the same"
    found: list[dict[str, Any]] = [
        {"change": f"{one['change']} in each pod of the gang{same}"[:CHANGE_MAX], "nodes": one["nodes"]}
        for one in ideas(request, desk.registry, desk.asks.nearest(request), fits)
    ]
    if fits(request).any():
        return found
    least: Counter[str] = Counter()
    for one in gang:
        least.update(charging.bounds(one.request, lambda one=one: desk.could(one))[0])  # type: ignore[misc]
    return [*found, *_raise(rehearsal.shortage(least))]


def _owed(barrier: Barrier | None) -> dict[str, int]:
    return {} if barrier is None else dict(barrier.owed)


def _passing(desk: Desk, pod: Pod) -> Callable[..., BoolArray]:
    """Return what judges a changed request on the whole cluster, less the nodes that are left out for this pod."""
    snapshot, mix = desk.registry.snapshot(), desk.mix()
    open_ = _left(desk, pod.uid)

    def passing(request: Request, *, everywhere: bool = False) -> BoolArray:
        ask = desk.asks.ask(request, everywhere=everywhere)
        found: BoolArray = judge(snapshot, ask, mix, desk.policies).passes & open_
        return found

    return passing


def _left(desk: Desk, uid: str) -> BoolArray:
    """Return ``[N]`` the nodes that are not left out for this pod, by what was learnt of it."""
    now_s, nodes, rows = desk.clock.monotonic(), desk.registry.snapshot().nodes, desk.registry.columns.rows
    open_ = desk.lessons.of(uid, nodes, now_s)
    if open_ is None:
        open_ = np.ones(nodes, np.bool_)
    open_[[rows[name] for name in desk.intents.excluded(uid, now_s) if name in rows]] = False
    return open_
