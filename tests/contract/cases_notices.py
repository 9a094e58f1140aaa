"""Contract: the Event that tells why a pod waits."""

from __future__ import annotations

import pytest

from scheduler.intake.pod import read_pod
from scheduler.kube.port import Cluster, Conflict
from scheduler.ledger.taking import newborn
from scheduler.notices import event
from tests.contract.making import create_pod


async def test_the_event_of_a_waiting_pod_is_taken_and_names_its_pod(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    row = newborn(read_pod(made).request, fence=0, now_us=1)
    body = event(row, "WaitingForQuota", 1_767_225_600_000_042)
    taken = await cluster.create("events", "default", body)
    assert taken["metadata"]["namespace"] == "default"
    for key in ("reason", "note", "type", "eventTime", "reportingController"):
        assert taken[key] == body[key]
    assert taken["regarding"]["uid"] == made["metadata"]["uid"]
    with pytest.raises(Conflict):
        await cluster.create("events", "default", body)
