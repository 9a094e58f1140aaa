"""The parts of `bench throughput` that need no control plane: its pods, its clock, its report."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest

from bench.devices import GPU
from bench.oracle import demand
from bench.queue_oracle import queue_of
from bench.realcluster import TESSERA
from bench.throughput import (
    ARMS,
    SIZES,
    Settings,
    ThroughputError,
    _Bench,
    concerns,
    first_reservation_s,
    pods_of,
    written_as,
)

Json = dict[str, Any]


def gates(pod: Json) -> list[str]:
    return [gate["name"] for gate in pod["spec"]["schedulingGates"]]


def test_pods_of_the_queue_way_have_both_gates_and_wait_in_the_queue_of_the_driver() -> None:
    plain, held = pods_of("p", 12), pods_of("p", 12, held=True, queue="throughput")
    assert {tuple(gates(pod)) for pod in plain} == {("bench.tessera.dev/hold",)}
    assert {tuple(gates(pod)) for pod in held} == {("bench.tessera.dev/hold", "tessera.dev/hold")}
    assert ({queue_of(pod) for pod in plain}, {queue_of(pod) for pod in held}) == ({"default"}, {"throughput"})
    assert [demand(pod)[GPU] for pod in plain] == [demand(pod)[GPU] for pod in held] == [*SIZES, *SIZES]


def line(event: str, name: str, at: int) -> Json:
    return {"event": event, "name": name, "at": at}


def test_the_clock_starts_with_the_first_reservation_of_its_own_pods() -> None:
    lines = [
        line("reserve", "warm", 1_000_000),
        line("submit", "a", 2_000_000),
        line("reserve", "b", 3_500_000),
        line("reserve", "a", 3_250_000),
        line("bind", "a", 4_000_000),
    ]
    assert first_reservation_s(lines, {"a", "b"}) == 3.25
    with pytest.raises(ThroughputError, match="no reservation"):
        first_reservation_s(lines, {"c"})


def told(way: str, writes: list[float], wrong: list[str] | None = None, refused: float = 0.0) -> Json:
    rates = {"tessera": [80.0, 82.0, 10.0], "plain": [100.0, 90.0, 110.0]}
    rates |= {"tessera_100": [75.0, 60.0, 90.0], "plain_100": [20.0, 25.0, 30.0]}
    of = {arm.name: rates[arm.name] for arm in ARMS[way]}
    nobody = cast("Any", None)
    bench = _Bench(
        Settings(10, 6, 3, way),
        nobody,
        nobody,
        nobody,
        {},
        print,
        rates=of,
        writes=writes,
        cpu_ms={TESSERA: [2.0, 3.0, 7.0]},
    )
    bench.refused = [refused]
    bench.limits = [200.0, 300.0, 100.0]
    bench.kinds, bench.wrong = Counter({"patch pods": 6}), wrong or []
    return bench.report()


def test_direct_arms_are_compared_at_the_same_sampling() -> None:
    report = told("direct", [1.0, 1.0])
    assert (report["ratio"], report["ratio_100"], report["ok"]) == (0.8, 3.0, True)
    assert not told("direct", [1.0, 1.01])["ok"]


def test_the_queue_way_is_measured_once_and_compared_with_both() -> None:
    report = told("queue", [3.02, 3.0])
    assert [arm.name for arm in ARMS["queue"]] == ["tessera_100", "plain", "plain_100"]
    assert (report["tessera"], report["tessera_100"]) == (75.0, 75.0)
    assert (report["limit"], report["tessera_cpu_ms_per_pod"]) == (200.0, 3.0)
    assert (report["ratio"], report["ratio_100"], report["api_writes_per_pod"]) == (0.75, 3.0, 3.0)
    assert report["ok"]
    assert not told("queue", [3.2])["ok"]
    assert not told("queue", [2.0])["ok"]


@pytest.mark.parametrize("way", ["direct", "queue"])
def test_one_wrong_answer_fails_the_run(way: str) -> None:
    assert not told(way, [1.0 if way == "direct" else 3.0], ["more than 8 GPUs"])["ok"]


def event(verb: str, resource: str, subresource: str, code: int) -> Json:
    of = {"resource": resource, "subresource": subresource} if subresource else {"resource": resource}
    return {"verb": verb, "objectRef": of, "responseStatus": {"code": code}}


def test_what_the_api_server_refused_is_counted_apart_and_bounded() -> None:
    assert written_as(event("patch", "pods", "status", 200)) == "patch pods/status"
    assert written_as(event("patch", "pods", "", 200)) == "patch pods"
    assert written_as(event("create", "pods", "binding", 201)) == "create pods/binding"
    assert written_as(event("create", "pods", "binding", 409)) == "refused create pods/binding"
    assert told("queue", [3.0], refused=0.1)["ok"]
    assert not told("queue", [3.0], refused=0.11)["ok"]


def test_writes_to_the_pods_of_the_clock_count_and_to_nobody_elses() -> None:
    def counts(resource: str, name: str, audit: str = "new") -> bool:
        event = {"auditID": audit, "objectRef": {"resource": resource, "name": name}}
        return concerns(event, {"mine"}, {"old"})

    assert counts("pods", "mine")
    assert counts("pods", "mine", "old")  # whenever it was noted
    assert not counts("pods", "warm")
    assert counts("queues", "throughput")
    assert not counts("queues", "throughput", "old")
    assert not counts("leases", "tessera")
