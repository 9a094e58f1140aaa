"""What would be admitted now: every idea is true, single and the smallest of its kind; what fits gets none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policies.columns import BoolArray, empty_mix
from scheduler import geometry
from scheduler.decision.changes import Idea, ideas
from scheduler.decision.pipeline import Policies, judge
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import Asks
from scheduler.inventory.registry import Registry
from scheduler.inventory.selection import admits, obstacles
from scheduler.model.pod import Request
from tests.objects import raw_node, raw_pod

Raw = dict[str, Any]


def of(pod: Raw, *nodes: Raw, mig: dict[str, str] | None = None) -> list[Idea]:
    registry = Registry(geometry.placements())
    for raw in nodes:
        raw["status"]["allocatable"] = {**raw["status"]["allocatable"], **(mig or {})}
        node = read_node(raw, geometry.products())
        assert node is not None
        registry.put_node(node)
    asks, request = Asks(registry), read_pod(pod).request

    def fits(changed: Request, *, everywhere: bool = False) -> BoolArray:
        ask = asks.ask(changed, everywhere=everywhere)
        return judge(registry.snapshot(), ask, empty_mix(len(registry.columns.models)), Policies()).passes

    assert request.refusal is None
    return ideas(request, registry, asks.nearest(request), fits)


def selecting(pod: Raw, **labels: str) -> Raw:
    pod["spec"]["nodeSelector"] = labels
    return pod


def asking(resource: str, count: int, **annotations: str) -> Raw:
    notes = {f"tessera.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    pod = raw_pod("p", 0, annotations=notes)
    for amounts in pod["spec"]["containers"][0]["resources"].values():
        amounts[resource] = str(count)
    return pod


def test_what_fits_needs_no_change() -> None:
    assert of(raw_pod("p", 8), raw_node("a")) == []


@pytest.mark.parametrize(("gpus", "asked", "fits"), [(3, 8, 3), (7, 8, 7), (1, 2, 1), (5, 64, 5)])
def test_the_largest_smaller_count_is_named(gpus: int, asked: int, fits: int) -> None:
    nodes = [raw_node("a", gpus=gpus), raw_node("b", gpus=gpus), raw_node("c", gpus=max(gpus - 1, 0))]
    assert of(raw_pod("p", asked), *nodes) == [{"change": f"ask for {fits} instead of {asked} GPUs", "nodes": 2}]


def test_another_model_is_named() -> None:
    wish = raw_pod("p", 1, annotations={"tessera.dev/gpu-model": "A100"})
    found = [{"change": "take any GPU model", "nodes": 3}, {"change": "take GPU model H100-80", "nodes": 2}]
    t4 = raw_node("t", product="Tesla-T4")
    assert of(wish, raw_node("a"), raw_node("b"), t4)[:2] == found


def test_the_most_cpu_and_memory_are_named() -> None:
    assert of(raw_pod("p", 1, "200"), raw_node("a")) == [{"change": "ask for 96 instead of 200 CPU", "nodes": 1}]
    large = raw_pod("p", 1)
    large["spec"]["containers"][0]["resources"]["requests"]["memory"] = "1Ti"
    assert of(large, raw_node("a")) == [{"change": "ask for 768Gi instead of 1Ti of memory", "nodes": 1}]
    large["spec"]["containers"][0]["resources"]["requests"]["cpu"] = "192"
    change = "ask for 96 CPU and 512Gi of memory instead of 192 CPU and 1Ti of memory"
    assert of(large, raw_node("a")) == [{"change": change, "nodes": 1}]


def test_a_smaller_share_is_named() -> None:
    more = {"tessera.dev/share": "512"}
    memory = of(asking("tessera.dev/share", 1, gpu_memory="100Gi"), raw_node("a"), mig=more)
    assert memory == [{"change": "ask for gpu-memory 81408Mi instead of 102400Mi per share", "nodes": 1}]
    count = of(asking("tessera.dev/share", 9, gpu_milli="500"), raw_node("a"), mig=more)
    assert {"change": "ask for 8 instead of 9 shares", "nodes": 1} in count


def test_another_mig_profile_is_named() -> None:
    node = raw_node("a", **{"tessera.dev/mig-devices": "0"})
    found = of(
        asking("nvidia.com/mig-3g.40gb", 3), node, mig={"nvidia.com/mig-3g.40gb": "8", "nvidia.com/mig-1g.10gb": "7"}
    )
    assert {"change": "ask for 2 instead of 3 MIG slices", "nodes": 1} in found
    assert {"change": "ask for profile 1g.10gb instead of 3g.40gb", "nodes": 1} in found


def test_the_term_of_the_selection_that_is_in_the_way_is_named() -> None:
    tainted = raw_node("t", pool="x")
    tainted["spec"]["taints"] = [{"key": "team", "value": "a", "effect": "NoSchedule"}]
    nodes = raw_node("a"), raw_node("b"), tainted
    assert of(selecting(raw_pod("p", 1), pool="x"), *nodes) == [
        {"change": "drop the node selector pool=x", "nodes": 2},
        {"change": "tolerate the taint team=a:NoSchedule", "nodes": 1},
    ]
    assert of(selecting(raw_pod("p", 1), pool="y", zone="z"), *nodes) == []  # it would take two changes


def test_what_kubernetes_keeps_away_is_no_idea() -> None:
    cordoned, sick = raw_node("a"), raw_node("b")
    cordoned["spec"]["unschedulable"] = True
    sick["spec"]["taints"] = [{"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}]
    assert of(raw_pod("p", 1), cordoned, sick) == []


def affinity(*terms: list[tuple[str, str, list[str]]]) -> Raw:
    pod = raw_pod("p", 1)
    written = [
        {"matchExpressions": [{"key": key, "operator": op, "values": values} for key, op, values in term]}
        for term in terms
    ]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": written}}
    pod["spec"]["affinity"] = {"nodeAffinity": required}
    return pod


def test_expressions_of_one_term_are_named_alone_and_several_terms_together() -> None:
    pool, zone = ("pool", "In", ["x", "y"]), ("kubernetes.io/hostname", "NotIn", ["b"])
    one = of(affinity([pool, zone]), raw_node("a"), raw_node("b"))
    assert one == [{"change": "drop pool In (x, y) from the required node affinity", "nodes": 1}]
    several = of(affinity([pool], [("pool", "Exists", [])]), raw_node("a"), raw_node("b"))
    assert several == [{"change": "drop the required node affinity", "nodes": 2}]


def test_obstacles_are_there_exactly_where_a_node_does_not_admit() -> None:
    cordoned, labelled, tainted = raw_node("c"), raw_node("l", pool="x"), raw_node("t", pool="x")
    cordoned["spec"]["unschedulable"] = True
    tainted["spec"]["taints"] = [{"key": "k", "effect": "NoSchedule"}, {"key": "l", "effect": "PreferNoSchedule"}]
    pods = [raw_pod("p"), selecting(raw_pod("p"), pool="x"), affinity([("pool", "In", ["x"])]), affinity([])]
    for raw in (cordoned, labelled, tainted, raw_node("a")):
        node = read_node(raw, geometry.products())
        assert node is not None
        for pod in pods:
            selection = read_pod(pod).request.selection
            assert (obstacles(selection, node) == []) == admits(selection, node)


def test_nothing_is_offered_where_nothing_helps() -> None:
    assert of(raw_pod("p", 1), raw_node("a", gpus=0)) == []
    assert of(raw_pod("p", 1)) == []


def test_the_work_is_bounded_whatever_the_request_asks() -> None:
    registry, judged = Registry(geometry.placements()), 0

    def nowhere(changed: Request, *, everywhere: bool = False) -> BoolArray:
        nonlocal judged
        judged += 1
        return np.asarray([judged % 3 == 0 and not everywhere])

    request = read_pod(asking("tessera.dev/share", 64, gpu_memory="4096Gi", gpu_milli="1000", gpu_model="x")).request
    huge = replace(request, amounts=replace(request.amounts, cpu_milli=1 << 50, memory_bytes=1 << 60))
    ideas(huge, registry, (), nowhere)
    assert judged <= 100
