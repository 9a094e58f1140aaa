"""A change that raises half-way leaves the inventory as it was: every column equals a rebuild from nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies.columns import COLUMN_DTYPES
from scheduler import geometry
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.node import Node
from scheduler.model.pod import Pod
from tests.objects import raw_node, raw_pod


def node(name: str, gpus: int = 8) -> Node:
    made = read_node(raw_node(name, gpus=gpus), geometry.products())
    assert made is not None
    return made


def pod(name: str, where: str = "", gpus: int = 1) -> Pod:
    return read_pod(raw_pod(name, gpus=gpus, node=where))


def claim(registry: Registry, name: str, where: str, device: int) -> None:
    allocation = Allocation(f"uid-{name}", 1, 1, where, "exact", (("main", (Grant("whole", device),)),))
    registry.say(f"uid-{name}", Source.CLAIMED, booking(pod(name), where, allocation))


def filled() -> Registry:
    """Two nodes, a claimed pod with a device and a bound one without on each."""
    registry = Registry(geometry.placements())
    for number, name in enumerate("ab"):
        registry.put_node(node(name))
        claim(registry, f"claimed-{name}", name, number)
        registry.put_pod(pod(f"bound-{name}", name))
    return registry


def told(registry: Registry) -> dict[str, object]:
    """Return all that the inventory says, apart from its counters; an unused row must be a hole."""
    snapshot, rows = registry.snapshot(), registry.columns.rows
    columns = {
        (name, column): np.array(getattr(snapshot, column)[..., row]).tolist()
        for name, row in rows.items()
        for column in COLUMN_DTYPES.keys() - {"generation", "rank"}
    }
    assert int(snapshot.schedulable.sum()) == len(rows)
    sources = {source: dict(registry.said(source)) for source in Source}
    holders = {name: registry.holders(name) for name in "abc"}
    return {
        "columns": columns,
        "said": sources,
        "holders": holders,
        "pods": dict(registry.pods),
        "nodes": dict(registry.nodes),
    }


CHANGES: dict[str, Callable[[Registry], object]] = {
    "a new pod": lambda registry: registry.put_pod(pod("new", "a", 2)),
    "a pod that moves": lambda registry: claim(registry, "claimed-a", "b", 5),
    "a pod that takes another device": lambda registry: claim(registry, "claimed-a", "a", 6),
    "a claim that is observed": lambda registry: registry.put_pod(pod("claimed-a", "a", 3)),
    "a claim that is given up": lambda registry: registry.unsay("uid-claimed-a", Source.CLAIMED),
    "a pod that is gone": lambda registry: registry.remove_pod("uid-bound-a"),
    "a node that changes": lambda registry: registry.put_node(node("a", 4)),
    "a new node": lambda registry: registry.put_node(node("c")),
}


@pytest.mark.parametrize("step", ["_add", "_retell", "_tell_foreign", "_touch"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", [False, True], ids=["raises first", "raises when done"])
def test_a_change_that_raises_changes_nothing(
    change: str,
    step: str,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, bugs = filled(), ["a bug"]
    right = getattr(registry, step)

    def wrong(*arguments: object) -> None:
        bug = bugs.pop() if bugs else ""
        if after or not bug:
            right(*arguments)
        if bug:
            raise ZeroDivisionError(bug)

    monkeypatch.setattr(registry, step, wrong)
    before = told(registry)
    try:
        CHANGES[change](registry)
    except ZeroDivisionError:
        assert told(registry) == before
    else:
        assert bugs, "the step was not taken"
    assert [registry.differences(name) for name in registry.nodes] == [[]] * len(registry.nodes)
    bugs.clear()
    CHANGES[change](registry)
    assert [registry.differences(name) for name in registry.nodes] == [[]] * len(registry.nodes)
