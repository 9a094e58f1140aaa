"""Which MIG instances and shares a pod gets on an exact node; and that the masks promise exactly that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import Ask, Kind, Snapshot, empty_mix
from policies.mig import least_loss, slice_fit
from policies.sharing import fill_tightest, share_fit
from scheduler import geometry
from scheduler.decision.placing import Containers, DoesNotFit, place
from scheduler.inventory.asks import Asks
from scheduler.inventory.registry import Registry
from scheduler.model.allocation import Grant
from scheduler.model.pod import ContainerAsk, DeviceAsk, Request
from tests.drawing import KEYS, ask, cluster, node
from tests.policies.oracle import serves

TABLES = geometry.placements()


def request(kind: Kind, *containers: tuple[str, int], profile: str = "", milli: int = 0, mib: int = 0) -> Request:
    """A pod whose containers ask (role, count) each; an init container asks no more than the others together."""
    asks = tuple(ContainerAsk(f"{role}-{i}", role, count) for i, (role, count) in enumerate(containers))
    devices = DeviceAsk(
        kind=kind,
        count=sum(count for role, count in containers if role != "init"),
        profile=profile,
        memory_mib=mib,
        milli=milli,
        containers=asks,
    )
    return Request(id="uid", namespace="ns", name="pod", workload="uid", arrival_us=0, devices=devices)


def numbers(wanted: Request, snapshot: Snapshot, models: tuple[str, ...] = ()) -> Ask:
    """The Ask of a request on a drawn cluster, whose codes are not those of a registry."""
    devices, more = wanted.devices, dict[str, Any]()
    if devices.kind == Kind.MIG:
        more = {"profile": devices.profile}
    elif devices.kind == Kind.SHARE:
        made = Asks(Registry()).ask(wanted)
        sizes = {"device_milli": made.device_milli, "device_mib": made.device_mib, "parts": made.parts}
        more = {"kind": Kind.SHARE, **sizes}
    return ask(devices.count, nodes=snapshot.nodes, models=models, **more)


def placed(snapshot: Snapshot, wanted: Request, models: tuple[str, ...] = ()) -> Containers:
    return place(snapshot, 0, wanted, numbers(wanted, snapshot, models), node=node(snapshot, 0, uuids=True))


def instances(containers: Containers) -> list[tuple[int, int]]:
    return [(grant.dev, grant.start) for _, grants in containers for grant in grants]


@pytest.mark.parametrize(
    ("drawn", "cut", "profile", "count", "expected"),
    [
        pytest.param("m", {}, "1g.10gb", 1, [(0, 6)], id="a small one where it harms least"),
        pytest.param("m", {}, "3g.40gb", 2, [(0, 4), (0, 0)], id="two on one device"),
        pytest.param(".mm", {(0, 2): "3g.40gb@0"}, "3g.40gb", 1, [(2, 4)], id="the device that is begun"),
        pytest.param("mm", {(0, 1): "2g.20gb@0"}, "7g.80gb", 1, [(0, 0)], id="the device that is empty"),
        pytest.param("m.!m", {(0, 0): "4g.40gb@0"}, "4g.40gb", 1, [(3, 0)], id="another one when it is full"),
        pytest.param("mm", {(0, 0): "1g.10gb+me@0"}, "1g.10gb+me", 1, [(1, 6)], id="one media engine each"),
        pytest.param("RTX m", {}, "1g.24gb+gfx", 4, [(0, 0), (0, 3), (0, 6), (0, 9)], id="12 slices in steps of 3"),
        pytest.param(
            "RTX m", {(0, 0): "1g.24gb+me.all@9"}, "2g.48gb-me", 1, [(0, 0)], id="without engines, where none is"
        ),
        pytest.param("A30 m", {(0, 0): "2g.12gb+me@2"}, "1g.6gb", 2, [(0, 0), (0, 1)], id="A30"),
        pytest.param("A100 m", {}, "1g.10gb", 1, [(0, 6)], id="the double 1g, where no 2g may start"),
    ],
)
def test_instances(
    drawn: str, cut: dict[tuple[int, int], str], profile: str, count: int, expected: list[tuple[int, int]]
) -> None:
    snapshot = cluster(drawn, "xxxx", cut=cut)
    answer = placed(snapshot, request(Kind.MIG, ("app", count), profile=profile))
    assert sorted(instances(answer)) == sorted(expected)
    for _, grants in answer:
        for grant in grants:
            model = KEYS[next(word for word in (*drawn.split(), "H100") if word in KEYS)]
            shape = TABLES.shape(model, profile)
            assert shape is not None
            assert grant == Grant("mig", grant.dev, 1, f"GPU-0-{grant.dev}", profile, grant.start, shape.size)


def test_instances_go_to_the_containers_in_turn() -> None:
    wanted = request(Kind.MIG, ("init", 2), ("sidecar", 1), ("app", 1), ("app", 1), profile="2g.20gb")
    answer = placed(cluster("m"), wanted)
    assert [(name, len(grants)) for name, grants in answer] == [("sidecar-1", 1), ("app-2", 1), ("app-3", 1)]
    assert sorted(instances(answer)) == [(0, 0), (0, 2), (0, 4)]


def test_observed_nodes_are_told_a_number_of_slices() -> None:
    wanted = request(Kind.MIG, ("app", 2), ("app", 1), profile="1g.10gb")
    answer = placed(cluster("observed 1g.10gb=3 ...."), wanted)
    assert answer == (
        ("app-0", (Grant("mig", count=2, profile="1g.10gb"),)),
        ("app-1", (Grant("mig", count=1, profile="1g.10gb"),)),
    )


@pytest.mark.parametrize(
    ("drawn", "wanted", "reason"),
    [
        ("MM", request(Kind.MIG, ("app", 1), profile="1g.10gb"), "MigProfileUnplaceable"),
        ("mm 1g.10gb=0/3", request(Kind.MIG, ("app", 1), profile="1g.10gb"), "MigProfileUnplaceable"),
        ("..", request(Kind.MIG, ("app", 1), profile="1g.10gb"), "MigModeOff"),
        ("mm", request(Kind.MIG, ("app", 3), profile="7g.80gb"), "ExceedsNodeSize"),
        ("mm", request(Kind.MIG, ("app", 1), profile="1g.11gb"), "NoSuchMigProfile"),
        ("observed 2g.20gb=1 .", request(Kind.MIG, ("app", 2), profile="2g.20gb"), "ExceedsNodeSize"),
        ("observed 2g.20gb=1/2 .", request(Kind.MIG, ("app", 2), profile="2g.20gb"), "MigProfileUnplaceable"),
        ("s.", request(Kind.SHARE, ("app", 2), milli=600), "GpuMemoryShort"),
        ("observed ..", request(Kind.SHARE, ("app", 1), milli=600), "SharingNotAllowed"),
    ],
)
def test_a_node_that_does_not_fit(drawn: str, wanted: Request, reason: str) -> None:
    *front, last = drawn.split()
    words = [*front, last] if set(last) <= set(".xsmM!?") else [last, *front]
    with pytest.raises(DoesNotFit) as caught:
        placed(cluster(" ".join(words)), wanted)
    assert caught.value.reason == reason


SMALL = ["1g.6gb", "1g.6gb+me", "2g.12gb", "2g.12gb+me", "4g.24gb"]
LARGE = ["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]


@st.composite
def divided(draw: st.DrawFn) -> tuple[Snapshot, Request, int]:
    """A node of devices cut at random (legally), an ask, and how many instances fit by trying."""
    model, names = draw(st.sampled_from([("A30", SMALL), ("H100", LARGE)]))
    key, wanted = KEYS[model], draw(st.sampled_from(names))
    cut: dict[tuple[int, int], str] = {}
    room = 0
    chars = draw(st.lists(st.sampled_from("mmm.x!"), min_size=1, max_size=4))
    for slot, char in enumerate(chars):
        if char != "m":
            continue
        held: list[tuple[str, int]] = []
        for _ in range(draw(st.integers(0, 4))):
            free = [one for name in names for one in _free(key, held, name)]
            if free:
                held.append(draw(st.sampled_from(free)))
        cut[0, slot] = " ".join(f"{name}@{start}" for name, start in held)
        while free := _free(key, held, wanted):
            held.append(free[0])
            room += 1
    snapshot = cluster(f"{model} {''.join(chars)}", cut=cut)
    return snapshot, request(Kind.MIG, ("app", draw(st.integers(1, 6))), profile=wanted), room


def _free(model: str, held: Sequence[tuple[str, int]], profile: str) -> list[tuple[str, int]]:
    """Where one instance more may lie beside those held, by slices and engines."""
    shapes = {name: TABLES.shape(model, name) for name in (*SMALL, *LARGE)}
    new = shapes[profile]
    assert new is not None
    used = [shape for name, _ in held if (shape := shapes[name])]
    for engine, room in enumerate(TABLES.engines(model)):
        if sum(shape.engines[engine] for shape in used) + new.engines[engine] > room:
            return []
    taken = {s for (_, start), shape in zip(held, used, strict=True) for s in range(start, start + shape.size)}
    return [(profile, start) for start in new.starts if not taken & set(range(start, start + new.size))]


@settings(max_examples=300, deadline=None)
@given(divided())
def test_instances_fit_exactly_where_trying_finds_room(world: tuple[Snapshot, Request, int]) -> None:
    snapshot, wanted, room = world
    numbers_ = numbers(wanted, snapshot)
    assert slice_fit(snapshot, numbers_, empty_mix(1)).tolist() == [room >= wanted.devices.count]
    if room < wanted.devices.count:
        return
    answer = placed(snapshot, wanted)
    assert answer == placed(snapshot, wanted)
    taken = Counter[tuple[int, int]]()
    for _, grants in answer:
        for grant in grants:
            assert snapshot.mig_mode[grant.dev, 0]
            taken.update((grant.dev, slice_) for slice_ in range(grant.start, grant.start + grant.size))
    assert max(taken.values()) == 1
    assert not any(int(snapshot.occupancy[dev, 0]) >> slice_ & 1 for dev, slice_ in taken)
    assert sum(len(grants) for _, grants in answer) == wanted.devices.count


def test_the_best_node_is_the_one_where_an_instance_costs_least() -> None:
    snapshot = cluster("mm", "mm", "MM", "observed 3g.40gb=1 .", "..", cut={(1, 0): "3g.40gb@0"})
    worth = least_loss(snapshot, ask(1, nodes=5, profile="3g.40gb"), empty_mix(1)).tolist()
    assert worth[3] == 1.0
    assert worth[1] > worth[0] > worth[2] == worth[4] == 0.0


@pytest.mark.parametrize(
    ("drawn", "wanted", "expected"),
    [
        pytest.param("..", request(Kind.SHARE, ("app", 1), mib=33), {"app-0": [(0, 330, 33)]}, id="by memory"),
        pytest.param(
            "..", request(Kind.SHARE, ("app", 1), milli=5), {"app-0": [(0, 5, 1)]}, id="by time, at least 1 MiB"
        ),
        pytest.param(".", request(Kind.SHARE, ("app", 1), milli=1, mib=99), {"app-0": [(0, 1, 99)]}, id="by both"),
        pytest.param("..s", request(Kind.SHARE, ("app", 1), milli=500), {"app-0": [(2, 500, 50)]}, id="the tightest"),
        pytest.param(
            ".xms!.",
            request(Kind.SHARE, ("app", 3), milli=10),
            {"app-0": [(3, 10, 1), (0, 10, 1), (5, 10, 1)]},
            id="N on N",
        ),
        pytest.param(
            "s.",
            request(Kind.SHARE, ("app", 1), ("app", 1), milli=250),
            {"app-0": [(0, 250, 25)], "app-1": [(0, 250, 25)]},
            id="two containers may meet",
        ),
        pytest.param(
            "s.",
            request(Kind.SHARE, ("app", 1), ("app", 2), milli=500),
            {"app-0": [(1, 500, 50)], "app-1": [(1, 500, 50), (0, 500, 50)]},
            id="the larger container first where the tightest is not enough",
        ),
        pytest.param(
            "s.",
            request(Kind.SHARE, ("init", 1), ("app", 1), ("app", 1), milli=250),
            {"app-1": [(0, 250, 25)], "app-2": [(1, 250, 25)]},
            id="apart where an init container reuses them",
        ),
    ],
)
def test_shares(drawn: str, wanted: Request, expected: dict[str, list[tuple[int, int, int]]]) -> None:
    answer = placed(cluster(drawn), wanted)
    assert {name: [(g.dev, g.milli, g.mib) for g in grants] for name, grants in answer} == expected
    assert {grant.kind for _, grants in answer for grant in grants} == {"share"}


@settings(max_examples=300, deadline=None)
@given(
    drawn=st.lists(st.sampled_from("..sssxm!"), min_size=1, max_size=5).map("".join),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    size=st.sampled_from([(0, 7), (0, 50), (120, 0), (250, 0), (500, 10), (10, 60)]),
)
def test_shares_fit_exactly_where_trying_finds_a_way(drawn: str, counts: list[int], size: tuple[int, int]) -> None:
    snapshot, (milli, mib) = cluster(drawn), size
    wanted = request(Kind.SHARE, *(("app", count) for count in counts), milli=milli, mib=mib)
    need_milli, need_mib = milli or max(1, mib * 10), mib or max(1, milli // 10)
    rooms = [
        min({".": 1000, "s": 500}.get(c, 0) // need_milli, {".": 100, "s": 50}.get(c, 0) // need_mib) for c in drawn
    ]
    fits = serves(rooms, tuple(counts))
    assert share_fit(snapshot, numbers(wanted, snapshot), empty_mix(1)).tolist() == [fits]
    if not fits:
        return
    answer = placed(snapshot, wanted)
    taken = Counter(grant.dev for _, grants in answer for grant in grants)
    assert all(count <= rooms[dev] for dev, count in taken.items())
    for (_, grants), count in zip(answer, counts, strict=True):
        assert len({grant.dev for grant in grants}) == len(grants) == count
        assert {(grant.milli, grant.mib) for grant in grants} == {(need_milli, need_mib)}


def test_the_best_node_for_a_share_is_the_tightest() -> None:
    snapshot = cluster("..", ".s", "x", "mm")
    scores = fill_tightest(
        snapshot, numbers(request(Kind.SHARE, ("app", 1), milli=400), snapshot), empty_mix(1)
    ).tolist()
    assert scores == pytest.approx([0.4, 0.9, 0.0, 0.0])
