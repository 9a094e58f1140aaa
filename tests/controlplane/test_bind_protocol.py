"""The bind protocol on the real API server, with exactly the rights that deploy/ grants."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from bench.realcluster import ADMIN, TESSERA, RealCluster
from scheduler.clock import Clock, RealClock
from scheduler.kube.api import ApiServer, connect
from tests.contract.cases_bind_protocol import *  # noqa: F403


@pytest.fixture
def clock() -> Clock:
    return RealClock()


@pytest.fixture
async def cluster(real_cluster: RealCluster) -> AsyncIterator[ApiServer]:
    client = await connect(kubeconfig=str(real_cluster.kubeconfig(ADMIN)), in_cluster=False)
    yield client
    await client.close()


@pytest.fixture
async def ours(real_cluster: RealCluster) -> AsyncIterator[ApiServer]:
    client = await connect(kubeconfig=str(real_cluster.kubeconfig(TESSERA)), in_cluster=False)
    yield client
    await client.close()
