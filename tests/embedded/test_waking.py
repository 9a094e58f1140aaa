"""What wakes refused pods in the embedded kube-scheduler, and what does not: the measured table."""

from __future__ import annotations

import pytest

from scheduler.kube.port import Cluster, Object
from tests.embedded.stage import HOLD, machine, refuse_all, staged


@pytest.mark.parametrize(
    ("event", "calls"),
    [
        ("annotate a", 1),
        ("annotate node", 3),
        ("label node", 3),
        ("shrink node", 3),
        ("taint node", 3),
        ("node condition", 3),
        ("new node", 6),  # "0/4 nodes": the text changed, so each refusal is tried twice
        ("heartbeat", 0),
        ("bind another", 3),
        ("annotate bound", 3),
        ("bound runs", 3),
        ("delete bound", 3),
        ("create gated", 0),
        ("delete gated", 0),
        ("annotate gated", 0),
        ("pod of another scheduler", 0),
        ("the same annotation", 0),
    ],
)
async def test_the_wake_table(event: str, calls: int) -> None:
    async with staged() as stage:
        await stage.nodes(3)
        cluster = stage.cluster
        for name in ("bound", "unbound"):
            await stage.pod(name, schedulerName="default-scheduler")
        await bind(stage.cluster, "bound")
        await stage.pod("gated", gates=(HOLD,))
        stage.judge = refuse_all()
        for name in ("a", "b", "c"):
            await stage.pod(name)
        await stage.settle(30)
        assert await stage.settle(30) == 0
        ready = {"type": "Ready", "status": "True"}
        actions = {
            "annotate a": lambda: stage.annotate("a", "1"),
            "annotate node": lambda: cluster.patch("nodes", "", "gpu-0", {"metadata": {"annotations": {"a": "1"}}}),
            "label node": lambda: cluster.patch("nodes", "", "gpu-0", {"metadata": {"labels": {"a": "1"}}}),
            "shrink node": lambda: status(cluster, {"allocatable": {"cpu": "32"}}),
            "taint node": lambda: cluster.patch("nodes", "", "gpu-0", {"spec": {"taints": [TAINT]}}),
            "node condition": lambda: status(cluster, {"conditions": [ready | {"status": "Unknown"}]}),
            "new node": lambda: cluster.create("nodes", "", machine("gpu-9")),
            "heartbeat": lambda: status(cluster, {"conditions": [ready | {"lastHeartbeatTime": NOW}]}),
            "bind another": lambda: bind(cluster, "unbound"),
            "annotate bound": lambda: stage.annotate("bound", "1"),
            "bound runs": lambda: cluster.patch(
                "pods", "default", "bound", {"status": {"phase": "Running"}}, subresource="status"
            ),
            "delete bound": lambda: cluster.delete("pods", "default", "bound"),
            "create gated": lambda: stage.pod("more", gates=(HOLD,)),
            "delete gated": lambda: cluster.delete("pods", "default", "gated"),
            "annotate gated": lambda: stage.annotate("gated", "1"),
            "pod of another scheduler": lambda: stage.pod("foreign", schedulerName="default-scheduler"),
            "the same annotation": lambda: cluster.patch("pods", "default", "a", {"metadata": {"annotations": {}}}),
        }
        await actions[event]()
        assert await stage.settle(12) == calls


TAINT = {"key": "other", "effect": "PreferNoSchedule"}
NOW = "2026-01-01T00:00:30Z"


async def status(cluster: Cluster, body: Object) -> None:
    await cluster.patch("nodes", "", "gpu-0", {"status": body}, patch_type="strategic", subresource="status")


async def bind(cluster: Cluster, name: str) -> None:
    await cluster.bind("default", name, {"metadata": {"name": name}, "target": {"name": "gpu-0"}})


async def test_three_hundred_held_pods_cost_nothing() -> None:
    async with staged() as stage:
        await stage.nodes(1)
        await stage.pod("bound")
        for number in range(300):
            await stage.pod(f"held-{number}", gates=(HOLD,))
        await stage.settle(1)
        stage.calls.clear()
        await stage.annotate("bound", "1")
        assert await stage.settle(5) == 0


async def test_a_bound_pods_annotation_is_a_storm_for_refused_ones() -> None:
    async with staged() as stage:
        await stage.nodes(1)
        await stage.pod("bound")
        await stage.settle(1)
        stage.judge = refuse_all()
        for number in range(50):
            await stage.pod(f"refused-{number}")
        await stage.settle(60)
        await stage.annotate("bound", "1")
        assert await stage.settle(5) == 50


async def test_room_that_comes_free_is_found() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=8)
        await stage.pod("a", gpus=8)
        await stage.settle(1)
        await stage.pod("b", gpus=8)
        await stage.settle(20)
        assert await stage.node_of("b") == ""
        await stage.cluster.delete("pods", "default", "a", grace_s=0)
        await stage.settle(1)
        assert await stage.node_of("b") == "gpu-0"


async def test_a_deleted_pod_is_forgotten() -> None:
    async with staged() as stage:
        await stage.nodes(1)
        stage.judge = refuse_all()
        await stage.pod("a")
        await stage.settle(5)
        await stage.cluster.delete("pods", "default", "a")
        await stage.cluster.create("nodes", "", machine("gpu-9"))
        assert await stage.settle(10) == 0
