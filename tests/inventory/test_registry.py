"""The inventory under every order of events: it always equals a rebuild from nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import DEVICE_COLUMNS, Use
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.registry import Registry, Source, booking
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.node import Node
from scheduler.model.pod import Pod
from tests.objects import raw_node, raw_pod

COLUMNS = (
    "cpu_milli_free",
    "memory_bytes_free",
    "pods_free",
    "gpus_free",
    "foreign",
    "schedulable",
    "mode",
    "use",
    "model",
)


def node(name: str, **how: object) -> Node:
    made = read_node(raw_node(name, **how), {})  # type: ignore[arg-type]
    assert made is not None
    return made


def pod(name: str, **how: object) -> Pod:
    return read_pod(raw_pod(name, **how))  # type: ignore[arg-type]


def holding(*devices: int, node_name: str = "a") -> Allocation:
    return Allocation("id", 1, 1, node_name, "exact", (("main", tuple(Grant("whole", dev=dev) for dev in devices)),))


def column(registry: Registry, name: str, where: str) -> object:
    row = registry.columns.rows[where]
    return getattr(registry.snapshot(), name)[..., row].tolist()


def test_a_pod_takes_room_once_whoever_says_so() -> None:
    registry = Registry()
    registry.put_node(node("a"))
    one = pod("p", gpus=2)
    for source in Source:
        registry.say(one.uid, source, booking(one, "a", holding(0, 1)))
        assert column(registry, "gpus_free", "a") == 6
    for source in (Source.OBSERVED, Source.INTENDED):
        registry.unsay(one.uid, source)
        assert column(registry, "use", "a")[:3] == [Use.WHOLE, Use.WHOLE, Use.FREE]  # type: ignore[index]
    registry.unsay(one.uid, Source.CLAIMED)
    assert column(registry, "gpus_free", "a") == 8
    assert registry.held(one.uid) is None


def test_what_is_seen_beats_what_was_claimed() -> None:
    registry = Registry()
    registry.put_node(node("a"))
    registry.put_node(node("b"))
    one = pod("p", gpus=1)
    registry.say(one.uid, Source.CLAIMED, booking(one, "a", holding(0)))
    registry.put_pod(pod("p", gpus=1, node="b"))
    assert column(registry, "gpus_free", "a") == 8
    assert column(registry, "gpus_free", "b") == 7
    assert column(registry, "foreign", "b") is True  # bound without an allocation: nobody knows which device


def test_an_ended_pod_gives_back_what_was_seen_but_not_the_claim() -> None:
    registry = Registry()
    registry.put_node(node("a"))
    bound = pod("p", gpus=1, node="a")
    registry.say(bound.uid, Source.CLAIMED, booking(bound, "a", holding(3)))
    registry.put_pod(bound)
    registry.put_pod(pod("p", gpus=1, node="a", phase="Succeeded"))
    assert column(registry, "gpus_free", "a") == 7
    registry.unsay(bound.uid, Source.CLAIMED)
    assert column(registry, "gpus_free", "a") == 8


def test_pods_may_be_listed_before_their_node() -> None:
    registry = Registry()
    registry.put_pod(pod("p", gpus=4, node="late", scheduler="other"))
    registry.put_node(node("late", mode="observed"))
    assert column(registry, "gpus_free", "late") == 4


def test_a_heartbeat_is_no_change() -> None:
    registry = Registry()
    first = node("a")
    assert registry.put_node(first)
    before = registry.generation
    again = read_node(raw_node("a") | {"metadata": raw_node("a")["metadata"] | {"resourceVersion": "99"}}, {})
    assert again is not None
    assert not registry.put_node(again)
    assert registry.generation == before


def test_a_late_delete_of_an_older_namesake_is_ignored() -> None:
    registry = Registry()
    registry.put_node(node("a", uid="new"))
    assert not registry.remove_node("a", "old")
    assert registry.remove_node("a", "new")
    assert not registry.snapshot().schedulable.any()


def test_the_snapshot_is_closed_for_writing() -> None:
    registry = Registry()
    registry.put_node(node("a"))
    with pytest.raises(ValueError, match="read-only"):
        registry.snapshot().gpus_free[0] = 3


def test_no_number_of_huge_pods_wraps_around() -> None:
    registry = Registry()
    registry.put_node(node("a"))
    for number in range(110):
        raw = raw_pod(f"p{number}", 0, node="a")
        raw["spec"]["containers"][0]["resources"]["requests"]["memory"] = "4Ei"
        registry.put_pod(read_pod(raw))
    free = column(registry, "memory_bytes_free", "a")
    assert isinstance(free, int)
    assert free < 0


def asking(name: str, resource: str, count: str, where: str) -> Pod:
    raw = raw_pod(name, 0, node=where)
    raw["spec"]["containers"][0]["resources"]["limits"] = {resource: count}
    return read_pod(raw)


def offering(name: str, resource: str, count: str) -> Node:
    raw = raw_node(name)
    raw["status"]["allocatable"] = raw["status"]["allocatable"] | {resource: count}
    made = read_node(raw, {})
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("resource", "stacked", "names"),
    [("example.com/nic", "extended_free", "resources"), ("nvidia.com/mig-1g.10gb", "slices_free", "profiles")],
)
def test_what_a_node_never_had_is_not_freed_there(resource: str, stacked: str, names: str) -> None:
    """The resource gets its code from another node between the pod's coming and its going."""
    registry = Registry()
    registry.put_node(node("a"))
    registry.put_pod(asking("p", resource, "3", "a"))
    registry.put_node(offering("b", resource, "4"))
    registry.remove_pod("uid-p")
    code = len(getattr(registry.columns, names)) - 1
    assert column(registry, stacked, "a")[code] == 0  # type: ignore[index]
    assert column(registry, stacked, "b")[code] == 4  # type: ignore[index]


