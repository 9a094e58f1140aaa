"""How much more quota would do: it does, less would not, and where several queues lack something nothing is said."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from scheduler import geometry
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.registry import Registry
from scheduler.ledger.queues import Queues
from scheduler.ledger.quota import charge, lacking
from scheduler.model.pod import Request
from scheduler.model.queue import Queue
from scheduler.queueing.charging import Charging
from scheduler.queueing.shortage import Shortage, shortage
from tests.objects import raw_node, raw_pod

Taken = dict[str, int]


def charging(queues: list[Queue], taken: Taken) -> Charging:
    """Return a cluster of two nodes whose queues hold GPUs."""
    registry, told = Registry(geometry.placements()), Queues()
    for name in ("a", "b"):
        node = read_node(raw_node(name), geometry.products())
        assert node is not None
        registry.put_node(node)
    told.replace((queue, "") for queue in queues)
    found = Charging(told, registry)
    found.settle({})
    for queue, gpus in taken.items():
        charge(told.quota, found.usage, queue, {"gpu": gpus})
    return found


def asking(queue: str, gpus: int) -> Request:
    return replace(read_pod(raw_pod("p", gpus)).request, queue=queue)


def found(queues: list[Queue], taken: Taken, request: Request) -> Shortage | None:
    here = charging(queues, taken)
    return shortage(here, request, {}, np.ones(here.registry.snapshot().nodes, np.bool_))


def short(queues: list[Queue], taken: Taken, request: Request) -> dict[str, int]:
    here = charging(queues, taken)
    return lacking(here.queues.quota, here.usage, request.queue, {"gpu": request.devices.count})


def raised(queues: list[Queue], name: str, more: int) -> list[Queue]:
    return [
        replace(one, nominal={**one.nominal, "gpu": one.nominal.get("gpu", 0) + more}) if one.name == name else one
        for one in queues
    ]


@pytest.mark.parametrize("seed", range(300))
def test_just_so_much_more_is_enough_in_any_tree(seed: int) -> None:
    draw = random.Random(seed)

    def some() -> dict[str, int]:
        return {"gpu": draw.randrange(6)} if draw.random() < 0.7 else {}

    names = ("root", ""), ("mid", "root"), ("leaf", "mid"), ("next", "mid"), ("far", "root")
    queues = [
        Queue(name, parent, nominal=some(), lend_limit=some(), borrow_limit=some() if draw.random() < 0.5 else {})
        for name, parent in names
    ]
    taken: Taken = {}
    for name in draw.choices(("mid", "leaf", "next", "far"), k=12):
        if not short(queues, taken, asking(name, 1)):
            taken[name] = taken.get(name, 0) + 1
    request = asking("leaf", draw.randrange(1, 8))
    told = found(queues, taken, request)
    if not short(queues, taken, request):
        return
    assert told is not None
    more = told.more["gpu"]
    assert told.nodes == 2
    assert short(raised(queues, told.queue, more), taken, request) == {}
    assert short(raised(queues, told.queue, more - 1), taken, request) != {}


def test_what_is_used_beyond_a_lowered_limit_is_added() -> None:
    queues = [Queue("one", nominal={"gpu": 2})]
    told = found(queues, {"one": 5}, asking("one", 1))
    assert told == Shortage("one", {"gpu": 4}, 2)


def test_limits_of_two_queues_are_no_single_change() -> None:
    queues = [Queue("root", nominal={"cpu": 0}), Queue("leaf", "root", nominal={"gpu": 0})]
    assert found(queues, {}, asking("leaf", 1)) is None


def test_a_model_counts_where_the_nodes_have_it() -> None:
    queues = [Queue("one", nominal={"gpu": 8, "H100": 1})]
    assert found(queues, {}, asking("one", 3)) == Shortage("one", {"H100": 2}, 2)
