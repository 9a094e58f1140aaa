"""The parts of `bench crash` that need no control plane: its points, its evidence, its verdict."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.crash import POINTS, QUEUES, Outcome, Point, in_flight, nodes_of, pods_of, read_points, report_of
from bench.kube_objects import pod_object
from bench.oracle import device_ask, observe
from bench.queue_oracle import GATE, Rule, queue_of, read_queues, runnable
from scheduler import faults

Json = dict[str, Any]
GOOD = Outcome("", 0, [], 2.0, 1.0, 10)


@pytest.mark.parametrize(
    ("written", "points"),
    [
        ("C3-C8", ("C3", "C4", "C5", "C6", "C7", "C8")),
        ("C5", ("C5",)),
        ("C7,C4-C5,C4", ("C4", "C5", "C7")),
    ],
)
def test_points_are_read_in_order_each_once(written: str, points: tuple[str, ...]) -> None:
    assert read_points(written) == points


@pytest.mark.parametrize("written", ["", "C1", "C2-C4", "C3-C11", "C8-C3", "C3;C4", "all"])
def test_a_point_that_is_not_built_is_refused_with_those_that_are(written: str) -> None:
    with pytest.raises(ValueError, match="C3, C4, C5, C6, C7, C8"):
        read_points(written)


def test_every_fault_of_a_point_is_one_of_the_product() -> None:
    named = [fault for point in POINTS.values() for fault in point.faults]
    assert set(named) <= faults.POINTS
    assert len(named) == len(set(named)) == 6


def found(stage: str, uid: str = "u") -> Json:
    made = pod_object("one", gates=[GATE] if stage in {"held", "nominated"} else [])
    made["metadata"]["uid"] = uid
    made["status"] = {"nominatedNodeName": "node-1"} if stage != "held" else {}
    if stage == "bound":
        made["spec"]["nodeName"] = "node-1"
    return made


@pytest.mark.parametrize("name", POINTS)
def test_only_a_pod_at_this_very_point_is_evidence(name: str) -> None:
    point: Point = POINTS[name]
    stages, states = ("held", "nominated", "free", "bound"), ("QUEUED", "RESERVED", "BINDING", "BOUND")
    shown = [
        (stage, state)
        for stage in stages
        for state in states
        if in_flight(point, [found(stage)], {"u": {"to": state}}) == ["one"]
    ]
    assert shown == [(point.pod, point.state)]
    assert in_flight(point, [found(point.pod)], {}) == []


def test_the_points_that_look_alike_are_told_apart_by_where_the_process_is_killed() -> None:
    alike = Counter((point.pod, point.state) for point in POINTS.values())
    assert {place for place, count in alike.items() if count > 1} == {("bound", "BINDING")}
    assert POINTS["C7"].faults == ()


def test_every_pod_of_the_open_queue_can_run_and_the_tight_one_is_asked_for_more_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "queues.yaml").write_text(QUEUES)
    nodes, pods = nodes_of(), pods_of("c3", 27)
    for number, pod in enumerate(pods):
        pod["metadata"] |= {"uid": str(number), "creationTimestamp": "2026-01-01T00:00:00Z"}
    kinds = {device_ask(pod).kind for pod in pods}
    assert kinds == {"whole", "mig", "share", ""}
    rule = Rule({node["metadata"]["name"]: node for node in nodes}, read_queues(tmp_path / "queues.yaml"))
    gpus = Counter[str]()
    for pod in pods:
        ask = device_ask(pod)
        gpus[queue_of(pod)] += ask.count if ask.kind == "whole" else 0
    assert gpus["tight"] > 4
    assert gpus["open"] + 4 <= 16
    able = runnable(pods, observe(nodes, [], {}), rule, {})
    assert {queue_of(pod) for pod in pods if pod["metadata"]["uid"] in able} == {"open", "tight"}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (Outcome("nobody was at the point", 0, [], 2.0, 1.0, 10), (1, 0, 0)),
        (Outcome("", 2, [], 2.0, 1.0, 10), (1, 2, 0)),
        (Outcome("", 0, ["one GPU twice"], 2.0, 1.0, 10), (2, 0, 1)),
    ],
)
def test_one_bad_trial_spoils_the_run(bad: Outcome, told: tuple[int, int, int]) -> None:
    good = report_of({"C3": [GOOD, GOOD], "C4": [GOOD, GOOD]}, each=2, seed=1)
    assert (good["ok"], good["checked"], [row["recovered"] for row in good["rows"]]) == (True, 40, [2, 2])
    report = report_of({"C3": [GOOD, GOOD], "C4": [GOOD, bad]}, each=2, seed=1)
    row = report["rows"][1]
    assert (report["ok"], (row["recovered"], row["stuck"], row["violations"])) == (False, told)


def test_trials_that_never_ran_are_no_success() -> None:
    assert not report_of({}, each=3, seed=1)["ok"]
    assert not report_of({"C3": [GOOD]}, each=3, seed=1)["ok"]


def test_the_limit_of_a_point_without_kube_scheduler_includes_the_timeout() -> None:
    rows = report_of({"C4": [GOOD], "C5": [GOOD]}, each=1, seed=1)["rows"]
    assert [row["limit_s"] for row in rows] == [1.0, 6.0]
