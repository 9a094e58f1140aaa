"""One real control plane for the whole run; every test here carries the marker `controlplane`."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bench.apiclient import ApiClient
from bench.kube_binaries import UnavailableError
from bench.kube_objects import create_nodes, node_object
from bench.realcluster import TESSERA, RealCluster

HERE = Path(__file__).parent
NUMBERS = itertools.count(1)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.controlplane)


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[RealCluster]:
    try:
        cluster = RealCluster()
        asyncio.run(cluster.start())
    except UnavailableError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no real control plane: {error}")
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture(autouse=True)
def emptied(real_cluster: RealCluster) -> Iterator[None]:
    """Every test finds no nodes, pods, kube-scheduler or kube-controller-manager, whatever the last one left."""
    yield
    asyncio.run(_empty(real_cluster))


async def _empty(cluster: RealCluster) -> None:
    await cluster.stop_kube_scheduler(kill=True)
    await cluster.stop_controller_manager()
    async with cluster.client() as api:
        pods = (await api.get("/api/v1/pods"))["items"]
        for namespace in sorted({pod["metadata"]["namespace"] for pod in pods}):
            await api.delete(f"/api/v1/namespaces/{namespace}/pods", {"gracePeriodSeconds": 0})
        await api.delete("/api/v1/nodes")
        # A Lease that nobody renews says that kube-scheduler is down, and the next test's may take none.
        await api.delete("/apis/coordination.k8s.io/v1/namespaces/tessera-system/leases")


@pytest.fixture
async def admin(real_cluster: RealCluster) -> AsyncIterator[ApiClient]:
    async with real_cluster.client() as api:
        yield api


@pytest.fixture
async def tessera(real_cluster: RealCluster) -> AsyncIterator[ApiClient]:
    async with real_cluster.client(TESSERA) as api:
        yield api


@pytest.fixture
async def namespace(admin: ApiClient) -> AsyncIterator[str]:
    """A new namespace for each test, empty of pods after it; the namespace itself goes with the cluster."""
    name = f"test-{next(NUMBERS)}"
    await admin.post("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    await admin.delete(f"/api/v1/namespaces/{name}/pods", {"gracePeriodSeconds": 0})


@pytest.fixture
async def node(admin: ApiClient) -> AsyncIterator[str]:
    """A Ready node with eight GPUs, gone after the test."""
    name = f"gpu-{next(NUMBERS):05}"
    await create_nodes(admin, [node_object(name, extended={"nvidia.com/gpu": "8"})])
    yield name
    await admin.delete(f"/api/v1/nodes/{name}")
