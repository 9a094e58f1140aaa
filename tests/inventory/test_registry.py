"""The inventory under every order of events: it always equals a rebuild from nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import DEVICE_COLUMNS, Use
from scheduler import geometry
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
    "shares_free",
    "slices_total",
    "memory_mib_free",
    "memory_mib_total",
    "milli_free",
    "mig_mode",
    "occupancy",
    "family",
    "mig_row",
)
TABLES = geometry.placements()
H100 = "H100-80"
TOKENS = {"nvidia.com/mig-1g.10gb": "7", "nvidia.com/mig-1g.10gb.me": "7", "nvidia.com/mig-3g.40gb": "14"}
TOKENS |= {"tessera.dev/share": "128"}


def node(name: str, *, mig: str = "", **how: object) -> Node:
    raw = raw_node(name, **how)  # type: ignore[arg-type]
    if mig:
        raw["metadata"]["labels"]["tessera.dev/mig-devices"] = mig
        raw["status"]["allocatable"] |= TOKENS
    made = read_node(raw, geometry.products())
    assert made is not None
    return made


def pod(name: str, **how: object) -> Pod:
    return read_pod(raw_pod(name, **how))  # type: ignore[arg-type]


def holding(*devices: int, node_name: str = "a") -> Allocation:
    return Allocation("id", 1, 1, node_name, "exact", (("main", tuple(Grant("whole", dev=dev) for dev in devices)),))


def divided(name: str, resource: str, *containers: tuple[Grant, ...], on: str = "a") -> tuple[Pod, Allocation]:
    """A pod of one container per tuple, and the allocation with these grants."""
    raw = raw_pod(name, 0)
    (model,) = raw["spec"]["containers"]
    raw["spec"]["containers"] = [
        model | {"name": f"c{i}", "resources": {"limits": {"cpu": "1", resource: str(len(grants))}}}
        for i, grants in enumerate(containers)
    ]
    if resource == "tessera.dev/share":
        raw["metadata"]["annotations"] = {"tessera.dev/gpu-milli": "100"}
    held = tuple((f"c{i}", grants) for i, grants in enumerate(containers))
    return read_pod(raw), Allocation("id", 1, 1, on, "exact", held)


def instance(dev: int, start: int, profile: str = "1g.10gb", size: int = 1) -> Grant:
    return Grant("mig", dev=dev, profile=profile, start=start, size=size)


def share(dev: int, milli: int = 300, mib: int = 2000) -> Grant:
    return Grant("share", dev=dev, milli=milli, mib=mib)


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
    again = read_node(
        raw_node("a") | {"metadata": raw_node("a")["metadata"] | {"resourceVersion": "99"}}, geometry.products()
    )
    assert again is not None
    assert not registry.put_node(again)
    assert registry.generation == before


def test_readiness_is_shown_and_changes_no_placing() -> None:
    registry = Registry()
    first = node("a")
    registry.put_node(first)
    before = registry.generation
    assert not registry.put_node(replace(first, ready=False, resource_version="2"))
    assert (registry.nodes["a"].ready, registry.generation) == (False, before)


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


def test_instances_take_slices_and_engines_of_their_device() -> None:
    registry = Registry(TABLES)
    registry.put_node(node("a", gpus=4, mig="0-1"))
    assert column(registry, "occupancy", "a")[:5] == [0xFF00] * 4 + [0xFFFF]  # type: ignore[index]
    assert column(registry, "family", "a")[:5] == [0, 0, 0, 0, -1]  # type: ignore[index]
    empty = TABLES.row(H100, 0, (0,))
    assert column(registry, "mig_row", "a")[:4] == [empty, empty, 0, 0]  # type: ignore[index]
    one, held = divided("p", "nvidia.com/mig-1g.10gb.me", (instance(0, 6, "1g.10gb+me"), instance(1, 0, "1g.10gb+me")))
    registry.say(one.uid, Source.CLAIMED, booking(one, "a", held))
    two, big = divided("q", "nvidia.com/mig-3g.40gb", (instance(0, 0, "3g.40gb", 4),))
    registry.say(two.uid, Source.CLAIMED, booking(two, "a", big))
    assert column(registry, "use", "a")[:4] == [Use.MIG, Use.MIG, Use.FREE, Use.FREE]  # type: ignore[index]
    assert column(registry, "occupancy", "a")[:2] == [0xFF4F, 0xFF01]  # type: ignore[index]
    rows = [TABLES.row(H100, 0x4F, (1,)), TABLES.row(H100, 0x01, (1,))]
    assert column(registry, "mig_row", "a")[:2] == rows  # type: ignore[index]
    profiles = registry.columns.profiles
    left = [column(registry, "slices_free", "a")[profiles.find(name)] for name in ("1g.10gb", "1g.10gb+me", "3g.40gb")]  # type: ignore[index]
    assert left == [7, 5, 13]
    registry.unsay(one.uid, Source.CLAIMED)
    registry.unsay(two.uid, Source.CLAIMED)
    assert column(registry, "mig_row", "a")[:2] == [empty, empty]  # type: ignore[index]


def test_of_an_instance_that_is_in_no_table_every_engine_counts_as_used() -> None:
    registry = Registry(TABLES)
    registry.put_node(node("a", gpus=1, mig="0"))
    one, held = divided("p", "nvidia.com/mig-1g.10gb", (instance(0, 2, "1g.11gb"),))
    registry.say(one.uid, Source.OBSERVED, booking(one, "a", held))
    assert column(registry, "mig_row", "a")[0] == TABLES.row(H100, 0b100, (1,))  # type: ignore[index]


def test_shares_add_up_on_their_device() -> None:
    registry = Registry(TABLES)
    registry.put_node(node("a", gpus=2, mig="none"))
    one, held = divided("p", "tessera.dev/share", (share(0), share(1)), (share(0),))
    registry.say(one.uid, Source.CLAIMED, booking(one, "a", held))
    assert column(registry, "milli_free", "a")[:2] == [400, 700]  # type: ignore[index]
    assert column(registry, "memory_mib_free", "a")[:2] == [81559 - 4000, 81559 - 2000]  # type: ignore[index]
    assert column(registry, "use", "a")[:2] == [Use.SHARED, Use.SHARED]  # type: ignore[index]
    assert column(registry, "shares_free", "a") == 125
    registry.unsay(one.uid, Source.CLAIMED)
    assert column(registry, "milli_free", "a")[:2] == [1000, 1000]  # type: ignore[index]


def test_what_init_containers_share_counts_once() -> None:
    raw = raw_pod("p", 0)
    (app,) = raw["spec"]["containers"]
    raw["spec"]["initContainers"] = [
        app | {"name": name, "resources": {"limits": {"tessera.dev/share": "2"}}} for name in ("i0", "i1")
    ]
    app["resources"] = {"limits": {"tessera.dev/share": "1"}}
    raw["metadata"]["annotations"] = {"tessera.dev/gpu-milli": "300"}
    grants = (("i0", (share(1),)), ("i1", (share(1),)), (app["name"], (share(0),)))
    held = booking(read_pod(raw), "a", Allocation("id", 1, 1, "a", "exact", grants))
    assert sorted((part.slot, part.milli) for part in held.parts) == [(0, 300), (1, 300)]


def test_a_device_in_two_uses_is_taken_whole() -> None:
    registry = Registry(TABLES)
    registry.put_node(node("a", gpus=3, mig="2"))
    one, held = divided("p", "tessera.dev/share", (share(0), share(1), share(2)))
    registry.say(one.uid, Source.OBSERVED, booking(one, "a", held))
    other = pod("q", gpus=1)
    registry.say(other.uid, Source.OBSERVED, booking(other, "a", holding(0)))
    third, cut = divided("r", "nvidia.com/mig-1g.10gb", (instance(2, 0), instance(1, 0)))
    registry.say(third.uid, Source.OBSERVED, booking(third, "a", cut))
    assert column(registry, "use", "a")[:3] == [Use.WHOLE] * 3  # type: ignore[index]
    assert column(registry, "milli_free", "a")[:3] == [0, 0, 0]  # type: ignore[index]
    assert column(registry, "mig_row", "a")[:3] == [0, 0, 0]  # type: ignore[index]
    assert column(registry, "occupancy", "a")[:3] == [0xFFFF] * 3  # type: ignore[index]


def test_no_number_of_huge_shares_wraps_around() -> None:
    registry = Registry(TABLES)
    registry.put_node(node("a", gpus=1))
    for number in range(20):
        one, held = divided(f"p{number}", "tessera.dev/share", (share(0, 1000, 2**31 - 1),))
        registry.say(one.uid, Source.OBSERVED, booking(one, "a", held))
    assert column(registry, "memory_mib_free", "a")[0] < 0  # type: ignore[index]
    assert not registry.differences("a")


NAMES = st.sampled_from(["a", "b", "c", "d"])
EVENTS = st.one_of(
    st.tuples(
        *(st.just("node"), NAMES, st.sampled_from([0, 2, 8, 16])),
        *(st.sampled_from(["exact", "observed"]), st.sampled_from(["", "none", "0-1", "all"])),
    ),
    st.tuples(
        *(st.just("cut"), st.integers(0, 5), st.sampled_from(list(Source)), NAMES),
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 7), st.sampled_from(["1g.10gb", "1g.10gb+me", "3g.40gb"]))
        ),
    ),
    st.tuples(
        *(st.just("share"), st.integers(0, 5), st.sampled_from(list(Source)), NAMES),
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 1000), st.integers(1, 2**31 - 1))),
    ),
    st.tuples(st.just("gone"), NAMES),
    st.tuples(st.just("bound"), st.integers(0, 5), NAMES, st.integers(0, 4), st.booleans()),
    st.tuples(st.just("over"), st.integers(0, 5)),
    st.tuples(st.just("say"), st.integers(0, 5), st.sampled_from(list(Source)), NAMES, st.integers(0, 4)),
    st.tuples(st.just("unsay"), st.integers(0, 5), st.sampled_from(list(Source))),
)


def play(registry: Registry, event: tuple[object, ...]) -> None:
    match event:
        case ("node", str(name), int(gpus), str(mode), str(mig)):
            registry.put_node(node(name, gpus=gpus, mode=mode, mig=mig))
        case ("cut", int(number), Source() as source, str(name), list(cuts)):
            grants = tuple(instance(dev, start, profile, 4 if "3g" in profile else 1) for dev, start, profile in cuts)
            made, held = divided(f"p{number}", "nvidia.com/mig-1g.10gb", grants, on=name)
            registry.say(made.uid, source, booking(made, name, held))
        case ("share", int(number), Source() as source, str(name), list(parts)):
            made, held = divided(f"p{number}", "tessera.dev/share", tuple(share(*part) for part in parts), on=name)
            registry.say(made.uid, source, booking(made, name, held))
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
    registry = Registry(TABLES)
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
            if column_name == "slices_total":
                one, other = sorted(one[one > 0]), sorted(other[other > 0])  # so are those of profiles
            assert np.array_equal(one, other), (name, column_name)
    assert set(registry.columns.rows) == set(registry.nodes)
    used = [name for name in registry.columns.names if name]
    assert sorted(used) == sorted(registry.nodes)
    rank = live.rank[[registry.columns.rows[name] for name in sorted(used)]]
    assert (np.diff(rank) > 0).all()
