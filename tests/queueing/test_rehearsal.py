"""A gang's changes, tried out and taken back: the largest that fit, judged by counting, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import COLUMN_DTYPES, BoolArray
from scheduler import geometry
from scheduler.decision.pipeline import Policies
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import Asks
from scheduler.inventory.mix import Arrivals
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.ledger.queues import Queues
from scheduler.ledger.quota import charge
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.pod import Pod, Request
from scheduler.model.queue import Queue, Selector
from scheduler.queueing.charging import Charging
from scheduler.queueing.rehearsal import Rehearsal
from scheduler.queueing.turn import Barrier
from tests.objects import raw_node, raw_pod

SIZE = 8


def cluster(taken: list[int]) -> Registry:
    """Nodes of eight GPUs, of which so many are taken."""
    registry = Registry(geometry.placements())
    for number, gpus in enumerate(taken):
        node = read_node(raw_node(f"n{number}", gpus=SIZE), geometry.products())
        assert node is not None
        registry.put_node(node)
        if gpus:
            grants = tuple(Grant("whole", slot) for slot in range(gpus))
            held = Allocation(f"u{number}", 1, 1, node.name, "exact", (("main", grants),))
            pod = read_pod(raw_pod(f"u{number}", gpus=gpus, cpu="1", node=node.name))
            registry.say(f"u{number}", Source.CLAIMED, booking(pod, node.name, held))
    return registry


def gang(count: int, gpus: int) -> list[Pod]:
    return [read_pod(raw_pod(f"p{number}", gpus=gpus, cpu="1")) for number in range(count)]


def rehearsal(registry: Registry, pods: list[Pod], queues: Queues, barrier: Barrier | None = None) -> Rehearsal:
    asks = Asks(registry)
    every: BoolArray = np.ones(registry.snapshot().nodes, np.bool_)
    charging = Charging(queues, registry)
    charging.settle({})
    return Rehearsal(pods, asks, Policies(), Arrivals(asks).mix(0), charging, barrier, lambda _: every)


def asking(gpus: int, request: Request) -> Request:
    (each,) = request.devices.containers
    return replace(request, devices=replace(request.devices, count=gpus, containers=(replace(each, count=gpus),)))


@settings(max_examples=60, deadline=None)
@given(
    taken=st.lists(st.integers(0, SIZE), min_size=1, max_size=4),
    count=st.integers(2, 6),
    gpus=st.integers(1, SIZE),
    shut=st.sets(st.integers(0, 3)),
)
def test_a_gang_fits_where_counting_says_so_and_leaves_nothing(
    taken: list[int], count: int, gpus: int, shut: set[int]
) -> None:
    registry = cluster(taken)
    snapshot = registry.snapshot()
    before = {name: getattr(snapshot, name).copy() for name in COLUMN_DTYPES if name != "generation"}
    open_ = np.zeros(snapshot.nodes, np.bool_)
    open_[[row for row in range(len(taken)) if row not in shut]] = True
    barrier = Barrier((0, 0, "", ""), open_, {}) if shut else None
    pods = gang(count, SIZE)
    rooms = sum((SIZE - one) // gpus for at, one in enumerate(taken) if at not in shut)
    freed = registry.freed
    found = rehearsal(registry, pods, Queues(), barrier).nodes(lambda request: asking(gpus, request))
    assert found.any() == (rooms >= count)
    assert not (found & ~open_).any()
    assert registry.freed == freed
    after = registry.snapshot()
    assert all(np.array_equal(getattr(after, name), column) for name, column in before.items())
    assert all(registry.held(pod.uid) is None for pod in pods)


@settings(max_examples=60, deadline=None)
@given(nominal=st.integers(0, 12), used=st.integers(0, 12), count=st.integers(2, 4), gpus=st.integers(1, 4))
def test_the_quota_that_lacks_is_named_exactly(nominal: int, used: int, count: int, gpus: int) -> None:
    queues = Queues()
    queues.replace([(Queue("q", nominal={"gpu": nominal}, namespaces=Selector()), "")])
    registry, need = cluster([0, 0, 0, 0]), count * gpus
    pods = [replace(pod, request=replace(pod.request, queue="q")) for pod in gang(count, gpus)]
    tried = rehearsal(registry, pods, queues)
    charge(queues.quota, tried.charging.usage, "q", {"gpu": used})
    short = tried.shortage({"gpu": need})
    lacks = max(used + need - nominal, 0)
    assert tried.nodes(lambda request: request).any() == (lacks == 0)
    assert (short is None) == (lacks == 0)
    if short is not None:
        assert (short.queue, dict(short.more)) == ("q", {"gpu": lacks})
        assert 1 <= short.nodes <= count


def test_what_is_tried_is_bounded() -> None:
    registry = cluster([0])
    tried = rehearsal(registry, gang(2, 1), Queues())
    tried.left = 3
    assert tried.nodes(lambda request: request).any()
    assert not tried.nodes(lambda request: request).any(), "only one more pod may be placed"
    assert registry.held("uid-p0") is None
