"""Contract: the Binding and the scheduling gate."""

from __future__ import annotations

import pytest

from scheduler.kube.port import ApiError, Cluster, Conflict, NotFound
from tests.contract.making import (
    HOLD,
    binding,
    bound_pod,
    create_pod,
    fresh_name,
    name_of,
    pod,
    seen,
    version_of,
)

UNGATE = {"schedulingGates": [{"$patch": "delete", "name": HOLD}]}
OTHER_UID = "00000000-0000-4000-8000-000000000000"


async def test_a_binding_writes_node_annotations_and_labels_at_once(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    name = name_of(made)
    body = binding(
        made,
        "gpu-1",
        uid=made["metadata"]["uid"],
        resourceVersion=version_of(made),
        annotations={"contract/allocation": "{}"},
        labels={"topology.kubernetes.io/zone": "a"},
    )
    await cluster.bind("default", name, body)
    events = await seen(cluster, "pods", version_of(made), names={name}, until=1)
    after = events[0].object
    assert after["spec"]["nodeName"] == "gpu-1"
    assert after["metadata"]["annotations"] == {"user": "kept", "contract/allocation": "{}"}
    assert after["metadata"]["labels"] == {"app": "kept", "topology.kubernetes.io/zone": "a"}
    conditions = {one["type"]: one["status"] for one in after["status"]["conditions"]}
    assert conditions["PodScheduled"] == "True"
    assert await cluster.get("pods", "default", name) == after


async def test_a_binding_clears_the_nomination(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    body = {"status": {"nominatedNodeName": "gpu-1"}}
    nominated = await cluster.patch("pods", "default", name_of(made), body, subresource="status")
    assert nominated["status"]["nominatedNodeName"] == "gpu-1"
    await cluster.bind("default", name_of(made), binding(made, "gpu-1"))
    assert "nominatedNodeName" not in (await cluster.get("pods", "default", name_of(made)))["status"]


async def test_a_binding_with_the_wrong_uid_is_a_conflict(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    with pytest.raises(Conflict) as refused:
        await cluster.bind("default", name_of(made), binding(made, "gpu-1", uid=OTHER_UID))
    assert refused.value.status == 409
    assert await cluster.get("pods", "default", name_of(made)) == made


async def test_a_touch_voids_a_binding_in_flight(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    await cluster.patch("pods", "default", name_of(made), {"metadata": {"annotations": {"contract/touch": "1"}}})
    with pytest.raises(Conflict):
        await cluster.bind("default", name_of(made), binding(made, "gpu-1", resourceVersion=version_of(made)))
    assert "nodeName" not in (await cluster.get("pods", "default", name_of(made)))["spec"]


@pytest.mark.parametrize("node", ["gpu-1", "gpu-2"])
async def test_a_pod_is_bound_once(cluster: Cluster, node: str) -> None:
    made = await bound_pod(cluster, "gpu-1")
    with pytest.raises(Conflict) as refused:
        await cluster.bind("default", name_of(made), binding(made, node, annotations={"a": "late"}))
    assert 'is already assigned to node "gpu-1"' in refused.value.message
    assert await cluster.get("pods", "default", name_of(made)) == made


async def test_a_gated_pod_is_not_bound(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD,)))
    with pytest.raises(Conflict):
        await cluster.bind("default", name_of(made), binding(made, "gpu-1"))
    assert "nodeName" not in (await cluster.get("pods", "default", name_of(made)))["spec"]


async def test_a_pod_being_deleted_is_not_bound_elsewhere(cluster: Cluster) -> None:
    made = await bound_pod(cluster, "gpu-1")
    await cluster.delete("pods", "default", name_of(made))
    with pytest.raises(Conflict) as refused:
        await cluster.bind("default", name_of(made), binding(made, "gpu-2"))
    assert "being deleted" in refused.value.message


async def test_a_pod_that_is_not_there_is_not_bound(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    await cluster.delete("pods", "default", name_of(made))
    with pytest.raises(NotFound):
        await cluster.bind("default", name_of(made), binding(made, "gpu-1"))


async def test_a_pod_made_again_is_not_bound_by_the_old_binding(cluster: Cluster) -> None:
    old = await create_pod(cluster)
    await cluster.delete("pods", "default", name_of(old))
    new = await create_pod(cluster, pod(name_of(old)))
    with pytest.raises(Conflict):
        await cluster.bind("default", name_of(old), binding(old, "gpu-1", uid=old["metadata"]["uid"]))
    assert await cluster.get("pods", "default", name_of(new)) == new


async def test_a_gated_pod_says_so(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD,)))
    (condition,) = made["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == (
        "PodScheduled",
        "False",
        "SchedulingGated",
    )


async def test_ungating_removes_one_gate_and_may_be_repeated(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD, "other/gate")))
    body = {"metadata": {"uid": made["metadata"]["uid"]}, "spec": UNGATE}
    first = await cluster.patch("pods", "default", name_of(made), body, patch_type="strategic")
    again = await cluster.patch("pods", "default", name_of(made), body, patch_type="strategic")
    assert first["spec"]["schedulingGates"] == [{"name": "other/gate"}]
    assert first["metadata"]["generation"] == 2
    assert version_of(again) == version_of(first)


async def test_the_last_gate_leaves_no_trace(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD,)))
    after = await cluster.patch("pods", "default", name_of(made), {"spec": UNGATE}, patch_type="strategic")
    assert "schedulingGates" not in after["spec"]
    await cluster.bind("default", name_of(made), binding(made, "gpu-1"))


async def test_ungating_with_the_wrong_uid_is_refused(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD,)))
    body = {"metadata": {"uid": OTHER_UID}, "spec": UNGATE}
    with pytest.raises(ApiError) as refused:
        await cluster.patch("pods", "default", name_of(made), body, patch_type="strategic")
    assert refused.value.status == 422
    assert await cluster.get("pods", "default", name_of(made)) == made


@pytest.mark.parametrize("gates", [(), ("other/gate",)])
async def test_a_gate_cannot_be_put_back(cluster: Cluster, gates: tuple[str, ...]) -> None:
    made = await create_pod(cluster, pod(gates=gates))
    body = {"spec": {"schedulingGates": [{"name": HOLD}]}}
    with pytest.raises(ApiError) as refused:
        await cluster.patch("pods", "default", name_of(made), body, patch_type="strategic")
    assert refused.value.status == 422


async def test_a_pod_has_a_node_or_gates(cluster: Cluster) -> None:
    with pytest.raises(ApiError) as refused:
        await create_pod(cluster, pod(fresh_name(), gates=(HOLD,), nodeName="gpu-1"))
    assert refused.value.status == 422
