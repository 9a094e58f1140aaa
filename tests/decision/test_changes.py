"""What would fit now: every idea is true, and none is given to a request that fits as it is."""

from __future__ import annotations

from typing import Any

import pytest

from policies.columns import empty_mix
from scheduler import geometry
from scheduler.decision.changes import Idea, ideas
from scheduler.decision.pipeline import Policies
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import Asks
from scheduler.inventory.registry import Registry
from tests.objects import raw_node, raw_pod


def of(pod: dict[str, Any], *nodes: dict[str, Any]) -> list[Idea]:
    registry = Registry(geometry.placements())
    for raw in nodes:
        node = read_node(raw, geometry.products())
        assert node is not None
        registry.put_node(node)
    ask = Asks(registry).ask(read_pod(pod).request)
    return ideas(registry.snapshot(), ask, empty_mix(len(registry.columns.models)), Policies())


def selecting(pod: dict[str, Any], **labels: str) -> dict[str, Any]:
    pod["spec"]["nodeSelector"] = labels
    return pod


def test_what_fits_needs_no_change() -> None:
    assert of(raw_pod("p", 8), raw_node("a")) == []


@pytest.mark.parametrize(("gpus", "asked", "fits"), [(3, 8, 3), (7, 8, 7), (1, 2, 1), (5, 64, 5)])
def test_the_largest_smaller_count_is_named(gpus: int, asked: int, fits: int) -> None:
    nodes = [raw_node("a", gpus=gpus), raw_node("b", gpus=gpus), raw_node("c", gpus=max(gpus - 1, 0))]
    assert of(raw_pod("p", asked), *nodes) == [{"change": f"ask for {fits} instead of {asked} GPUs", "nodes": 2}]


def test_each_single_loosening_is_tried_alone() -> None:
    wish = raw_pod("p", 1, annotations={"tessera.dev/gpu-model": "A100"})
    assert of(wish, raw_node("a")) == [{"change": "take any GPU model", "nodes": 1}]
    assert of(selecting(raw_pod("p", 1), pool="x"), raw_node("a")) == [
        {"change": "loosen the node selector, affinity or tolerations", "nodes": 1}
    ]
    assert of(raw_pod("p", 1, "200"), raw_node("a")) == [{"change": "ask for less CPU and memory", "nodes": 1}]
    assert of(selecting(wish, pool="x"), raw_node("a")) == []  # it would take two changes


def test_nothing_is_offered_where_nothing_helps() -> None:
    assert of(raw_pod("p", 1), raw_node("a", gpus=0)) == []
    assert of(raw_pod("p", 1)) == []
