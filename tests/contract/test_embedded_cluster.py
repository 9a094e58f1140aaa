"""The port's contract, kept by the embedded cluster."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.ids import seeded_ids
from tests.contract.cluster_contract import *  # noqa: F403


@pytest.fixture
async def cluster() -> EmbeddedCluster:
    return EmbeddedCluster(LoopClock(asyncio.get_running_loop()), seeded_ids(random.Random(1)))


@pytest.fixture
def compact(cluster: EmbeddedCluster) -> Callable[[], Awaitable[None]]:
    async def age() -> None:
        cluster.compact()

    return age
