"""Contract: queues, which are custom resources, and namespaces."""

from __future__ import annotations

import pytest

from scheduler.kube.port import ApiError, Cluster, Conflict, NotFound, Object
from tests.contract.making import create_pod, everything, fresh_name, name_of, now, queue, seen, version_of


async def make(cluster: Cluster, **spec: object) -> Object:
    return await cluster.create("queues", "", queue(**spec))


async def test_a_queue_is_created_listed_watched_and_deleted(cluster: Cluster) -> None:
    since = await now(cluster, "queues")
    made = await make(cluster, nominal={"gpu": 4, "cpu": "8", "mig:1g.10gb": 2}, namespaceSelector={})
    assert (made["metadata"]["generation"], "namespace" in made["metadata"]) == (1, False)
    assert made["spec"]["nominal"] == {"gpu": 4, "cpu": "8", "mig:1g.10gb": 2}
    assert made["spec"]["namespaceSelector"] == {}, "selects everything, and absent would select nothing"
    assert await cluster.get("queues", "", name_of(made)) == made
    assert name_of(made) in [name_of(one) for one in (await everything(cluster, "queues"))[0]]
    await cluster.delete("queues", "", name_of(made), uid=made["metadata"]["uid"])
    with pytest.raises(NotFound):
        await cluster.get("queues", "", name_of(made))
    events = await seen(cluster, "queues", since, names={name_of(made)}, until=2)
    assert [event.type for event in events] == ["ADDED", "DELETED"]


async def test_a_queues_status_is_apart_from_its_spec(cluster: Cluster) -> None:
    made = await cluster.create("queues", "", {**queue(weight=2), "status": {"pending": 9}})
    assert "status" not in made, "whoever creates it cannot say what is used"
    body = {"spec": {"weight": 9}, "status": {"used": {"gpu": 3, "cpu": "2"}, "pending": 1}}
    after = await cluster.patch("queues", "", name_of(made), body, subresource="status")
    assert (after["spec"]["weight"], after["status"]) == (2, body["status"])
    assert after["metadata"]["generation"] == 1
    less = {"spec": {"weight": 5}, "status": {"used": {"gpu": None}}}
    changed = await cluster.patch("queues", "", name_of(made), less)
    assert (changed["spec"]["weight"], changed["status"]) == (5, body["status"])
    assert changed["metadata"]["generation"] == 2
    emptied = await cluster.patch("queues", "", name_of(made), less, subresource="status")
    assert emptied["status"] == {"used": {"cpu": "2"}, "pending": 1}


async def test_a_queues_status_that_is_the_same_raises_no_version(cluster: Cluster) -> None:
    made = await make(cluster)
    body = {"status": {"pending": 1, "used": {"gpu": 0}}}
    first = await cluster.patch("queues", "", name_of(made), body, subresource="status")
    second = await cluster.patch("queues", "", name_of(made), body, subresource="status")
    assert version_of(made) != version_of(first) == version_of(second)


async def test_a_queues_status_is_written_to_that_queue_alone(cluster: Cluster) -> None:
    made = await make(cluster)
    body = {"metadata": {"resourceVersion": version_of(made)}, "status": {"pending": 1}}
    await cluster.patch("queues", "", name_of(made), body, subresource="status")
    with pytest.raises(Conflict):
        await cluster.patch("queues", "", name_of(made), body, subresource="status")
    with pytest.raises(NotFound):
        await cluster.patch("queues", "", fresh_name("absent"), {"status": {}}, subresource="status")


async def test_a_custom_resource_knows_no_strategic_merge(cluster: Cluster) -> None:
    made = await make(cluster)
    with pytest.raises(ApiError) as refused:
        await cluster.patch("queues", "", name_of(made), {"spec": {"weight": 3}}, patch_type="strategic")
    assert refused.value.status == 415


async def test_a_namespace_has_labels_its_name_among_them(cluster: Cluster) -> None:
    name = fresh_name("team")
    since = await now(cluster, "namespaces")
    made = await cluster.create("namespaces", "", {"metadata": {"name": name, "labels": {"team": "a"}}})
    assert made["metadata"]["labels"] == {"team": "a", "kubernetes.io/metadata.name": name}
    await cluster.patch("namespaces", "", name, {"metadata": {"labels": {"team": "b"}}})
    events = await seen(cluster, "namespaces", since, names={name}, until=2)
    assert [(event.type, event.object["metadata"]["labels"]["team"]) for event in events] == [
        ("ADDED", "a"),
        ("MODIFIED", "b"),
    ]


async def test_a_pods_namespace_is_there(cluster: Cluster) -> None:
    await create_pod(cluster)
    found = await cluster.get("namespaces", "", "default")
    assert found["metadata"]["labels"]["kubernetes.io/metadata.name"] == "default"
