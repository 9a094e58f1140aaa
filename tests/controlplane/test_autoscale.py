"""A pod for which a new node is asked, on a real kube-scheduler: what an autoscaler would see, and what comes of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.apiclient import ApiClient
from bench.kube_objects import create_nodes, create_pods, node_object, pod_object
from bench.product import Product
from bench.realcluster import TESSERA, RealCluster

Json = dict[str, Any]
QUEUES = "/apis/tessera.dev/v1alpha1/queues"
NEVER = threading.Event()  # the processes outside have no fake clock
GPUS = {"nvidia.com/gpu": "8"}
MODE = {"tessera.dev/mode": "exact", "nvidia.com/gpu.count": "8"}
NOT_READY = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
CONFIG = """\
nodeGroups:
- name: h200
  labels: {pool: h200, tessera.dev/mode: exact, nvidia.com/gpu.count: "8", nvidia.com/gpu.product: NVIDIA-H200}
  capacity: {cpu: 64, memory: 512Gi, ephemeral-storage: 1Ti, nvidia.com/gpu: 8}
  maxNodes: 1
"""


async def until(done: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Wait for a real process; the API server is asked again after each of its answers."""
    try:
        async with asyncio.timeout(seconds):
            while not await done():
                await asyncio.to_thread(NEVER.wait, 0.05)
    except TimeoutError:
        pytest.fail(f"not within {seconds} s: {what}")


@pytest.fixture
async def product(real_cluster: RealCluster, admin: ApiClient, tmp_path: Path) -> AsyncIterator[Product]:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    grows = {"metadata": {"name": "grows"}, "spec": {"autoscale": True, "namespaceSelector": {}}}
    await admin.post(QUEUES, {"apiVersion": "tessera.dev/v1alpha1", "kind": "Queue", **grows})
    labels = {**MODE, "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    await create_nodes(admin, [node_object("old", extended=GPUS, labels=labels)])
    made = Product(tmp_path, real_cluster.kubeconfig(TESSERA), flags=[f"--config={config}"])
    await made.start()
    await real_cluster.start_kube_scheduler(made.extender)
    yield made
    await real_cluster.stop_kube_scheduler(kill=True)
    await made.stop()
    await admin.delete(QUEUES)


def wants_h200(name: str, namespace: str, gpus: int) -> Json:
    return pod_object(
        name,
        namespace=namespace,
        requests={"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": str(gpus)},
        labels={"tessera.dev/queue": "grows"},
        annotations={"tessera.dev/gpu-model": "H200"},
        gates=["tessera.dev/hold"],
    )


def scheduled(pod: Json) -> Json:
    conditions = pod["status"].get("conditions", ())
    return next((one for one in conditions if one["type"] == "PodScheduled"), {})


async def test_an_autoscaler_sees_the_pod_and_the_pod_gets_the_node_that_it_adds(
    admin: ApiClient, namespace: str, product: Product, real_cluster: RealCluster
) -> None:
    await admin.patch(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": {"tessera.dev/managed": "true"}}})
    path = f"/api/v1/namespaces/{namespace}/pods"
    await create_pods(admin, [wants_h200("first", namespace, 8)])
    await asyncio.to_thread(NEVER.wait, 1.1)  # times of creation have whole seconds
    await create_pods(admin, [wants_h200("later", namespace, 1)])

    async def shown() -> bool:
        return scheduled(await admin.get(f"{path}/first")).get("reason") == "Unschedulable"

    await until(shown, 90, "first is unschedulable")
    first, later = await admin.get(f"{path}/first"), await admin.get(f"{path}/later")
    assert not first["spec"].get("schedulingGates")
    assert not first["status"].get("nominatedNodeName")
    assert "1 GpusBusy" in scheduled(first)["message"]
    assert later["spec"]["schedulingGates"], "the group has one node, and first takes it whole"

    await product.kill()
    await real_cluster.stop_kube_scheduler(kill=True)
    await product.start()
    await real_cluster.start_kube_scheduler(product.extender)
    new = node_object("new", labels={"pool": "h200"}, taints=[NOT_READY])
    await create_nodes(admin, [new])
    ready = node_object("new", extended=GPUS)["status"]
    await admin.patch("/api/v1/nodes/new", {"spec": {"taints": None}})
    labels = {**MODE, "nvidia.com/gpu.product": "NVIDIA-H200"}
    await admin.patch("/api/v1/nodes/new", {"metadata": {"labels": labels}})
    assert not (await admin.get(f"{path}/first"))["spec"].get("nodeName")
    await admin.patch("/api/v1/nodes/new/status", {"status": ready})

    async def bound() -> bool:
        return bool((await admin.get(f"{path}/first"))["spec"].get("nodeName") == "new")

    await until(bound, 30, "first is bound to the new node")
    assert not (await admin.get(f"{path}/later"))["spec"].get("nodeName")
