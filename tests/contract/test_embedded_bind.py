"""The bind protocol on the embedded cluster."""

import asyncio
import random

import pytest

from scheduler.clock import Clock, LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.ids import seeded_ids
from tests.contract.cases_bind_protocol import *  # noqa: F403


@pytest.fixture
async def clock() -> Clock:
    return LoopClock(asyncio.get_running_loop())


@pytest.fixture
async def cluster(clock: Clock) -> EmbeddedCluster:
    return EmbeddedCluster(clock, seeded_ids(random.Random(1)))


@pytest.fixture
async def ours(cluster: EmbeddedCluster) -> EmbeddedCluster:
    return cluster
