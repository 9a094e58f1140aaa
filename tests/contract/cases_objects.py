"""Contract: create, replace, patch, delete."""

from __future__ import annotations

import re

import pytest

from scheduler.kube.port import ApiError, Cluster, Conflict, NotFound
from tests.contract.making import (
    HOLD,
    bound_pod,
    create_node,
    create_pod,
    event,
    fresh_name,
    lease,
    name_of,
    now,
    pod,
    seen,
    version_of,
)


async def test_a_created_pod_has_what_the_api_server_adds(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    metadata, spec = made["metadata"], made["spec"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", metadata["creationTimestamp"])
    assert len(metadata["uid"]) == 36
    assert metadata["namespace"] == "default"
    assert metadata["generation"] == 1
    assert made["status"]["phase"] == "Pending"
    assert spec["schedulerName"] == "contract"
    assert (spec["priority"], spec["terminationGracePeriodSeconds"]) == (0, 30)
    assert spec["containers"][0]["resources"]["requests"] == {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"}
    assert spec["tolerations"] == [
        {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
        for key in ("not-ready", "unreachable")
    ]
    assert await cluster.get("pods", "default", name_of(made)) == made


async def test_a_name_is_generated(cluster: Cluster) -> None:
    body = pod()
    del body["metadata"]["name"]
    body["metadata"]["generateName"] = "job-"
    first, second = await create_pod(cluster, body), await create_pod(cluster, body)
    assert re.fullmatch(r"job-[a-z0-9]{5}", name_of(first))
    assert name_of(first) != name_of(second)


async def test_a_name_is_taken_once(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    with pytest.raises(Conflict) as refused:
        await create_pod(cluster, pod(name_of(made)))
    assert (refused.value.status, refused.value.reason) == (409, "AlreadyExists")


async def test_a_pod_made_again_under_its_name_is_another(cluster: Cluster) -> None:
    first = await create_pod(cluster)
    await cluster.delete("pods", "default", name_of(first))
    second = await create_pod(cluster, pod(name_of(first)))
    assert second["metadata"]["uid"] != first["metadata"]["uid"]


@pytest.mark.parametrize("patch_type", ["merge", "strategic"])
async def test_a_merging_patch_merges_maps_and_null_deletes(cluster: Cluster, patch_type: str) -> None:
    made = await create_pod(cluster)
    body = {"metadata": {"annotations": {"a": "1"}, "labels": {"app": None}}}
    after = await cluster.patch("pods", "default", name_of(made), body, patch_type=patch_type)  # type: ignore[arg-type]
    assert after["metadata"]["annotations"] == {"user": "kept", "a": "1"}
    assert "labels" not in after["metadata"]
    assert int(version_of(after)) > int(version_of(made))


async def test_a_json_patch_tests_before_it_changes(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD, "other/gate")))
    steps = [
        {"op": "test", "path": "/spec/schedulingGates/0/name", "value": HOLD},
        {"op": "remove", "path": "/spec/schedulingGates/0"},
        {"op": "add", "path": "/metadata/annotations/contract~1touch", "value": "1"},
        {"op": "replace", "path": "/metadata/annotations/user", "value": "changed"},
    ]
    after = await cluster.patch("pods", "default", name_of(made), steps, patch_type="json")
    assert after["spec"]["schedulingGates"] == [{"name": "other/gate"}]
    assert after["metadata"]["annotations"] == {"user": "changed", "contract/touch": "1"}
    with pytest.raises(ApiError) as refused:
        await cluster.patch("pods", "default", name_of(made), steps, patch_type="json")
    assert refused.value.status == 422
    assert await cluster.get("pods", "default", name_of(made)) == after


@pytest.mark.parametrize("patch_type", ["merge", "strategic"])
async def test_a_patch_that_changes_nothing_raises_no_version(cluster: Cluster, patch_type: str) -> None:
    made = await create_pod(cluster)
    body = {"metadata": {"annotations": {"user": "kept"}}}
    after = await cluster.patch("pods", "default", name_of(made), body, patch_type=patch_type)  # type: ignore[arg-type]
    assert version_of(after) == version_of(made)
    since = version_of(made)
    await cluster.patch("pods", "default", name_of(made), {"metadata": {"annotations": {"user": "other"}}})
    events = await seen(cluster, "pods", since, names={name_of(made)}, until=1)
    assert events[0].object["metadata"]["annotations"] == {"user": "other"}


async def test_a_status_patch_that_changes_nothing_raises_no_version(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no free GPU"}
    body = {"status": {"conditions": [condition]}}
    options = {"patch_type": "strategic", "subresource": "status"}
    first = await cluster.patch("pods", "default", name_of(made), body, **options)  # type: ignore[arg-type]
    second = await cluster.patch("pods", "default", name_of(made), body, **options)  # type: ignore[arg-type]
    assert version_of(made) != version_of(first) == version_of(second)


async def test_a_stale_version_in_a_patch_is_a_conflict(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    name = name_of(made)
    await cluster.patch("pods", "default", name, {"metadata": {"annotations": {"a": "1"}}})
    body = {"metadata": {"resourceVersion": version_of(made), "annotations": {"a": "2"}}}
    with pytest.raises(Conflict):
        await cluster.patch("pods", "default", name, body)
    assert (await cluster.get("pods", "default", name))["metadata"]["annotations"]["a"] == "1"


@pytest.mark.parametrize("subresource", ["", "status"])
async def test_a_wrong_uid_in_a_patch_is_refused(cluster: Cluster, subresource: str) -> None:
    made = await create_pod(cluster)
    body = {"metadata": {"uid": "00000000-0000-4000-8000-000000000000", "annotations": {"a": "1"}}}
    with pytest.raises(ApiError) as refused:
        await cluster.patch("pods", "default", name_of(made), body, patch_type="strategic", subresource=subresource)
    assert refused.value.status == 422
    assert "field is immutable" in refused.value.message
    right = {"metadata": {"uid": made["metadata"]["uid"], "annotations": {"a": "1"}}}
    after = await cluster.patch(
        "pods", "default", name_of(made), right, patch_type="strategic", subresource=subresource
    )
    assert after["metadata"]["annotations"]["a"] == "1"


async def test_the_pod_patch_cannot_change_the_status(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    body = {"metadata": {"annotations": {"a": "1"}}, "status": {"phase": "Running", "nominatedNodeName": "n"}}
    after = await cluster.patch("pods", "default", name_of(made), body)
    assert after["status"] == made["status"]
    assert after["metadata"]["annotations"]["a"] == "1"


async def test_the_status_patch_can_change_annotations_and_not_the_spec(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD,)))
    body = {
        "metadata": {"annotations": {"a": "1"}},
        "spec": {"schedulingGates": None},
        "status": {"nominatedNodeName": "n"},
    }
    after = await cluster.patch("pods", "default", name_of(made), body, subresource="status")
    assert after["spec"] == made["spec"]
    assert after["status"]["nominatedNodeName"] == "n"
    assert after["metadata"]["annotations"] == {"user": "kept", "a": "1"}


async def test_conditions_are_merged_by_type(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    for kind in ("PodScheduled", "tessera.dev/Admitted", "PodScheduled"):
        body = {"status": {"conditions": [{"type": kind, "status": "False", "message": kind}]}}
        after = await cluster.patch(
            "pods", "default", name_of(made), body, patch_type="strategic", subresource="status"
        )
    assert sorted(one["type"] for one in after["status"]["conditions"]) == ["PodScheduled", "tessera.dev/Admitted"]


@pytest.mark.parametrize(
    "change",
    [
        {"schedulerName": "another"},
        {"nodeName": "somewhere"},
        {"nodeSelector": {"a": "b"}},
        {"terminationGracePeriodSeconds": 5},
        {"containers": [{"name": "main", "resources": {"requests": {"cpu": "2"}}}]},
        {"priority": 7},
    ],
)
async def test_a_pods_spec_is_immutable(cluster: Cluster, change: dict[str, object]) -> None:
    made = await create_pod(cluster)
    with pytest.raises(ApiError) as refused:
        await cluster.patch("pods", "default", name_of(made), {"spec": change}, patch_type="strategic")
    assert refused.value.status == 422
    assert version_of(await cluster.get("pods", "default", name_of(made))) == version_of(made)


async def test_an_image_may_change_and_raises_the_generation(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    body = {"spec": {"containers": [{"name": "main", "image": "pause:3.11"}]}}
    after = await cluster.patch("pods", "default", name_of(made), body, patch_type="strategic")
    assert after["spec"]["containers"][0]["image"] == "pause:3.11"
    assert after["metadata"]["generation"] == 2


async def test_a_replace_needs_the_version_it_was_made_from(cluster: Cluster) -> None:
    made = await cluster.create("leases", "default", lease(holder="me"))
    made["spec"]["holderIdentity"] = "you"
    after = await cluster.replace("leases", "default", name_of(made), made)
    assert after["spec"]["holderIdentity"] == "you"
    assert int(version_of(after)) > int(version_of(made))
    made["spec"]["holderIdentity"] = "late"
    with pytest.raises(Conflict) as refused:
        await cluster.replace("leases", "default", name_of(made), made)
    assert refused.value.status == 409
    assert (await cluster.get("leases", "default", name_of(made)))["spec"]["holderIdentity"] == "you"


async def test_a_lease_cannot_be_replaced_blindly(cluster: Cluster) -> None:
    made = await cluster.create("leases", "default", lease())
    with pytest.raises(ApiError) as refused:
        await cluster.replace("leases", "default", name_of(made), lease(name_of(made), holder="blind"))
    assert refused.value.status == 422


async def test_a_replace_that_changes_nothing_raises_no_version(cluster: Cluster) -> None:
    made = await cluster.create("leases", "default", lease())
    assert version_of(await cluster.replace("leases", "default", name_of(made), made)) == version_of(made)


async def test_a_lease_that_is_absent_is_created_by_replacing_it(cluster: Cluster) -> None:
    name = fresh_name("lease")
    made = await cluster.replace("leases", "default", name, lease(name, holder="first"))
    assert (await cluster.get("leases", "default", name)) == made


async def test_a_replace_of_another_uid_is_a_conflict(cluster: Cluster) -> None:
    made = await cluster.create("leases", "default", lease())
    made["metadata"]["uid"] = "00000000-0000-4000-8000-000000000000"
    made["spec"]["holderIdentity"] = "you"
    with pytest.raises(Conflict):
        await cluster.replace("leases", "default", name_of(made), made)


async def test_an_event_is_written_and_counted_up_in_its_series(cluster: Cluster) -> None:
    body = event(await create_pod(cluster))
    made = await cluster.create("events", "default", body)
    assert name_of(made).startswith("why-")
    series = {"count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z"}
    after = await cluster.patch("events", "default", name_of(made), {"series": series})
    assert (after["series"], after["note"]) == (series, "no free GPU")
    with pytest.raises(ApiError) as refused:
        await cluster.patch("events", "default", name_of(made), {"note": "another"})
    assert refused.value.status == 422


@pytest.mark.parametrize("absent", ["eventTime", "reportingController", "reportingInstance", "action", "reason"])
async def test_an_event_says_who_when_and_what(cluster: Cluster, absent: str) -> None:
    body = event(await create_pod(cluster))
    del body[absent]
    with pytest.raises(ApiError) as refused:
        await cluster.create("events", "default", body)
    assert refused.value.status == 422


async def test_a_gated_pods_selector_may_be_narrowed(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(gates=(HOLD,)))
    after = await cluster.patch("pods", "default", name_of(made), {"spec": {"nodeSelector": {"a": "b"}}})
    assert after["spec"]["nodeSelector"] == {"a": "b"}
    for change in ({"nodeSelector": {"a": "c"}}, {"nodeSelector": None}, {"nodeName": "somewhere"}):
        with pytest.raises(ApiError) as refused:
            await cluster.patch("pods", "default", name_of(made), {"spec": change})
        assert refused.value.status == 422


async def test_tolerations_are_only_added(cluster: Cluster) -> None:
    made = await create_pod(cluster, pod(tolerations=[{"key": "a", "operator": "Exists"}]))
    for change, length in (([{"key": "a", "operator": "Exists"}, {"key": "b", "operator": "Exists"}], 4), (None, 0)):
        body = {"spec": {"tolerations": change}}
        if length:
            after = await cluster.patch("pods", "default", name_of(made), body)
            assert len(after["spec"]["tolerations"]) == length
        else:
            with pytest.raises(ApiError) as refused:
                await cluster.patch("pods", "default", name_of(made), body)
            assert refused.value.status == 422


async def test_nodes_have_no_namespace_and_their_status_apart(cluster: Cluster) -> None:
    made = await create_node(cluster)
    assert "namespace" not in made["metadata"]
    cordoned = await cluster.patch(
        "nodes", "", name_of(made), {"spec": {"unschedulable": True}, "status": {"allocatable": {"cpu": "1"}}}
    )
    assert cordoned["spec"]["unschedulable"] is True
    assert cordoned["status"]["allocatable"]["cpu"] == "8"
    body = {"status": {"allocatable": {"nvidia.com/gpu": "7"}}}
    after = await cluster.patch("nodes", "", name_of(made), body, patch_type="strategic", subresource="status")
    assert (after["status"]["allocatable"]["nvidia.com/gpu"], after["status"]["allocatable"]["cpu"]) == ("7", "8")


async def test_taints_are_replaced_as_a_whole(cluster: Cluster) -> None:
    made = await create_node(cluster)
    for key in ("first", "second"):
        body = {"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}}
        after = await cluster.patch("nodes", "", name_of(made), body, patch_type="strategic")
    assert after["spec"]["taints"] == [{"key": "second", "effect": "NoSchedule"}]


async def test_an_unbound_pod_is_deleted_at_once(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    await cluster.delete("pods", "default", name_of(made))
    events = await seen(cluster, "pods", version_of(made), names={name_of(made)}, until=2)
    assert [event.type for event in events] == ["MODIFIED", "DELETED"]
    with pytest.raises(NotFound):
        await cluster.get("pods", "default", name_of(made))
    with pytest.raises(NotFound):
        await cluster.delete("pods", "default", name_of(made))


async def test_a_bound_pod_is_given_its_grace(cluster: Cluster) -> None:
    made = await bound_pod(cluster)
    since = await now(cluster, "pods")
    await cluster.delete("pods", "default", name_of(made))
    leaving = await cluster.get("pods", "default", name_of(made))
    assert leaving["metadata"]["deletionGracePeriodSeconds"] == 30
    assert leaving["metadata"]["deletionTimestamp"] > made["metadata"]["creationTimestamp"]
    await cluster.delete("pods", "default", name_of(made), grace_s=0)
    with pytest.raises(NotFound):
        await cluster.get("pods", "default", name_of(made))
    events = await seen(cluster, "pods", since, names={name_of(made)}, until=3)
    assert [event.type for event in events] == ["MODIFIED", "MODIFIED", "DELETED"]
    assert [event.object["metadata"]["deletionGracePeriodSeconds"] for event in events] == [30, 0, 0]
    assert {event.object["metadata"]["generation"] for event in events} == {2}


async def test_a_later_deletion_shortens_the_grace_and_never_prolongs_it(cluster: Cluster) -> None:
    made = await bound_pod(cluster)
    for asked, given in ((20, 20), (25, 20), (10, 10)):
        await cluster.delete("pods", "default", name_of(made), grace_s=asked)
        leaving = await cluster.get("pods", "default", name_of(made))
        assert leaving["metadata"]["deletionGracePeriodSeconds"] == given


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_a_pod_that_ended_is_deleted_at_once(cluster: Cluster, phase: str) -> None:
    made = await bound_pod(cluster)
    await cluster.patch("pods", "default", name_of(made), {"status": {"phase": phase}}, subresource="status")
    await cluster.delete("pods", "default", name_of(made))
    with pytest.raises(NotFound):
        await cluster.get("pods", "default", name_of(made))


async def test_only_the_pod_with_this_uid_is_deleted(cluster: Cluster) -> None:
    made = await create_pod(cluster)
    with pytest.raises(Conflict):
        await cluster.delete("pods", "default", name_of(made), uid="00000000-0000-4000-8000-000000000000")
    await cluster.delete("pods", "default", name_of(made), uid=made["metadata"]["uid"])
    with pytest.raises(NotFound):
        await cluster.get("pods", "default", name_of(made))


async def test_a_node_is_deleted_at_once(cluster: Cluster) -> None:
    made = await create_node(cluster)
    await cluster.delete("nodes", "", name_of(made), uid=made["metadata"]["uid"])
    with pytest.raises(NotFound):
        await cluster.get("nodes", "", name_of(made))


async def test_two_writers_do_not_undo_each_other(cluster: Cluster) -> None:
    name = fresh_name("raced")
    made = await cluster.create("leases", "default", lease(name))
    first, second = dict(made), dict(made)
    await cluster.replace("leases", "default", name, first | {"spec": {"holderIdentity": "first"}})
    with pytest.raises(Conflict):
        await cluster.replace("leases", "default", name, second | {"spec": {"holderIdentity": "second"}})
    assert (await cluster.get("leases", "default", name))["spec"]["holderIdentity"] == "first"
