"""Objects for the contract suite, made through the port alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

from scheduler.kube.port import Cluster, Kind, Object, WatchEvent

HOLD = "tessera.dev/hold"
_names = random.Random(20260101)
_run = random.SystemRandom().getrandbits(24)  # a real API server outlives one test


def fresh_name(prefix: str = "c") -> str:
    return f"{prefix}-{_run:06x}-{_names.getrandbits(32):08x}"


def pod(name: str = "", *, gates: tuple[str, ...] = (), **spec: Any) -> Object:
    """A pod of one container; `spec` adds to the pod's spec."""
    resources = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"nvidia.com/gpu": "1"}}
    body: Object = {
        "metadata": {"name": name or fresh_name("pod"), "annotations": {"user": "kept"}, "labels": {"app": "kept"}},
        "spec": {
            "schedulerName": "contract",  # nobody's, so that no kube-scheduler interferes
            "containers": [{"name": "main", "image": "pause:3.10", "resources": resources}],
            **spec,
        },
    }
    if gates:
        body["spec"]["schedulingGates"] = [{"name": gate} for gate in gates]
    return body


def node(name: str = "") -> Object:
    amounts = {"cpu": "8", "memory": "64Gi", "pods": "110", "nvidia.com/gpu": "8"}
    return {
        "metadata": {"name": name or fresh_name("node"), "labels": {"zone": "a"}},
        "spec": {},
        "status": {"capacity": amounts, "allocatable": amounts, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def queue(name: str = "", **spec: Any) -> Object:
    return {
        "apiVersion": "tessera.dev/v1alpha1",
        "kind": "Queue",
        "metadata": {"name": name or fresh_name("queue")},
        "spec": spec,
    }


def lease(name: str = "", *, holder: str = "me") -> Object:
    return {"metadata": {"name": name or fresh_name("lease")}, "spec": {"holderIdentity": holder}}


def event(about: Object) -> Object:
    """An Event on a pod, in the form of events.k8s.io/v1."""
    return {
        "metadata": {"generateName": "why-"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "tessera.dev/contract",
        "reportingInstance": "contract-0",
        "action": "Placing",
        "reason": "Waiting",
        "regarding": {"kind": "Pod", "namespace": "default", "name": about["metadata"]["name"]},
        "note": "no free GPU",
        "type": "Normal",
    }


def binding(of: Object, to: str, **metadata: Any) -> Object:
    """A Binding of a pod; `metadata` adds preconditions, annotations, labels."""
    return {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": of["metadata"]["name"], **metadata},
        "target": {"apiVersion": "v1", "kind": "Node", "name": to},
    }


async def create_pod(cluster: Cluster, body: Object | None = None) -> Object:
    return await cluster.create("pods", "default", body or pod())


async def create_node(cluster: Cluster) -> Object:
    return await cluster.create("nodes", "", node())


async def bound_pod(cluster: Cluster, to: str = "somewhere", **spec: Any) -> Object:
    made = await create_pod(cluster, pod(**spec))
    await cluster.bind("default", name_of(made), binding(made, to))
    return await cluster.get("pods", "default", name_of(made))


def name_of(made: Object) -> str:
    name: str = made["metadata"]["name"]
    return name


def version_of(made: Object) -> str:
    version: str = made["metadata"]["resourceVersion"]
    return version


async def everything(cluster: Cluster, kind: Kind, *, limit: int = 500) -> tuple[list[Object], str]:
    """All pages of a list and its resourceVersion."""
    items, after = [], ""
    while True:
        page = await cluster.list(kind, limit=limit, after=after)
        items += page.items
        after = page.next
        if not after:
            return items, page.resource_version


async def now(cluster: Cluster, kind: Kind) -> str:
    """The resourceVersion from which a watch sees what happens next."""
    return (await everything(cluster, kind))[1]


async def seen(
    cluster: Cluster, kind: Kind, since: str, *, names: set[str], until: int, timeout_s: float = 10.0
) -> list[WatchEvent]:
    """The first `until` events on the named objects after `since`."""
    events: list[WatchEvent] = []
    watch = cluster.watch(kind, since, timeout_s=timeout_s)
    try:
        async with asyncio.timeout(timeout_s + 5):
            async for event in watch:
                if event.type != "BOOKMARK" and name_of(event.object) in names:
                    events.append(event)
                if len(events) == until:
                    break
    finally:
        await watch.aclose()
    return events


async def all_of(events: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    return [event async for event in events]
