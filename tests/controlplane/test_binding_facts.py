"""What the ledger relies on in the API server: where one of these fails, binding is not safe on that version."""

from __future__ import annotations

import asyncio

import pytest

from bench.apiclient import JSON_PATCH, STRATEGIC, ApiClient, Json
from bench.kube_objects import binding_object, create_pods, delete_pod, pod_object, pod_path

HOLD = "tessera.dev/hold"
UNGATE = {"spec": {"schedulingGates": [{"$patch": "delete", "name": HOLD}]}}


async def make(api: ApiClient, namespace: str, **kind: object) -> Json:
    (pod,) = await create_pods(api, [pod_object("pod", namespace=namespace, **kind)])
    return pod


async def touch(api: ApiClient, pod: Json, value: str) -> Json:
    return await api.patch(pod_path(pod), {"metadata": {"annotations": {"tessera.dev/touch": value}}})


async def test_a_binding_merges_annotations_and_labels_in_the_update_that_sets_the_node(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    pod = await make(admin, namespace, annotations={"kept": "yes"}, labels={"app": "train"})
    version = pod["metadata"]["resourceVersion"]
    body = binding_object(
        pod, node, annotations={"tessera.dev/allocation": "{}"}, uid=pod["metadata"]["uid"], resourceVersion=version
    )
    body["metadata"]["labels"] = {"bound": "yes"}
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 201
    async with asyncio.timeout(10):
        events = admin.watch(f"/api/v1/namespaces/{namespace}/pods", version)
        first = (await anext(events))["object"]
        await events.aclose()
    assert first["spec"]["nodeName"] == node
    assert first["metadata"]["annotations"] == {"kept": "yes", "tessera.dev/allocation": "{}"}
    assert first["metadata"]["labels"]["app"] == "train"
    assert first["metadata"]["labels"]["bound"] == "yes"


async def test_a_binding_with_another_uid_is_a_conflict(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    pod = await make(admin, namespace)
    body = binding_object(pod, node, uid="00000000-0000-0000-0000-000000000000")
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 409
    assert "nodeName" not in (await admin.get(pod_path(pod)))["spec"]


async def test_a_binding_for_a_deleted_pod_does_not_reach_its_namesake(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    pod = await make(admin, namespace)
    await delete_pod(admin, pod)
    namesake = await make(admin, namespace)
    assert namesake["metadata"]["uid"] != pod["metadata"]["uid"]
    body = binding_object(pod, node, uid=pod["metadata"]["uid"])
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 409
    assert "nodeName" not in (await admin.get(pod_path(pod)))["spec"]


async def test_a_touch_voids_a_binding_in_flight(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    pod = await make(admin, namespace)
    in_flight = binding_object(
        pod, node, uid=pod["metadata"]["uid"], resourceVersion=pod["metadata"]["resourceVersion"]
    )
    touched = await touch(tessera, pod, "1")
    assert (await tessera.ask("POST", pod_path(pod, "binding"), in_flight)).status == 409
    fresh = binding_object(
        pod, node, uid=pod["metadata"]["uid"], resourceVersion=touched["metadata"]["resourceVersion"]
    )
    assert (await tessera.ask("POST", pod_path(pod, "binding"), fresh)).status == 201


async def test_a_patch_that_changes_nothing_does_not_raise_the_version(
    admin: ApiClient, tessera: ApiClient, namespace: str
) -> None:
    pod = await make(admin, namespace)
    once = await touch(tessera, pod, "1")
    again = await touch(tessera, pod, "1")
    other = await touch(tessera, pod, "2")
    assert once["metadata"]["resourceVersion"] == again["metadata"]["resourceVersion"]
    assert other["metadata"]["resourceVersion"] != again["metadata"]["resourceVersion"]


async def test_a_bound_pod_is_not_bound_again(admin: ApiClient, tessera: ApiClient, namespace: str, node: str) -> None:
    pod = await make(admin, namespace)
    body = binding_object(pod, node, uid=pod["metadata"]["uid"])
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 201
    again = await tessera.ask("POST", pod_path(pod, "binding"), body)
    assert again.status == 409
    assert f'already assigned to node "{node}"' in again.message


async def test_a_pod_being_deleted_is_not_bound(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    body = pod_object("pod", namespace=namespace)
    body["metadata"]["finalizers"] = ["example.com/keep"]
    (pod,) = await create_pods(admin, [body])
    await admin.delete(pod_path(pod))
    refused = await tessera.ask("POST", pod_path(pod, "binding"), binding_object(pod, node, uid=pod["metadata"]["uid"]))
    assert refused.status == 409
    assert "is being deleted" in refused.message
    await admin.patch(pod_path(pod), {"metadata": {"finalizers": None}})


async def test_a_gated_pod_is_not_bound_and_an_ungated_one_is(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    pod = await make(admin, namespace, gates=[HOLD])
    body = binding_object(pod, node, uid=pod["metadata"]["uid"])
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 409
    await tessera.patch(pod_path(pod), UNGATE, content_type=STRATEGIC)
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 201


async def test_ungating_removes_one_gate_may_be_repeated_and_minds_the_uid(
    admin: ApiClient, tessera: ApiClient, namespace: str
) -> None:
    pod = await make(admin, namespace, gates=["example.com/other", HOLD])
    wrong = {"metadata": {"uid": "00000000-0000-0000-0000-000000000000"}, **UNGATE}
    refused = await tessera.ask("PATCH", pod_path(pod), wrong, content_type=STRATEGIC)
    assert refused.status == 422
    assert "metadata.uid" in refused.message
    right = {"metadata": {"uid": pod["metadata"]["uid"]}, **UNGATE}
    for _ in range(2):
        left = await tessera.patch(pod_path(pod), right, content_type=STRATEGIC)
        assert left["spec"]["schedulingGates"] == [{"name": "example.com/other"}]


async def test_one_json_patch_tests_and_removes_the_gate(admin: ApiClient, tessera: ApiClient, namespace: str) -> None:
    pod = await make(admin, namespace, gates=[HOLD])
    gate = "/spec/schedulingGates/0"
    steps = [{"op": "test", "path": f"{gate}/name", "value": HOLD}, {"op": "remove", "path": gate}]
    ungated = await tessera.patch(pod_path(pod), steps, content_type=JSON_PATCH)
    assert not ungated["spec"].get("schedulingGates")
    assert (await tessera.ask("PATCH", pod_path(pod), steps, content_type=JSON_PATCH)).status == 422


async def test_a_gate_cannot_be_put_back(admin: ApiClient, namespace: str) -> None:
    pod = await make(admin, namespace, gates=[HOLD])
    await admin.patch(pod_path(pod), UNGATE, content_type=STRATEGIC)
    again = {"spec": {"schedulingGates": [{"name": HOLD}]}}
    assert (await admin.ask("PATCH", pod_path(pod), again, content_type=STRATEGIC)).status == 422


async def test_a_pod_cannot_name_its_node_and_be_gated(admin: ApiClient, namespace: str, node: str) -> None:
    body = pod_object("pod", namespace=namespace, gates=[HOLD])
    body["spec"]["nodeName"] = node
    assert (await admin.ask("POST", f"/api/v1/namespaces/{namespace}/pods", body)).status == 422


@pytest.mark.parametrize("gates", [(), (HOLD,)], ids=["ungated", "gated"])
async def test_a_nomination_minds_the_uid_and_a_binding_clears_it(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str, gates: tuple[str, ...]
) -> None:
    pod = await make(admin, namespace, gates=gates)
    wish = {"status": {"nominatedNodeName": node}}
    wrong = {"metadata": {"uid": "00000000-0000-0000-0000-000000000000"}, **wish}
    assert (await tessera.ask("PATCH", pod_path(pod, "status"), wrong)).status == 422
    nominated = await tessera.patch(pod_path(pod, "status"), {"metadata": {"uid": pod["metadata"]["uid"]}, **wish})
    assert nominated["status"]["nominatedNodeName"] == node
    ungated = await tessera.patch(pod_path(pod), UNGATE, content_type=STRATEGIC)
    body = binding_object(pod, node, resourceVersion=ungated["metadata"]["resourceVersion"])
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 201
    bound = await admin.get(pod_path(pod))
    assert bound["spec"]["nodeName"] == node
    assert "nominatedNodeName" not in bound["status"]
