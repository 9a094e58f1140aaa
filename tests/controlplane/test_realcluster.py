from __future__ import annotations

import pytest

from bench.apiclient import ApiClient
from bench.kube_binaries import UnavailableError, kube_version
from bench.realcluster import RealCluster


async def test_it_is_the_version_of_the_module(admin: ApiClient) -> None:
    assert (await admin.get("/version"))["gitVersion"] == kube_version()


async def test_objects_survive_a_restart_of_the_api_server(
    real_cluster: RealCluster, admin: ApiClient, node: str
) -> None:
    before = await admin.get(f"/api/v1/nodes/{node}")
    await real_cluster.stop_api_server()
    await real_cluster.start_api_server()
    assert await admin.get(f"/api/v1/nodes/{node}") == before


async def test_a_second_kube_scheduler_is_refused(real_cluster: RealCluster) -> None:
    await real_cluster.start_kube_scheduler(None)
    try:
        with pytest.raises(UnavailableError, match="runs already"):
            await real_cluster.start_kube_scheduler(None)
    finally:
        await real_cluster.stop_kube_scheduler()


async def test_a_program_that_cannot_start_shows_its_log(real_cluster: RealCluster) -> None:
    with pytest.raises(UnavailableError, match="kube-scheduler ended while starting"):
        await real_cluster.start_kube_scheduler(None, extra_config={"profiles": "nonsense"})
    await real_cluster.stop_kube_scheduler()
