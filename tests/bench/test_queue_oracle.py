"""The oracle of order and quota on small clusters whose answer is plain."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.kube_objects import pod_object
from bench.oracle import observe
from bench.queue_oracle import Rule, Tree, misordered, read_queues, runnable, violations
from tests.objects import raw_node

FILE = """
metadata: {name: root}
spec: {nominal: {cpu: "10"}}
---
metadata: {name: left}
spec: {parent: root, nominal: {gpu: 3}, borrowLimit: {gpu: 1}}
---
metadata: {name: right}
spec: {parent: root, nominal: {gpu: 4}, lendLimit: {gpu: 2}}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "queues.yaml").write_text(FILE)
    return read_queues(tmp_path / "queues.yaml")


def pod(name: str, gpus: int, queue: str = "left", *, at: int = 0, held: bool = True) -> dict[str, Any]:
    made = pod_object(name, requests={"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": str(gpus)})
    made["metadata"] |= {"uid": name, "creationTimestamp": f"2026-01-01T00:00:{at:02}Z"}
    made["metadata"]["labels"] = {"tessera.dev/queue": queue}
    if held:
        made["spec"]["schedulingGates"] = [{"name": "tessera.dev/hold"}]
    return made


def line(
    event: str, name: str, node: str = "a", queue: str = "left", *, at: int = 0, to: str = "RESERVED"
) -> dict[str, Any]:
    return {"event": event, "request": name, "name": name, "node": node, "queue": queue, "at": at * 1_000_000, "to": to}


def test_a_tree_is_read_with_its_leaves_and_what_each_may_have(tree: Tree) -> None:
    assert tree.leaves() == ["left", "right"]
    assert tree.most("left", "gpu") == 4
    assert tree.keeps("right", "gpu") == 2
    assert tree.limited("left", "cpu")
    assert not tree.limited("left", "memory")
    assert tree.beyond(Counter({("left", "gpu"): 5}), "left", "gpu") == "queue left has 5 gpu of 4"
    assert "queue root has 6 gpu of 5" in tree.beyond(
        Counter({("left", "gpu"): 4, ("right", "gpu"): 4}), "right", "gpu"
    )
    assert tree.beyond(Counter({("left", "gpu"): 3, ("right", "gpu"): 4}), "right", "gpu") == ""


def test_a_reservation_beyond_the_quota_is_found_and_one_within_is_not(tree: Tree) -> None:
    nodes = {"a": raw_node("a")}
    pods = {name: pod(name, 2) for name in ("one", "two", "three")}
    lines = [line("reserve", "one"), line("bind", "one", to="BINDING"), line("reserve", "two")]
    assert violations(lines, pods, nodes, tree) == []
    lines.append(line("finish", "one", to="RELEASED"))
    lines.append(line("reserve", "three"))
    assert violations(lines, pods, nodes, tree) == []
    lines.append({**line("reserve", "one"), "seq": 6})
    assert violations(lines, pods, nodes, tree) == ["line 6: one: queue left has 6 gpu of 4"]
    assert violations([{**one, "event": "adopt"} for one in lines], pods, nodes, tree) == []


def test_who_passes_somebody_on_a_node_that_he_could_use_is_found() -> None:
    rule = Rule({"a": raw_node("a"), "t4": raw_node("t4", product="Tesla-T4", gpus=2)})
    first, second = pod("first", 4), pod("second", 1, at=1)
    pods = {"first": first, "second": second}
    waits = [line("submit", "first", to="QUEUED"), line("submit", "second", to="QUEUED")]
    assert misordered([*waits, line("reserve", "second", at=9)], pods, rule)
    assert not misordered([*waits, line("reserve", "second", "t4", at=9)], pods, rule)
    assert not misordered([*waits, line("reserve", "second", at=1)], pods, rule)
    assert not misordered([*waits, line("reserve", "first", at=8), line("reserve", "second", at=9)], pods, rule)
    first["status"] = {"phase": "Succeeded"}  # it ended long ago, and asked for four GPUs all the same
    assert not misordered([*waits, line("reserve", "second", "t4", at=9)], pods, Rule(rule.nodes))
    second["metadata"]["labels"]["tessera.dev/queue"] = "right"
    assert not misordered([*waits, line("reserve", "second", at=9)], pods, rule)


def test_a_waiting_pod_is_free_to_run_only_where_nobody_before_it_could(tree: Tree) -> None:
    nodes = {"a": raw_node("a"), "t4": raw_node("t4", product="Tesla-T4", gpus=2)}
    rule = Rule(nodes, tree)
    first, second = pod("first", 4), pod("second", 1, at=1)
    both = [first, second]
    nothing = Counter[tuple[str, str]]()
    assert rule.free_to(second, ["a"], [second], nothing) == ["a"]
    assert rule.free_to(second, ["a", "t4"], both, nothing) == []  # one GPU beside the four of the first is too much
    first["metadata"]["labels"]["tessera.dev/queue"] = "right"
    assert rule.free_to(second, ["a", "t4"], both, nothing) == ["a", "t4"]
    assert rule.free_to(second, ["a"], [second], Counter({("left", "gpu"): 4})) == []
    never = pod("never", 8)
    assert Rule(nodes, tree).free_to(second, ["a"], [never, second], nothing) == ["a"]


def test_a_pod_behind_another_keeps_nodes_that_are_of_no_use_to_that_one() -> None:
    rule = Rule({"a": raw_node("a"), "t4": raw_node("t4", product="Tesla-T4", gpus=2)})
    assert rule.free_to(pod("second", 1, at=1), ["a", "t4"], [pod("first", 4)], Counter()) == ["t4"]


def test_who_could_run_is_the_first_of_its_queue_with_room_and_quota(tree: Tree) -> None:
    nodes = [raw_node("a", gpus=4)]
    runs = {**pod("runs", 2, held=False), "status": {"phase": "Running"}}
    runs["spec"]["nodeName"] = "a"
    rule = Rule({"a": nodes[0]}, tree)
    held = {"runs": {"containers": {"main": [{"dev": dev, "kind": "whole"} for dev in (0, 1)]}}}

    def able(*waiting: dict[str, Any]) -> list[str]:
        pods = [runs, *waiting]
        return sorted(runnable(pods, observe(nodes, pods, held), rule, held))

    first, second, large = pod("first", 1, at=1), pod("second", 1, at=2), pod("large", 3, "right")
    assert able(first, second) == ["first"]
    assert able(first, large) == ["first"]  # two GPUs are free
    assert able(second) == ["second"]
    assert able(pod("much", 3)) == []  # no quota: 3 and one to borrow, of which 2 are used
    gated = pod("gated", 1)
    gated["spec"]["schedulingGates"].append({"name": "somebody/else"})
    assert able(gated) == []
    ended = {**first, "status": {"phase": "Failed"}}
    assert able(ended, second) == ["second"]
