"""Nodes and pods for a real API server that has no kubelet: made, put through their life by status patches, deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from bench.apiclient import STRATEGIC

if TYPE_CHECKING:
    from bench.apiclient import ApiClient, Json

_Result = TypeVar("_Result")

IN_FLIGHT = 64


def node_object(
    name: str,
    *,
    cpu: str = "64",
    memory: str = "512Gi",
    extended: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    taints: Sequence[Mapping[str, str]] = (),
) -> Json:
    """Return a Ready node whose allocatable equals its capacity.

    Args:
        name: also the value of label `kubernetes.io/hostname`.
        cpu: quantity of cores.
        memory: quantity of bytes.
        extended: extended resources such as `{"nvidia.com/gpu": "8"}`.
        labels: more labels.
        taints: the node's taints; none by default.
    """
    amounts = {"cpu": cpu, "memory": memory, "pods": "256", "ephemeral-storage": "1Ti", **(extended or {})}
    condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "paper node"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": {"taints": [dict(taint) for taint in taints]},
        "status": {"capacity": amounts, "allocatable": amounts, "conditions": [condition]},
    }


def pod_object(
    name: str,
    *,
    namespace: str = "default",
    requests: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    gates: Sequence[str] = (),
    scheduler: str = "tessera",
) -> Json:
    """Return a pod of one container whose limits equal its requests.

    Args:
        name: the pod's name.
        namespace: an existing namespace.
        requests: resources such as `{"cpu": "1", "nvidia.com/gpu": "2"}`; one core and 1 GiB by default.
        labels: the pod's labels.
        annotations: the pod's annotations.
        gates: names of scheduling gates.
        scheduler: spec.schedulerName.
    """
    amounts = dict(requests or {"cpu": "1", "memory": "1Gi"})
    spec: Json = {
        "schedulerName": scheduler,
        "containers": [{"name": "main", "image": "pause:3.10", "resources": {"requests": amounts, "limits": amounts}}],
    }
    if gates:
        spec["schedulingGates"] = [{"name": gate} for gate in gates]
    meta = {"name": name, "namespace": namespace, "labels": dict(labels or {}), "annotations": dict(annotations or {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def binding_object(pod: Json, node: str, *, annotations: Mapping[str, str] | None = None, **metadata: str) -> Json:
    """Return a Binding of `pod` to `node`; `metadata` adds preconditions (`uid`, `resourceVersion`)."""
    return {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": pod["metadata"]["name"], "annotations": dict(annotations or {}), **metadata},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    }


def pod_path(pod: Json, subresource: str = "") -> str:
    """Return the API path of a pod, or of one of its subresources."""
    meta = pod["metadata"]
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
    return f"{path}/{subresource}" if subresource else path


async def gather_bounded(calls: Iterable[Awaitable[_Result]], *, in_flight: int = IN_FLIGHT) -> list[_Result]:
    """Await many calls, at most `in_flight` at a time; results in the order of the calls."""
    slots = asyncio.Semaphore(in_flight)

    async def one(call: Awaitable[_Result]) -> _Result:
        async with slots:
            return await call

    return await asyncio.gather(*(one(call) for call in calls))


async def create_nodes(api: ApiClient, nodes: Iterable[Json]) -> list[Json]:
    """Create nodes concurrently; the cluster must not add the not-ready taint (RealCluster does not)."""
    return await gather_bounded([api.post("/api/v1/nodes", node) for node in nodes])


async def create_pods(api: ApiClient, pods: Iterable[Json]) -> list[Json]:
    """Create pods concurrently; the order of creation is not that of the list."""
    return await gather_bounded(
        [api.post(f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods", pod) for pod in pods]
    )


async def set_phase(api: ApiClient, pod: Json, phase: str) -> Json:
    """Play the kubelet: write the pod's phase (`Running`, `Succeeded`, `Failed`)."""
    return await api.patch(pod_path(pod, "status"), {"status": {"phase": phase}}, content_type=STRATEGIC)


async def delete_pod(api: ApiClient, pod: Json) -> Json:
    """Delete a pod at once, as its kubelet would after the grace period; only this very UID."""
    options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
    return await api.delete(pod_path(pod), options)
