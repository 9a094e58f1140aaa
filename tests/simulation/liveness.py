"""Who waits though nothing keeps it from running, told from the cluster's own objects and the tree of queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bench.oracle import Oracle, annotation, bound_to, demand, forbidden, observe, ours, terminal
from scheduler import GATE, GPU
from scheduler.kube.port import Object
from scheduler.ledger.lifecycle import ATTEMPTS_MAX
from scheduler.ledger.quota import Usage, charge, grow, lacking
from scheduler.model.queue import Queue
from scheduler.model.reservation import State
from tests.simulation.town import Town

QUEUE, GANG, SIZE = "tessera.dev/queue", "tessera.dev/gang", "tessera.dev/gang-size"


def unexplained(place: Town, specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one sentence for each pod that waits without a reason that is true."""
    nodes, pods = place.world.cluster.snapshot("nodes"), place.world.cluster.snapshot("pods")
    mine = [pod for pod in pods if ours(pod)]
    waiting = [pod for pod in mine if not bound_to(pod) and not terminal(pod)]
    allocations = {
        pod["metadata"]["uid"]: orjson.loads(text)
        for pod in mine
        if (text := annotation(pod, "tessera.dev/allocation"))
    }
    oracle = observe(nodes, pods, allocations)
    tree = grow([_queue(name, spec) for name, spec in {"default": {}, **specs}.items()])
    usage = Usage()
    for pod in mine:
        if bound_to(pod) and not terminal(pod):
            charge(tree, usage, _name(pod), _amounts(pod))
    found = []
    for pod in sorted(waiting, key=_rank):
        lacks = bool(lacking(tree, usage, _name(pod), _amounts(pod))) or _stopped(tree, _name(pod))
        why = _reason(place, pod, waiting, oracle, lacks=lacks)
        if why:
            found.append(why)
    return found


def _reason(place: Town, pod: Object, waiting: Sequence[Object], oracle: Oracle, *, lacks: bool) -> str:
    """Return why it is wrong that this pod waits; empty = it is right."""
    name, uid, here = pod["metadata"]["name"], pod["metadata"]["uid"], oracle.judge(pod)
    row, word = place.tessera.desk.book.rows.get(uid), place.tessera.desk.order.words.get(uid, "")
    if row is None:
        return f"{name}: unknown to the ledger"
    if row.state is State.REJECTED:
        return f"{name}: rejected, and fits on {here}" if here else ""
    if row.state is State.FAILED:
        return "" if row.attempts >= ATTEMPTS_MAX else f"{name}: failed after {row.attempts} attempts"
    if row.state is not State.QUEUED or row.not_before_us > place.clock.wall_us():
        return f"{name}: still {row.state}, or backs off"
    gated = any(gate["name"] != GATE for gate in pod["spec"].get("schedulingGates") or ())
    if lacks or gated or not here or _stands_behind(pod, waiting, oracle, here):
        return ""
    return f"{name}: fits on {here}, nobody is before it, and it waits as {word or 'nothing'} ({row.reason})"


def _stands_behind(pod: Object, waiting: Sequence[Object], oracle: Oracle, here: Sequence[str]) -> bool:
    """Say whether somebody before it in its queue may keep it from all of these nodes, or it needs others beside it."""
    if _gang(pod):
        return True  # whether all of them fit at once is a question of its own
    before = [one for one in waiting if _name(one) == _name(pod) and _rank(one) < _rank(pod)]
    gangs = {_gang(one) for one in before} - {""}
    before += [one for one in waiting if _gang(one) in gangs]  # they stand where their first member stands
    if any(demand(one)[GPU] for one in before):
        return True  # its share of the quota is owed to them
    return any(_could(one, oracle, node) for one in before for node in here)


def _could(pod: Object, oracle: Oracle, node: str) -> bool:
    """Say whether a pod could use a node, were it empty; also where that is in doubt."""
    return not forbidden(pod, oracle.rooms[node].node)


def _rank(pod: Object) -> tuple[int, str, str]:
    return -pod["spec"].get("priority", 0), pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]


def _name(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(QUEUE, "default"))


def _gang(pod: Object) -> str:
    return annotation(pod, GANG) if int(annotation(pod, SIZE) or 0) > 1 else ""


def _amounts(pod: Object) -> Counter[str]:
    needs = demand(pod)
    return Counter({"gpu": needs[GPU], "cpu": needs["cpu"]})


def _stopped(tree: Any, name: str) -> bool:
    return name not in tree.queues or bool(tree.stopped(name))


def _queue(name: str, spec: Mapping[str, Any]) -> Queue:
    limits = {
        field: {key: int(amount) * (1000 if key == "cpu" else 1) for key, amount in spec.get(field, {}).items()}
        for field in ("nominal", "borrowLimit", "lendLimit")
    }
    return Queue(
        name,
        spec.get("parent", ""),
        nominal=limits["nominal"],
        borrow_limit=limits["borrowLimit"],
        lend_limit=limits["lendLimit"],
        stopped=spec.get("stopped", False),
    )
