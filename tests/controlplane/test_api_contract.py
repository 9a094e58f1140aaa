"""The port's contract, kept by the real API server through Tessera's own client."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from bench.apiclient import ApiClient
from bench.kube_objects import create_nodes, node_object
from bench.realcluster import ADMIN, RealCluster
from scheduler.clock import RealClock
from scheduler.kube.api import ApiServer, connect
from scheduler.kube.reflector import Reflector
from tests.contract.cluster_contract import *  # noqa: F403
from tests.contract.making import create_pod, everything, name_of
from tests.kube.rough import Copy, key_of

NODES = 5000


@pytest.fixture
async def cluster(real_cluster: RealCluster) -> AsyncIterator[ApiServer]:
    client = await connect(kubeconfig=str(real_cluster.kubeconfig(ADMIN)), in_cluster=False)
    yield client
    await client.close()


@pytest.fixture
def compact(real_cluster: RealCluster, admin: ApiClient) -> Callable[[], Awaitable[None]]:
    async def age() -> None:
        """Forget history in etcd and in the API server's watch cache, which lives as long as its process."""
        version = int((await admin.get("/api/v1/nodes?limit=1"))["metadata"]["resourceVersion"])
        url = f"http://127.0.0.1:{real_cluster._etcd_port}/v3/kv/compaction"
        async with aiohttp.ClientSession() as session, session.post(url, json={"revision": version}) as done:
            assert done.status == 200, await done.text()
        await real_cluster.stop_api_server()
        await real_cluster.start_api_server()

    return age


async def test_a_reflector_survives_a_restart_that_forgets_history(
    cluster: ApiServer, compact: Callable[[], Awaitable[None]]
) -> None:
    copy, changed = Copy(), asyncio.Event()
    for name in ("replace", "upsert", "delete"):
        setattr(copy, name, _telling(getattr(copy, name), changed))
    kept, lost = await create_pod(cluster), await create_pod(cluster)
    running = asyncio.ensure_future(Reflector(cluster, "pods", RealClock(), copy, rng=random.Random(1)).run())
    while not {key_of(kept), key_of(lost)} <= set(copy.objects):
        await asyncio.wait_for(changed.wait(), 10)
        changed.clear()
    await cluster.delete("pods", "default", name_of(lost), grace_s=0)
    await compact()
    new = await create_pod(cluster)
    while set(copy.objects) != {key_of(one) for one in (await everything(cluster, "pods"))[0]}:
        await asyncio.wait_for(changed.wait(), 40)
        changed.clear()
    assert {key_of(kept), key_of(new)} <= set(copy.objects)
    assert key_of(lost) not in copy.objects
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def _telling(call: Callable[[Any], None], changed: asyncio.Event) -> Callable[[Any], None]:
    def tell(given: Any) -> None:
        call(given)
        changed.set()

    return tell


async def test_five_thousand_nodes_are_listed_in_a_moment(cluster: ApiServer, admin: ApiClient) -> None:
    made = await create_nodes(admin, [node_object(f"many-{number:04}") for number in range(NODES)])
    cpu = time.process_time()
    listed, _ = await everything(cluster, "nodes")
    cpu = time.process_time() - cpu
    assert {name_of(one) for one in made} <= {name_of(one) for one in listed}
    assert cpu < 2, "typed models would need more"
    await admin.delete("/api/v1/nodes?labelSelector=kubernetes.io/hostname")
