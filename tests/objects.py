"""Kubernetes objects for tests, in the API server's own JSON form."""

from __future__ import annotations

from typing import Any

PRODUCT = "NVIDIA-H100-80GB-HBM3"


def raw_node(
    name: str, *, gpus: int = 8, mode: str = "exact", product: str = PRODUCT, uid: str = "", **labels: str
) -> dict[str, Any]:
    """Return a ready Node with GPU Feature Discovery's labels."""
    marks = {"kubernetes.io/hostname": name, "tessera.dev/mode": mode, **labels}
    amounts = {"cpu": "96", "memory": "768Gi", "ephemeral-storage": "1Ti", "pods": "110"}
    if gpus:
        marks |= {
            "nvidia.com/gpu.product": product,
            "nvidia.com/gpu.count": str(gpus),
            "nvidia.com/gpu.memory": "81559",
        }
        amounts["nvidia.com/gpu"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "uid": uid or f"uid-{name}", "resourceVersion": "1", "labels": marks},
        "spec": {},
        "status": {"allocatable": amounts, "capacity": amounts, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def raw_pod(
    name: str,
    gpus: int = 1,
    cpu: str = "4",
    *,
    node: str = "",
    uid: str = "",
    phase: str = "Pending",
    scheduler: str = "tessera",
    version: str = "10",
    annotations: dict[str, str] | None = None,
    created: str = "2026-01-01T00:00:00Z",
    owners: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return a pod that asks for whole GPUs; `gpus` 0 is CPU-only."""
    amounts = {"cpu": cpu, "memory": "8Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    spec: dict[str, Any] = {
        "schedulerName": scheduler,
        "containers": [{"name": "main", "image": "pause", "resources": {"requests": amounts, "limits": amounts}}],
    }
    if node:
        spec["nodeName"] = node
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid or f"uid-{name}",
            "resourceVersion": version,
            "creationTimestamp": created,
            "annotations": annotations or {},
            **({"ownerReferences": owners} if owners else {}),
        },
        "spec": spec,
        "status": {"phase": phase},
    }
