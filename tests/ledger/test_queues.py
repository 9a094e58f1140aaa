from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.intake.queue import read_queue
from scheduler.ledger.queues import Queues
from scheduler.ledger.quota import Usage, charge
from scheduler.ledger.standing import line_of, standings
from scheduler.model.node import Node
from scheduler.model.pod import Expression, Pod
from scheduler.model.queue import Queue, Selector, written
from scheduler.model.reservation import Row, State
from tests.ledger.lives import row_in
from tests.objects import PRODUCT, raw_node, raw_pod

TEAM = Selector((("team", "a"),))


def queues(*made: Queue) -> Queues:
    found = Queues()
    found.replace((one, "") for one in made)
    return found


def node(name: str = "gpu-1") -> Node:
    found = read_node(raw_node(name), {PRODUCT: "H100-80"})
    assert found is not None
    return found


def pod(name: str, gpus: int = 2) -> Pod:
    return read_pod(raw_pod(name, gpus, uid=name))


def bound(name: str, queue: str, **more: object) -> Row:
    return replace(row_in(State.BOUND, name, queue=queue), allocation="", **more)  # type: ignore[arg-type]


def test_everybody_may_use_the_built_in_queue() -> None:
    assert Queues().refusal("default", "anywhere") == ""
    assert Queues().refusal("vision", "anywhere") == "QueueNotFound"


def test_who_may_use_a_queue_follows_the_labels_as_they_are_now() -> None:
    made = queues(Queue("mine", namespaces=TEAM), Queue("none"))
    assert made.refusal("mine", "x") == "NotAuthorized"
    before = made.generation
    made.put_namespace("x", {"team": "a"})
    assert made.generation > before, "what was refused may pass now"
    assert (made.refusal("mine", "x"), made.refusal("none", "x")) == ("", "NotAuthorized")
    assert made.namespaces("mine") == ["x"]
    before = made.generation
    made.put_namespace("x", {"team": "a"})
    assert made.generation == before, "nothing has changed"
    made.put_namespace("x", {"team": "b"})
    assert made.refusal("mine", "x") == "NotAuthorized"
    made.put_namespace("x", {"team": "a"})
    made.drop_namespace("x")
    assert made.refusal("mine", "x") == "NotAuthorized"


def test_an_unknown_namespace_is_not_taken_for_one_without_labels() -> None:
    made = queues(Queue("others", namespaces=Selector((), (Expression("team", "DoesNotExist"),))))
    assert made.refusal("others", "new") == "NotAuthorized"
    made.put_namespace("new", {})
    assert made.refusal("others", "new") == ""


def test_a_stopped_queue_and_those_below_admit_nothing() -> None:
    made = queues(Queue("top", stopped=True), Queue("low", "top", namespaces=Selector()))
    assert made.refusal("low", "x") == "QueueStopped"
    made.put(Queue("top"))
    assert made.refusal("low", "x") == ""


def test_a_queue_that_is_wrong_says_so_and_is_corrected() -> None:
    made = queues(Queue("low", "top", namespaces=Selector()))
    assert made.refusal("low", "x") == "QueueStopped"
    assert made.wrong == {"low": "spec.parent: there is no queue top; create it, or name another one."}
    made.put(Queue("top"))
    assert (made.refusal("low", "x"), made.wrong) == ("", {})
    made.put(Queue("low", stopped=True), "spec.weight is wrong")
    assert made.wrong == {"low": "spec.weight is wrong"}
    made.drop("low")
    assert (made.refusal("low", "x"), made.wrong, made.told("low")) == ("QueueNotFound", {}, None)


def test_a_status_that_comes_back_changes_nothing() -> None:
    made = queues(Queue("a", resource_version="1"))
    before = made.generation, made.quota
    made.put(Queue("a", resource_version="2"))
    assert (made.generation, made.quota) == before
    assert made.told("a") == Queue("a", resource_version="2")
    made.put(Queue("a", resource_version="3", weight=2))
    assert made.generation > before[0]


def test_usage_is_what_rows_hold_of_the_live_pods_and_nodes() -> None:
    made = queues(Queue("top"), Queue("a", "top", nominal={"gpu": 4, "H100": 3}))
    rows = {
        "one": bound("one", "a", node="gpu-1"),
        "two": bound("two", "top", node="gone"),
        "waits": replace(row_in(State.QUEUED, "waits"), queue="a"),
        "past": replace(row_in(State.RELEASED, "past"), queue="a"),
    }
    pods, nodes = {name: pod(name) for name in rows}, {"gpu-1": node()}
    usage = made.usage(rows, pods, nodes)
    one = {"cpu": 4000, "memory": 8192, "gpu": 2, "H100": 2}
    assert {key: amount for (queue, key), amount in usage.held.items() if queue == "a"} == one
    assert usage.held["top", "gpu"] == 4
    assert ("a", "H100") in usage.counted
    assert made.pending(rows) == {"a": 1, "top": 1}


