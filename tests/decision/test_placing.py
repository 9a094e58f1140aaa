"""Which container gets which device."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import Kind
from scheduler.decision.placing import Containers, DoesNotFit, place
from scheduler.model.allocation import Grant
from scheduler.model.pod import ContainerAsk, DeviceAsk, Request
from tests.drawing import ask, cluster, node


def request(*containers: tuple[str, int]) -> Request:
    """A pod whose containers ask (role, count) each; the count of the pod is the textbook formula."""
    own = sum(count for role, count in containers if role != "init")
    need = [own]
    for place_, (role, count) in enumerate(containers):
        if role == "init":
            need.append(count + sum(c for r, c in containers[:place_] if r == "sidecar"))
    asks = tuple(ContainerAsk(f"{role}-{i}", role, count) for i, (role, count) in enumerate(containers) if count)
    only = bool(asks) and all(each.role == "init" for each in asks)
    kind = Kind.WHOLE if asks else Kind.NONE
    devices = DeviceAsk(kind=kind, count=max(need), resource="nvidia.com/gpu", containers=asks, init_only=only)
    return Request(id="uid", namespace="ns", name="pod", workload="uid", arrival_us=0, devices=devices)


def placed(drawn: str, *containers: tuple[str, int], link: str = "", numa: str = "", uuids: bool = False) -> Containers:
    """Place on the second of three nodes, so that a wrong row shows."""
    snapshot = cluster("xxxx", drawn, "xxxx", links={1: link}, numa={1: numa})
    wanted = request(*containers)
    numbers = ask(wanted.devices.count, nodes=3, init_only=wanted.devices.init_only)
    return place(snapshot, 1, wanted, numbers, node=node(snapshot, 1, uuids=uuids))


def totals(containers: Containers) -> int:
    """How many devices, or instances on them, these containers hold together, each counted once."""
    grants = [grant for _, part in containers for grant in part]
    return len({(grant.dev, grant.start) for grant in grants if grant.dev >= 0}) + sum(
        grant.count for grant in grants if grant.dev < 0
    )


def devices(containers: Containers) -> dict[str, list[int]]:
    return {name: [grant.dev for grant in grants] for name, grants in containers}


@pytest.mark.parametrize(
    ("drawn", "containers", "expected"),
    [
        pytest.param("x.x.", [("app", 1)], {"app-0": [1]}, id="the lowest free one"),
        pytest.param(".!m?..", [("app", 3)], {"app-0": [0, 4, 5]}, id="neither broken nor in MIG mode nor a gap"),
        pytest.param("....", [("app", 2), ("app", 1)], {"app-0": [0, 1], "app-1": [2]}, id="two apps, own devices"),
        pytest.param("....", [("sidecar", 1), ("app", 1)], {"sidecar-0": [0], "app-1": [1]}, id="a sidecar keeps its"),
        pytest.param("....", [("init", 2), ("app", 2)], {"app-1": [0, 1]}, id="an init container reuses"),
        pytest.param("....", [("init", 3), ("app", 1)], {"init-0": [1, 2], "app-1": [0]}, id="and has a key for more"),
        pytest.param(
            "....",
            [("init", 2), ("init", 3), ("app", 1)],
            {"init-0": [1], "init-1": [1, 2], "app-2": [0]},
            id="init containers share what lies beyond",
        ),
        pytest.param(
            "....",
            [("sidecar", 1), ("init", 2), ("app", 1)],
            {"sidecar-0": [0], "init-1": [2], "app-2": [1]},
            id="a sidecar started before is not reused",
        ),
        pytest.param(
            "....", [("init", 2), ("sidecar", 1), ("app", 1)], {"sidecar-1": [0], "app-2": [1]}, id="a later one is"
        ),
    ],
)
def test_exact(drawn: str, containers: list[tuple[str, int]], expected: dict[str, list[int]]) -> None:
    assert devices(placed(drawn, *containers)) == expected


@pytest.mark.parametrize(
    ("containers", "expected"),
    [
        pytest.param([("app", 2)], {"app-0": 2}, id="a count"),
        pytest.param([("app", 2), ("app", 1)], {"app-0": 2, "app-1": 1}, id="a count each"),
        pytest.param([("init", 2), ("init", 4), ("app", 1)], {"init-0": 1, "init-1": 2, "app-2": 1}, id="adding up"),
        pytest.param([("init", 3)], {"init-0": 3}, id="only an init container"),
    ],
)
def test_observed(containers: list[tuple[str, int]], expected: dict[str, int]) -> None:
    answer = placed("observed ....", *containers)
    assert answer == tuple((name, (Grant(kind="whole", count=count),)) for name, count in expected.items())
    assert totals(answer) == request(*containers).devices.count


@pytest.mark.parametrize(
    ("drawn", "link", "numa", "expected"),
    [
        pytest.param("........", "00001111", "", [0, 1], id="one link group"),
        pytest.param("x..x....", "00001111", "", [1, 2], id="the smaller group that is large enough"),
        pytest.param(".....x.x", "00001111", "", [4, 6], id="and leaves the larger one whole"),
        pytest.param(".xxx....", "00001111", "", [4, 5], id="rather than the lowest two"),
        pytest.param(".x.x", "0000", "0011", [0, 2], id="one link group over two NUMA nodes"),
        pytest.param(".x..", "0000", "0011", [2, 3], id="one NUMA node within the link group"),
        pytest.param(".xx.", "0011", "", [0, 3], id="what there is, when no group is large enough"),
        pytest.param(".x..", "", "0011", [2, 3], id="NUMA alone"),
    ],
)
def test_near_devices_together(drawn: str, link: str, numa: str, expected: list[int]) -> None:
    assert devices(placed(drawn, ("app", 2), link=link, numa=numa)) == {"app-0": expected}


def test_uuids_are_written_once_they_are_known() -> None:
    assert [grant.uuid for _, grants in placed(".x.", ("app", 2), uuids=True) for grant in grants] == [
        "GPU-1-0",
        "GPU-1-2",
    ]
    assert [grant.uuid for _, grants in placed("..", ("app", 1)) for grant in grants] == [""]


def test_a_cpu_only_pod_has_no_containers() -> None:
    assert placed("xxxx") == ()
    assert totals(()) == 0


@pytest.mark.parametrize(
    ("drawn", "containers", "reason"),
    [
        pytest.param("xx.", [("app", 2)], "GpusBusy", id="busy"),
        pytest.param("..", [("app", 3)], "ExceedsNodeSize", id="too small"),
        pytest.param("..!", [("app", 3)], "GpuUnhealthy", id="broken"),
        pytest.param("foreign ..", [("app", 1)], "InventoryStale", id="an unnamed device"),
        pytest.param("..", [("init", 1)], "InvalidRequest", id="only an init container on an exact node"),
        pytest.param("hole ..", [("app", 1)], "InventoryStale", id="a hole"),
        pytest.param("observed x.", [("app", 2)], "GpusBusy", id="observed, busy"),
    ],
)
def test_a_node_that_no_longer_fits(drawn: str, containers: list[tuple[str, int]], reason: str) -> None:
    with pytest.raises(DoesNotFit, match=reason) as caught:
        placed(drawn, *containers)
    assert caught.value.reason == reason


@settings(max_examples=200, deadline=None)
@given(
    before=st.lists(st.tuples(st.sampled_from(["init", "sidecar"]), st.integers(0, 3)), max_size=4),
    apps=st.lists(st.tuples(st.just("app"), st.integers(0, 3)), min_size=1, max_size=3),
    drawn=st.lists(st.sampled_from(".......x!m"), min_size=12, max_size=16).map("".join),
)
def test_every_container_finds_enough_and_nobody_more(
    before: list[tuple[str, int]], apps: list[tuple[str, int]], drawn: str
) -> None:
    containers = [*before, *apps]
    wanted = request(*containers)
    if drawn.count(".") < wanted.devices.count or wanted.devices.init_only:
        return
    answer = placed(drawn, *containers)
    got = devices(answer)
    held = [dev for name, devs in got.items() if not name.startswith("init") for dev in devs]
    every = {dev for devs in got.values() for dev in devs}
    assert len(held) == len(set(held)), "app and sidecar containers have devices of their own"
    assert all(drawn[dev] == "." for dev in every)
    assert len(every) == totals(answer) == wanted.devices.count
    running: set[int] = set()  # of the sidecars that run already
    for number, (role, count) in enumerate(containers):
        name = f"{role}-{number}"
        mine = set(got.get(name, []))
        if role == "init":
            assert not mine & set(held), "its key holds only what lies beyond"
            assert len(mine | (set(held) - running)) >= count, "enough to run on"
            assert mine == set() or len(mine | (set(held) - running)) == count, "and no device more"
        else:
            assert len(mine) == count
            running |= mine if role == "sidecar" else set()
