"""The CRD of queues on a real API server: what its schema refuses, and what kubectl shows of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from bench.apiclient import ApiClient
from scheduler.intake.queue import read_queue
from scheduler.intake.reading import Unreadable

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
