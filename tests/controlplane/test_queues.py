"""The CRD of queues on a real API server: what its schema refuses, and what kubectl shows of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from bench.apiclient import ApiClient
from bench.realcluster import TESSERA, RealCluster
from scheduler.clock import RealClock
from scheduler.crew import Crew
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.intake.queue import read_queue
from scheduler.intake.reading import Unreadable
from scheduler.kube.api import connect
from scheduler.ledger.quota import potential
from scheduler.queues import QueueFeed
from scheduler.store.store import Store

QUEUES = "/apis/tessera.dev/v1alpha1/queues"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


@pytest.fixture(autouse=True)
async def no_queues(admin: ApiClient) -> AsyncIterator[None]:
    yield
    await admin.delete(QUEUES)


def queue(name: str = "vision", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "tessera.dev/v1alpha1", "kind": "Queue", "metadata": {"name": name}, "spec": spec}


async def test_what_the_documents_may_say_is_kept_as_it_is(admin: ApiClient) -> None:
    spec = {
        "parent": "research",
        "weight": 2,
        "nominal": {
            "gpu": 16, "H100": 8, "NVIDIA-A100-SXM4-80GB": 1, "mig:1g.10gb": 4, "mig:1g.10gb+me": 1, "milli": 2000,
            "cpu": "200", "memory": "1Ti", "storage:fast": 500,
        },
        "borrowLimit": {},
        "lendLimit": {"gpu": 0},
        "namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "In", "values": ["a"]}]},
        "autoscale": False,
        "stopped": False,
    }  # fmt: skip
    made = await admin.post(f"{QUEUES}?fieldValidation=Strict", queue(**spec))
    assert made["spec"] == spec
    assert read_queue(made).nominal["memory"] == 1 << 20
    everybody = await admin.post(QUEUES, queue("everybody", namespaceSelector={}))
    assert everybody["spec"] == {"weight": 1, "namespaceSelector": {}}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        pytest.param({"nominal": {"gpu": -1}}, "nominal", id="negative"),
        pytest.param({"nominal": {"cpu": "-1"}}, "nominal", id="negative quantity"),
        pytest.param({"nominal": {"cpu": "many"}}, "nominal", id="no quantity"),
        pytest.param({"nominal": {"gpu": 1.5}}, "nominal", id="half a GPU"),
        pytest.param({"nominal": {"nvidia.com/gpu": 1}}, "keys are gpu", id="resource name"),
        pytest.param({"lendLimit": {"mig:large": 1}}, "keys are gpu", id="no profile"),
        pytest.param({"weight": 0}, "weight", id="weight 0"),
        pytest.param({"weight": 1 << 31}, "weight", id="overflow"),
        pytest.param({"parent": "Research"}, "parent", id="no name"),
        pytest.param({"parent": "vision"}, "its own parent", id="own parent"),
        pytest.param({"stopped": "yes"}, "stopped", id="no flag"),
        pytest.param(
            {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}, "In and NotIn", id="values"
        ),
    ],
)
async def test_the_schema_refuses_what_tessera_would(admin: ApiClient, spec: dict[str, Any], said: str) -> None:
    refused = await admin.ask("POST", QUEUES, queue(**spec))
    assert refused.status == 422
    assert said in refused.message
    if said != "its own parent":  # one queue alone does not show that
        with pytest.raises(Unreadable):
            read_queue(queue(**spec))


async def test_a_name_that_no_label_can_hold_is_refused(admin: ApiClient) -> None:
    refused = await admin.ask("POST", QUEUES, queue("a" * 64))
    assert refused.status == 422
    assert "at most 63 characters" in refused.message


async def test_kubectl_shows_what_is_used_borrowed_and_pending(admin: ApiClient, tessera: ApiClient) -> None:
    await admin.post(QUEUES, queue(nominal={"gpu": 4}))
    shown = {"used": "gpu 6/4", "borrowed": "gpu 2"}
    await tessera.patch(f"{QUEUES}/vision/status", {"status": {"used": {"gpu": 6}, "pending": 3, "shown": shown}})
    table = await _table(admin)
    titles = [one["name"] for one in table["columnDefinitions"] if one["priority"] == 0]
    assert titles == ["Name", "USED/QUOTA", "BORROWED", "PENDING", "AGE"]
    cells = dict(zip((one["name"] for one in table["columnDefinitions"]), table["rows"][0]["cells"], strict=True))
    assert (cells["Name"], cells["USED/QUOTA"], cells["BORROWED"], cells["PENDING"]) == (
        "vision",
        "gpu 6/4",
        "gpu 2",
        3,
    )


async def _table(admin: ApiClient) -> dict[str, Any]:
    async with admin._session.get(QUEUES, headers={"Accept": TABLE}) as answer:
        found: dict[str, Any] = await answer.json(content_type=None)
        return found


def documents() -> list[dict[str, Any]]:
    """The tree that the documentation begins with."""
    page = (Path(__file__).parents[2] / "docs" / "queues.md").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(page.split("```yaml\n")[1].split("```")[0]))


async def test_tessera_follows_the_documented_queues_and_writes_what_stands_there(
    admin: ApiClient, namespace: str, real_cluster: RealCluster
) -> None:
    for document in documents():
        await admin.post(f"{QUEUES}?fieldValidation=Strict", document)
    await admin.post(QUEUES, queue("lost", parent="nowhere"))
    clock, crew, desk = RealClock(), Crew(), Desk(RealClock(), Policies())
    client = await connect(kubeconfig=str(real_cluster.kubeconfig(TESSERA)), in_cluster=False)
    try:
        feed = QueueFeed(desk, client, clock, Random(1), lambda: "", Store.open("sqlite://"), 3600.0)
        await feed.start(crew)
        quota = desk.queues.quota
        assert [potential(quota, name, "gpu") for name in ("speech", "vision")] == [20, 24]
        assert desk.queues.refusal("vision", namespace) == "NotAuthorized"
        await admin.patch(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": {"team": "vision"}}})
        async with asyncio.timeout(20):
            while desk.queues.refusal("vision", namespace):
                crew.check()
                await clock.sleep(0.01)
        await feed.step()
    finally:
        await crew.dismiss()
        await client.close()
    statuses = {one["metadata"]["name"]: one["status"] for one in (await admin.get(QUEUES))["items"]}
    assert statuses["vision"]["used"] == {
        "gpu": 0,
        "H100": 0,
        "mig:1g.10gb": 0,
        "milli": 0,
        "cpu": "0",
        "memory": "0Mi",
    }
    assert statuses["vision"]["shown"]["used"].startswith("gpu 0/16, H100 0/8, ")
    ready = {name: status["conditions"][0]["status"] for name, status in statuses.items()}
    assert ready == {"lost": "False", "research": "True", "speech": "True", "vision": "True"}
    assert "there is no queue nowhere" in statuses["lost"]["conditions"][0]["message"]
