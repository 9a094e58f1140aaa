"""For whom new nodes are asked: within quota, window and groups, as a whole, in order, and once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.geometry import placements, products
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import shape
from scheduler.ledger.quota import Quota, Usage, grow
from scheduler.model.node import Node
from scheduler.model.pod import Pod
from scheduler.model.queue import Queue
from scheduler.queueing.growth import AFTER_S, Growth, Template
from scheduler.queueing.turn import Unit
from tests.objects import raw_node, raw_pod

H100 = "NVIDIA-H100-80GB-HBM3"
T4 = "Tesla-T4"
SIZES = {"h100": 8, "t4": 4}
MINUTE_US = 60_000_000


def node(name: str, product: str, gpus: int, **labels: str) -> Node:
    read = read_node(raw_node(name, gpus=gpus, product=product, **labels), products())
    assert read is not None
    return read


def groups(most: int | None) -> tuple[Template, ...]:
    made = [node("h100", H100, SIZES["h100"], pool="h100"), node("t4", T4, SIZES["t4"], pool="t4")]
    plain = [replace(one, labels=tuple(pair for pair in one.labels if "hostname" not in pair[0])) for one in made]
    return tuple(Template(one, most) for one in plain)


@dataclass
class Ground:
    """Pods and what is so of the units they make."""

    pods: dict[str, Pod] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    unable: set[str] = field(default_factory=set)
    fitting: set[str] = field(default_factory=set)
    found: dict[str, int] = field(default_factory=dict)

    def waits(self, unit: Unit) -> bool:
        return self.gone.isdisjoint(unit.members)

    def members(self, unit: Unit) -> Sequence[Pod]:
        return [self.pods[uid] for uid in unit.members]

    def able(self, unit: Unit) -> bool:
        return unit.members[0] not in self.unable

    def fits(self, unit: Unit) -> bool:
        return unit.members[0] in self.fitting

    def placed(self, unit: Unit) -> int:
        return self.found.get(unit.members[0], 0)

    def unit(
        self, name: str, gpus: int, model: str = "", *, size: int = 1, queue: str = "a", spent: bool = False
    ) -> Unit:
        notes = {"tessera.dev/gpu-model": model} if model else {}
        read = [read_pod(raw_pod(f"{name}.{at}", gpus, annotations=notes)) for at in range(size)]
        self.pods |= {pod.uid: replace(pod, asked_us=7 * spent) for pod in read}
        ids, kinds = tuple(pod.uid for pod in read), tuple(shape(pod.request) for pod in read)
        amounts = {"gpu": gpus * size, "cpu": 4000 * size}
        return Unit(queue, (0, 0, "default", name), kinds, ids, amounts, amounts)


QUOTA = grow([Queue("root", nominal={"gpu": 24}), *(Queue(name, "root", autoscale=True) for name in "ab")])
FREE = grow([Queue(name, autoscale=True) for name in "ab"])
Line = list[tuple[Unit, str]]


def looked(  # noqa: PLR0917
    growth: Growth,
    line: Line,
    ground: Ground,
    at_s: float,
    window: int = 99,
    quota: Quota = FREE,
) -> list[str]:
    """Return the names of whom a node is asked for from this look on."""
    now = at_s, round(at_s * 1e6)
    found = growth.look(line, quota, Usage(), ground, now, window)
    return [ground.pods[uid].request.name for members in found for uid in members]


def asked(growth: Growth, line: Line, ground: Ground, *, window: int = 99, quota: Quota = FREE) -> list[str]:
    assert not looked(growth, line, ground, 100.0, window, quota)
    return looked(growth, line, ground, 100.0 + AFTER_S, window, quota)


def make(most: int | None = None) -> Growth:
    growth = Growth(groups(most), placements=placements())
    growth.settle({}, 1)
    return growth


UNITS = st.tuples(
    st.integers(1, 9),
    st.sampled_from(["", "H100", "T4"]),
    st.sampled_from([1, 1, 1, 2, 3]),
    st.sampled_from("ab"),
    st.sampled_from(["WaitingForCapacity", "WaitingBehindPriority", "", "WaitingForQuota", "ExceedsQuotaLimit"]),
    st.sets(st.sampled_from(["gone", "unable", "fitting", "spent"]), max_size=1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(UNITS, max_size=12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2))
def test_what_is_asked_for_fits_quota_window_and_groups_and_nobody_is_passed(
    drawn: list[tuple[int, str, int, str, str, set[str]]], window: int, most: int, there: int
) -> None:
    growth, ground, line = make(most), Ground(), Line()
    live = {f"n{at}": node(f"n{at}", "", 0, pool="h100") for at in range(there)}
    growth.settle(live, 2)
    for at, (gpus, model, size, queue, word, marks) in enumerate(drawn):
        unit = ground.unit(f"u{at:02}", gpus, model, size=size, queue=queue, spent="spent" in marks)
        line.append((unit, word))
        for mark, group in (("gone", ground.gone), ("unable", ground.unable), ("fitting", ground.fitting)):
            if mark in marks:
                group.add(unit.members[0])
    names = asked(growth, line, ground, window=window, quota=QUOTA)
    units = {unit.members: (unit, word, data) for (unit, word), data in zip(line, drawn, strict=True)}
    out = [one for members, one in units.items() if growth.asks(members)]
    assert sorted(names) == sorted(ground.pods[uid].request.name for unit, _, _ in out for uid in unit.members)
    assert all(set(unit.members) <= growth.asked.keys() for unit, _, _ in out), "a unit as a whole"
    assert len(growth.asked) <= window
    assert sum(unit.most["gpu"] for unit, _, _ in out) <= 24
    for unit, word, (gpus, model, _, _, _, marks) in out:
        assert word in {"WaitingForCapacity", "WaitingBehindPriority", ""}
        assert not marks & {"gone", "spent"}
        assert not (marks == {"fitting"} and word != "WaitingForCapacity")
        assert gpus <= (SIZES["t4"] if model == "T4" else SIZES["h100"]), unit
    _packed(growth, ground, most, there)
    for before, (unit, word) in enumerate(line):
        passed = [other for other, said in line[before + 1 :] if (other.queue, other.kind) == (unit.queue, unit.kind)]
        candidate = word == "WaitingForCapacity" and not drawn[before][5]
        if candidate and not growth.asks(unit.members):
            assert not any(growth.asks(other.members) for other in passed), "one passed another that is the same"
    for uid in list(growth.asked):
        growth.forget(uid)
    assert not growth._of
    assert not growth._coming.nodes


def _packed(growth: Growth, ground: Ground, most: int, there: int) -> None:
    """No group gets more nodes than it may, and none of them is asked for more GPUs than it has."""
    sizes = Counter(growth.templates[at].node.name for at in growth._of.values())
    assert sizes["h100"] <= max(most - there, 0)
    assert sizes["t4"] <= most
    for name, at in growth._of.items():
        wanted = [ground.pods[uid].request.devices for uid in growth._coming.holders(name)]
        group = growth.templates[at].node.name
        assert 0 < sum(one.count for one in wanted) <= SIZES[group]
        assert all(not one.models or group in one.models for one in wanted)


def test_a_new_nodes_masks_are_those_of_any_node() -> None:
    growth, ground = make(), Ground()
    takes = {
        (8, "H100"): [True, False],
        (4, ""): [True, True],
        (5, "T4"): [False, False],
        (9, ""): [False, False],
    }
    for (gpus, model), expected in takes.items():
        unit = ground.unit(f"p{gpus}{model}", gpus, model)
        assert growth.takes(ground.members(unit)[0].request).tolist() == expected


def test_members_that_found_a_node_need_no_new_one() -> None:
    growth, ground = make(2), Ground()
    line = [(ground.unit("ring", 8, size=4), "WaitingForCapacity")]
    assert asked(growth, line, ground) == []
    ground.found["uid-ring.0"] = 2
    assert len(looked(growth, line, ground, 140.0)) == 4


def test_who_fits_for_a_moment_begins_anew() -> None:
    growth, ground = make(), Ground()
    line = [(ground.unit("one", 8), "")]
    assert asked(growth, line, ground, window=0) == []
    ground.fitting.add("uid-one.0")
    assert looked(growth, line, ground, 131.0) == []
    ground.fitting.clear()
    assert looked(growth, line, ground, 132.0) == []
    assert growth.due_s(132.0, 0) == AFTER_S
    assert looked(growth, line, ground, 162.0) == ["one.0"]


def test_who_was_asked_for_in_vain_is_not_asked_for_again_and_gives_the_window_back() -> None:
    growth, ground = make(), Ground()
    first, second = ground.unit("first", 8), ground.unit("second", 8)
    line = [(first, "WaitingForCapacity"), (second, "")]
    assert asked(growth, line, ground, window=1) == ["first.0"]
    since_us = growth.asked["uid-first.0"]
    assert growth.due_s(200.0, since_us + MINUTE_US) == pytest.approx(14 * 60)
    growth.expire(since_us + 15 * MINUTE_US)
    assert not growth.asked
    ground.pods["uid-first.0"] = replace(ground.pods["uid-first.0"], asked_us=since_us)
    assert not growth.keep("uid-first.0", since_us, since_us + 15 * MINUTE_US)
    assert looked(growth, line, ground, 1100.0, window=1) == ["second.0"]


def test_a_gang_of_which_the_last_process_had_shown_one_is_shown_as_a_whole() -> None:
    growth, ground = make(), Ground()
    unit = ground.unit("ring", 8, size=3)
    assert growth.keep("uid-ring.1", 5 * MINUTE_US, 6 * MINUTE_US)
    assert not growth.keep("uid-ring.1", 5 * MINUTE_US, 6 * MINUTE_US), "no news"
    assert looked(growth, [(unit, "WaitingForCapacity")], ground, 360.0) == ["ring.0", "ring.2"]
    assert set(growth.asked.values()) == {5 * MINUTE_US}


def test_what_is_asked_for_is_owed_to_whoever_is_before() -> None:
    """The first cannot be asked for, and what it needs of the quota is not spent on a machine for the second."""
    ground, quota = Ground(), grow([Queue("a", nominal={"gpu": 8}, autoscale=True)])
    line = [(ground.unit("first", 8, "A100"), "WaitingForCapacity"), (ground.unit("second", 8), "")]
    assert asked(make(), line, ground, quota=quota) == []
    large = [(ground.unit("gang", 4, "A100", size=2), "ExceedsClusterSize"), line[1]]
    assert asked(make(), large, ground, quota=quota) == ["second.0"], "which can never run, and is owed nothing"
    ground.unable.add("uid-first.0")
    assert asked(make(), line, ground, quota=quota) == ["second.0"]


def test_a_models_quota_is_charged_as_on_the_new_node() -> None:
    ground, quota = Ground(), grow([Queue("a", nominal={"gpu": 16, "H100": 4}, autoscale=True)])
    line = [(ground.unit("any", 8), "WaitingForCapacity"), (ground.unit("small", 4, "H100"), "")]
    assert asked(make(), line, ground, quota=quota) == []
    assert asked(make(), line[1:], ground, quota=quota) == ["small.0"]
    none = grow([Queue("a", nominal={"gpu": 16, "H100": 0}, autoscale=True)])
    both = [(ground.unit("both", 4), "WaitingForCapacity"), (ground.unit("cheap", 4, "T4"), "")]
    assert asked(make(), both[:1], ground, quota=none) == [], "nobody says which group would grow for it"
    assert asked(make(), both[1:], ground, quota=none) == ["cheap.0"]


@pytest.mark.parametrize(("labels", "mine"), [({"pool": "h100"}, True), ({"pool": "else"}, False), ({}, False)])
def test_a_node_is_known_as_one_of_its_group_before_its_devices_are_there(labels: dict[str, str], mine: bool) -> None:
    growth, ground = make(), Ground()
    growth.settle({"new": node("new", "", 0, **labels), "other": node("other", "", 0)}, 2)
    request = ground.members(ground.unit("one", 8))[0].request
    assert growth.awaited([request], {"new": 0, "other": 2}, 3).tolist() == [mine, False, False]
    small = ground.members(ground.unit("two", 4, "T4"))[0].request
    assert not growth.awaited([small], {"new": 0}, 3).any()


def test_nobody_asks_past_a_gang_that_waits_for_the_window_unless_it_never_could() -> None:
    growth, ground = make(), Ground()
    line = [(ground.unit(name, 8, size=size), "") for name, size in (("two", 2), ("three", 3), ("one", 1))]
    assert asked(growth, line, ground, window=3) == ["two.0", "two.1"]
    assert asked(make(), line, ground, window=2) == ["two.0", "two.1"]
    assert asked(make(), line[1:], ground, window=2) == ["one.0"]
