"""Gangs on a real control plane while Tessera dies again and again: all of a gang or nothing, but for a minute.

The gate kills Tessera five times; `GANG_KILLS=20 make e2e ARGS="-k gangs"` asks for more.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from bench.apiclient import ApiClient
from bench.kube_objects import create_nodes, create_pods, node_object, pod_object
from bench.product import Product
from bench.proxy import Proxy
from bench.realcluster import TESSERA, RealCluster
from tests.controlplane.test_spine import allocation, nobody_shares_a_device, pods_in, verified
from tests.controlplane.waiting import NEVER, until

Json = dict[str, Any]
KILLS = int(os.environ.get("GANG_KILLS", "5"))
MEMBERS = 32
GANGS = {"ones": 1, "twos": 2}
"""Gang, and queue, by name: GPUs of each member."""
NODES = MEMBERS * sum(GANGS.values()) // 8  # just enough
PARTLY_S = 60.0


@pytest.fixture
async def product(real_cluster: RealCluster, admin: ApiClient, tmp_path: Path) -> AsyncIterator[Product]:
    gpu = {"nvidia.com/gpu": "8"}
    marks = {
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
        "nvidia.com/gpu.count": "8",
        "tessera.dev/mode": "exact",
    }
    await create_nodes(admin, [node_object(f"g{number:02}", extended=gpu, labels=marks) for number in range(NODES)])
    queues = tmp_path / "queues.yaml"
    documents = [
        {
            "apiVersion": "tessera.dev/v1alpha1",
            "kind": "Queue",
            "metadata": {"name": name},
            "spec": {"nominal": {"gpu": gpus * MEMBERS}, "namespaceSelector": {}},
        }
        for name, gpus in GANGS.items()
    ]
    queues.write_text(yaml.safe_dump_all(documents))
    made = Product(tmp_path, real_cluster.kubeconfig(TESSERA), flags=[f"--queues={queues}"])
    yield made
    await made.kill()


def member(gang: str, number: int, namespace: str) -> Json:
    return pod_object(
        f"{gang}-{number:02}",
        namespace=namespace,
        requests={"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": str(GANGS[gang])},
        labels={"tessera.dev/queue": gang},
        annotations={"tessera.dev/gang": gang, "tessera.dev/gang-size": str(MEMBERS)},
        gates=["tessera.dev/hold"],
    )


@dataclass
class Watcher:
    """How many members of each gang are bound, and for how long each was bound in part."""

    api: ApiClient
    namespace: str
    bound: dict[str, set[str]] = field(default_factory=lambda: {gang: set() for gang in GANGS})
    began_s: dict[str, float] = field(default_factory=dict)
    partly_s: dict[str, float] = field(default_factory=dict)

    async def follow(self, version: str) -> None:
        while True:
            async for event in self.api.watch(f"/api/v1/namespaces/{self.namespace}/pods", version):
                pod = event["object"]
                version, name = pod["metadata"]["resourceVersion"], pod["metadata"]["name"]
                if not pod["spec"].get("nodeName"):
                    continue
                gang = name.split("-")[0]
                self.began_s.setdefault(gang, time.monotonic())
                self.bound[gang].add(name)
                if len(self.bound[gang]) == MEMBERS:
                    self.partly_s.setdefault(gang, time.monotonic() - self.began_s[gang])


async def test_gangs_of_32_are_bound_whole_through_kills(
    real_cluster: RealCluster, admin: ApiClient, namespace: str, product: Product
) -> None:
    rng = Random(32)
    watcher = Watcher(admin, namespace)
    version = (await admin.get(f"/api/v1/namespaces/{namespace}/pods?limit=1"))["metadata"]["resourceVersion"]
    following = asyncio.create_task(watcher.follow(version))
    in_part = 0
    async with Proxy() as proxy:
        await product.start()
        proxy.upstream = product.extender
        await real_cluster.start_kube_scheduler(proxy.url, leader_election=True)
        await create_pods(admin, [member(gang, number, namespace) for gang in GANGS for number in range(MEMBERS)])
        for _ in range(KILLS):
            await asyncio.to_thread(NEVER.wait, rng.uniform(0.0, 2.0))
            await product.kill()
            in_part += any(0 < len(names) < MEMBERS for names in watcher.bound.values())
            await product.start()
            proxy.upstream = product.extender

        async def whole() -> bool:
            return all(len(names) == MEMBERS for names in watcher.bound.values())

        await until(whole, 120, "every member of both gangs bound")
        following.cancel()
        await real_cluster.stop_kube_scheduler()
    pods = await pods_in(admin, namespace)
    assert max(watcher.partly_s.values()) <= PARTLY_S, f"{watcher.partly_s}, {in_part} kills while bound in part"
    assert nobody_shares_a_device(pods)
    held = {
        (pod["spec"]["nodeName"], grant["dev"])
        for pod in pods
        for part in allocation(pod)["containers"].values()
        for grant in part
    }
    assert len(held) == 8 * NODES, "every GPU is taken, once"
    assert await product.stop() == 0
    assert (await verified(product))["ok"]
