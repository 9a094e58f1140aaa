"""Whether a gang could ever run as a whole, against every way to lay it out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import BoolArray
from scheduler import geometry
from scheduler.decision.pipeline import Policies
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.pod import Pod
from scheduler.queueing.together import Together
from tests.objects import raw_node, raw_pod


def cluster(sizes: list[int]) -> Registry:
    registry = Registry(geometry.placements())
    for number, gpus in enumerate(sizes):
        node = read_node(raw_node(f"n{number}", gpus=gpus), geometry.products())
        assert node is not None
        registry.put_node(node)
    return registry


def gang(asks: list[int]) -> list[Pod]:
    return [read_pod(raw_pod(f"p{number}", gpus=gpus)) for number, gpus in enumerate(asks)]


def able(registry: Registry, pods: list[Pod], sizes: list[int]) -> bool:
    nodes = registry.snapshot().nodes
    could: list[BoolArray] = []
    for pod in pods:
        each = np.zeros(nodes, np.bool_)
        each[: len(sizes)] = [size >= pod.request.devices.count for size in sizes]
        could.append(each)
    return Together(registry, Policies()).able(pods, could)


def laid_out(sizes: tuple[int, ...], asks: tuple[int, ...]) -> bool:
    """Say by trying everything whether there is room for all; CPU and memory are plenty."""

    @cache
    def rest(free: tuple[int, ...], at: int) -> bool:
        if at == len(asks):
            return True
        return any(
            rest(tuple(sorted((*free[:n], free[n] - asks[at], *free[n + 1 :]))), at + 1)
            for n in range(len(free))
            if free[n] >= asks[at]
        )

    return rest(tuple(sorted(sizes)), 0)


SIZES = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, gpus=st.integers(1, 8), count=st.integers(2, 9))
def test_equal_pods_are_judged_exactly(sizes: list[int], gpus: int, count: int) -> None:
    assert able(cluster(sizes), gang([gpus] * count), sizes) == laid_out(tuple(sizes), (gpus,) * count)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, asks=st.lists(st.integers(1, 8), min_size=2, max_size=6))
def test_of_different_pods_no_is_certain(sizes: list[int], asks: list[int]) -> None:
    if not able(cluster(sizes), gang(asks), sizes):
        assert not laid_out(tuple(sizes), tuple(asks))


def test_of_different_pods_the_sums_count() -> None:
    assert not able(cluster([8, 8]), gang([8, 8, 4]), [8, 8])
    assert able(cluster([8, 8]), gang([8, 4, 4]), [8, 8])


def test_what_is_taken_now_does_not_matter_and_new_nodes_do() -> None:
    registry, pods = cluster([8, 8]), gang([8, 8, 8])
    full = Allocation("x", 1, 1, "n0", "exact", (("main", tuple(Grant("whole", slot) for slot in range(8))),))
    registry.say("x", Source.CLAIMED, booking(replace(pods[0], node="n0"), "n0", full))
    together = Together(registry, Policies())
    could = [np.ones(registry.snapshot().nodes, np.bool_)] * 3
    assert together.able(pods[:2], could[:2])
    assert not together.able(pods, could)
    node = read_node(raw_node("n2"), geometry.products())
    assert node is not None
    registry.put_node(node)
    assert together.able(pods, [np.ones(registry.snapshot().nodes, np.bool_)] * 3)


def test_nodes_that_a_member_may_not_use_do_not_count() -> None:
    registry, pods = cluster([8, 8, 8]), gang([8, 8])
    there = np.zeros(registry.snapshot().nodes, np.bool_)
    there[0] = True
    assert not Together(registry, Policies()).able(pods, [there, there])


def test_cpu_counts_too() -> None:
    pods = [read_pod(raw_pod(f"p{number}", gpus=1, cpu="60")) for number in range(3)]
    assert not able(cluster([8, 8]), pods, [8, 8])
    assert able(cluster([8, 8]), pods[:2], [8, 8])