def test_a_charge_is_made_anew_when_what_it_was_made_from_changes() -> None:
    made = queues(Queue("a", nominal={"gpu": 4}))
    rows, pods, nodes = {"one": bound("one", "a", node="gpu-1")}, {"one": pod("one")}, {"gpu-1": node()}
    assert made.usage(rows, pods, nodes).held["a", "gpu"] == 2
    assert made.usage(rows, {"one": pod("one", 3)}, nodes).held["a", "gpu"] == 3
    made.put(Queue("a", nominal={"H100": 4}))
    assert made.usage(rows, pods, nodes).held["a", "H100"] == 2
    assert ("a", "H100") not in made.usage(rows, pods, {}).held
    assert made.usage({}, pods, nodes).held == {}


def test_a_row_whose_pod_is_unknown_counts_what_the_ledger_says() -> None:
    made = queues(Queue("a", nominal={"gpu": 4}))
    assert made.usage({"one": bound("one", "a", node="gpu-1")}, {}, {}).held["a", "cpu"] == 4000


def test_a_standing_says_what_people_ask() -> None:
    made = queues(
        Queue("top"),
        Queue("a", "top", nominal={"cpu": 6500, "H100": 8, "gpu": 1}),
        Queue("b", "top", nominal={"gpu": 3}),
    )
    rows = {"one": bound("one", "a", node="gpu-1"), "waits": replace(row_in(State.QUEUED, "waits"), queue="a")}
    usage = made.usage(rows, {"one": pod("one")}, {"gpu-1": node()})
    found = standings(made, usage, made.pending(rows))("a")
    assert found.shown_used() == "gpu 2/1, H100 2/8, cpu 4/6500m"
    assert found.shown_borrowed() == "gpu 1"
    view = found.view()
    assert (view["used"]["gpu"], view["used"]["memory"], view["pending"]) == (2, "8Gi", 1)
    assert (view["available"]["gpu"], view["potential"]["gpu"], view["borrowed"]) == (2, 4, {"gpu": 1})
    assert (view["ready"], view["stopped"], view["parent"]) == (True, False, "top")


def test_a_queue_whose_own_is_lent_says_so_and_one_that_is_closed_may_take_nothing() -> None:
    tree = [Queue("top"), Queue("a", "top", nominal={"gpu": 2}), Queue("b", "top", nominal={"gpu": 16})]
    made = queues(*tree)
    usage = Usage()
    charge(made.quota, usage, "b", {"gpu": 8})
    assert standings(made, usage, {})("b").view()["lent"] == {}
    charge(made.quota, usage, "a", {"gpu": 10})
    view = standings(made, usage, {})("b").view()
    assert (view["used"], view["nominal"], view["lent"], view["available"]) == (
        {"gpu": 8},
        {"gpu": 16},
        {"gpu": 8},
        {"gpu": 0},
    )
    assert standings(made, usage, {})("a").view()["lent"] == {}
    stopped = queues(*tree[:2], Queue("b", "top", nominal={"gpu": 16}, stopped=True))
    assert standings(stopped, Usage(), {})("b").view()["available"] == {"gpu": 0}
    assert standings(stopped, Usage(), {})("a").view()["available"] == {"gpu": 18}
    wrong = Queues()
    wrong.replace([(Queue("a", nominal={"gpu": 2}), "spec.weight must be a whole number")])
    assert standings(wrong, Usage(), {})("a").view()["available"] == {"gpu": 0}


def test_the_line_is_in_the_order_of_the_turn() -> None:
    waiting = [
        replace(row_in(State.QUEUED, name), queue="a", priority=priority, arrival_us=arrival)
        for name, priority, arrival in [("late", 0, 9), ("early", 0, 1), ("urgent", 5, 99), ("early-b", 0, 1)]
    ]
    other = row_in(State.QUEUED, "other")
    assert [row.name for row in line_of([*waiting, other, bound("x", "a")], "a")] == [
        "urgent",
        "early",
        "early-b",
        "late",
    ]


@pytest.mark.parametrize(
    ("key", "amount", "text"),
    [
        ("cpu", 1500, "1500m"),
        ("cpu", 2000, "2"),
        ("memory", 0, "0Mi"),
        ("memory", 512, "512Mi"),
        ("memory", 2048, "2Gi"),
        ("memory", 1 << 20, "1Ti"),
        ("gpu", 7, 7),
    ],
)
def test_amounts_are_written_as_they_are_read(key: str, amount: int, text: int | str) -> None:
    assert written(key, amount) == text
    spec = {"nominal": {key: text}}
    assert read_queue({"metadata": {"name": "a"}, "spec": spec}).nominal == {key: amount}