def test_a_resource_that_comes_and_goes_on_a_node_is_counted_while_it_is_there() -> None:
    registry = Registry()
    registry.put_node(offering("a", "example.com/nic", "4"))
    registry.put_pod(asking("p", "example.com/nic", "3", "a"))
    assert column(registry, "extended_free", "a") == [0, 1]
    registry.put_node(node("a"))
    assert column(registry, "extended_free", "a") == [0, 0]
    registry.put_node(offering("a", "example.com/nic", "4"))
    assert column(registry, "extended_free", "a") == [0, 1]


def test_no_number_of_huge_extended_requests_wraps_around() -> None:
    registry = Registry()
    registry.put_node(offering("a", "example.com/nic", "4"))
    for number in range(110):
        registry.put_pod(asking(f"p{number}", "example.com/nic", "4000000000000000000", "a"))
    assert column(registry, "extended_free", "a")[1] < 0  # type: ignore[index]


def test_nodes_that_are_gone_leave_nothing_behind() -> None:
    registry = Registry()
    for number in range(50):
        registry.put_node(node(f"n{number}"))
        registry.put_pod(pod(f"p{number}", node=f"n{number}"))
        registry.remove_pod(f"uid-p{number}")
        registry.remove_node(f"n{number}", f"uid-n{number}")
    assert not registry._on_node
    assert len(registry.columns.names) == 1


NAMES = st.sampled_from(["a", "b", "c", "d"])
EVENTS = st.one_of(
    st.tuples(st.just("node"), NAMES, st.sampled_from([0, 2, 8, 16]), st.sampled_from(["exact", "observed"])),
    st.tuples(st.just("gone"), NAMES),
    st.tuples(st.just("bound"), st.integers(0, 5), NAMES, st.integers(0, 4), st.booleans()),
    st.tuples(st.just("over"), st.integers(0, 5)),
    st.tuples(st.just("say"), st.integers(0, 5), st.sampled_from(list(Source)), NAMES, st.integers(0, 4)),
    st.tuples(st.just("unsay"), st.integers(0, 5), st.sampled_from(list(Source))),
)


def play(registry: Registry, event: tuple[object, ...]) -> None:
    match event:
        case ("node", str(name), int(gpus), str(mode)):
            registry.put_node(node(name, gpus=gpus, mode=mode))
        case ("gone", str(name)):
            registry.remove_node(name, f"uid-{name}")
        case ("bound", int(number), str(name), int(gpus), bool(named)):
            made = pod(f"p{number}", gpus=gpus, node=name)
            registry.put_pod(made)
            if named:
                registry.say(made.uid, Source.OBSERVED, booking(made, name, holding(*range(gpus), node_name=name)))
        case ("over", int(number)):
            registry.remove_pod(f"uid-p{number}")
        case ("say", int(number), Source() as source, str(name), int(gpus)):
            made = pod(f"p{number}", gpus=gpus)
            registry.say(made.uid, source, booking(made, name, holding(*range(gpus), node_name=name)))
        case ("unsay", int(number), Source() as source):
            registry.unsay(f"uid-p{number}", source)


@given(st.lists(EVENTS, max_size=40))
def test_the_columns_always_equal_a_rebuild(events: list[tuple[object, ...]]) -> None:
    registry = Registry()
    for event in events:
        play(registry, event)
    live = registry.snapshot()
    for name, row in registry.columns.rows.items():
        fresh = registry.rebuilt(name)
        again, twin = fresh.snapshot(), fresh.columns.rows[name]
        assert not registry.differences(name)
        for column_name in COLUMNS:
            one, other = getattr(live, column_name)[..., row], getattr(again, column_name)[..., twin]
            if column_name in DEVICE_COLUMNS:
                one, other = one[: min(len(one), len(other))], other[: min(len(one), len(other))]
                if column_name == "model":
                    continue  # codes are given in order of arrival
            assert np.array_equal(one, other), (name, column_name)
    assert set(registry.columns.rows) == set(registry.nodes)
    used = [name for name in registry.columns.names if name]
    assert sorted(used) == sorted(registry.nodes)
    rank = live.rank[[registry.columns.rows[name] for name in sorted(used)]]
    assert (np.diff(rank) > 0).all()
