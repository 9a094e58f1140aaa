"""Policy V1 on a real API server: what Tessera alone writes cannot be forged by anybody, on no path."""

from __future__ import annotations

import pytest

from bench.apiclient import JSON_PATCH, ApiClient, Json
from bench.kube_objects import binding_object, create_pods, delete_pod, pod_object, pod_path
from bench.realcluster import KUBE_SCHEDULER, RealCluster

GUARDED = ["tessera.dev/allocation", "tessera.dev/touch", "tessera.dev/request"]
EACH_GUARDED = pytest.mark.parametrize("key", GUARDED)


async def make(api: ApiClient, namespace: str, **kind: object) -> Json:
    (pod,) = await create_pods(api, [pod_object("pod", namespace=namespace, **kind)])
    return pod


async def annotations_of(api: ApiClient, pod: Json) -> dict[str, str]:
    return (await api.get(pod_path(pod)))["metadata"].get("annotations", {})


def written(**annotations: str | None) -> Json:
    return {"metadata": {"annotations": annotations}}


@EACH_GUARDED
async def test_a_pod_cannot_be_created_with_it(admin: ApiClient, namespace: str, key: str) -> None:
    forged = pod_object("pod", namespace=namespace, annotations={key: "{}"})
    reply = await admin.ask("POST", f"/api/v1/namespaces/{namespace}/pods", forged)
    assert reply.status == 422
    assert f"only Tessera may set, change or remove {key}" in reply.message


@EACH_GUARDED
@pytest.mark.parametrize("subresource", ["", "status"])
async def test_a_patch_cannot_set_change_or_remove_it(
    admin: ApiClient, tessera: ApiClient, namespace: str, key: str, subresource: str
) -> None:
    pod = await make(admin, namespace)
    path = pod_path(pod, subresource)
    assert (await admin.ask("PATCH", path, written(**{key: "forged"}))).status == 422
    await tessera.patch(path, written(**{key: "true"}))
    assert (await admin.ask("PATCH", path, written(**{key: "forged"}))).status == 422
    assert (await admin.ask("PATCH", path, written(**{key: ""}))).status == 422
    assert (await admin.ask("PATCH", path, written(**{key: None}))).status == 422
    assert await annotations_of(admin, pod) == {key: "true"}


async def test_a_put_cannot_drop_it_and_an_empty_value_counts_as_set(
    admin: ApiClient, tessera: ApiClient, namespace: str
) -> None:
    pod = await make(admin, namespace)
    assert (await admin.ask("PATCH", pod_path(pod), written(**{"tessera.dev/touch": ""}))).status == 422
    marked = await tessera.patch(pod_path(pod), written(**{"tessera.dev/touch": "1"}))
    del marked["metadata"]["annotations"]
    assert (await admin.ask("PUT", pod_path(pod), marked)).status == 422


@EACH_GUARDED
async def test_ephemeral_containers_are_no_way_round(admin: ApiClient, namespace: str, key: str) -> None:
    pod = await make(admin, namespace)
    debug = {"name": "debug", "image": "pause:3.10", "terminationMessagePolicy": "File"}
    forged = {**written(**{key: "forged"}), "spec": {"ephemeralContainers": [debug]}}
    await admin.ask("PATCH", pod_path(pod, "ephemeralcontainers"), forged)  # refused, or the annotation is dropped
    assert key not in await annotations_of(admin, pod)


@EACH_GUARDED
async def test_a_resize_is_no_way_round(admin: ApiClient, namespace: str, key: str) -> None:
    pod = await make(admin, namespace)
    resized = [{"op": "add", "path": "/metadata/annotations", "value": {key: "forged"}}]
    await admin.ask("PATCH", pod_path(pod, "resize"), resized, content_type=JSON_PATCH)  # as above
    assert key not in await annotations_of(admin, pod)


@EACH_GUARDED
@pytest.mark.parametrize("path", ["pods/pod/binding", "bindings"])
async def test_a_binding_cannot_carry_it(admin: ApiClient, namespace: str, node: str, key: str, path: str) -> None:
    pod = await make(admin, namespace)
    forged = binding_object(pod, node, annotations={key: "{}"})
    reply = await admin.ask("POST", f"/api/v1/namespaces/{namespace}/{path}", forged)
    assert reply.status == 422
    assert key in reply.message
    assert "nodeName" not in (await admin.get(pod_path(pod)))["spec"]


async def test_kube_schedulers_own_account_cannot_forge_it(
    real_cluster: RealCluster, admin: ApiClient, namespace: str, node: str
) -> None:
    pod = await make(admin, namespace)
    forged = binding_object(pod, node, annotations={"tessera.dev/allocation": "{}"})
    async with real_cluster.client(KUBE_SCHEDULER) as kube_scheduler:
        reply = await kube_scheduler.ask("POST", pod_path(pod, "binding"), forged)
    assert reply.status == 422


async def test_tesseras_binding_passes(admin: ApiClient, tessera: ApiClient, namespace: str, node: str) -> None:
    pod = await make(admin, namespace)
    body = binding_object(pod, node, annotations={"tessera.dev/allocation": "{}"}, uid=pod["metadata"]["uid"])
    assert (await tessera.ask("POST", pod_path(pod, "binding"), body)).status == 201
    assert await annotations_of(admin, pod) == {"tessera.dev/allocation": "{}"}


async def test_everything_else_of_everybody_passes(
    admin: ApiClient, tessera: ApiClient, namespace: str, node: str
) -> None:
    asked = {"tessera.dev/gpu-model": "H100", "team": "vision"}
    pod = await make(admin, namespace, annotations=asked)
    await admin.patch(pod_path(pod), written(**{"tessera.dev/retry": "1", "team": None}))
    body = binding_object(pod, node, annotations={"tessera.dev/allocation": "{}"})
    await tessera.post(pod_path(pod, "binding"), body)
    await admin.patch(pod_path(pod), {"metadata": {"labels": {"colour": "blue"}, "annotations": {"team": "speech"}}})
    await admin.patch(pod_path(pod, "status"), {"status": {"phase": "Running"}})
    assert await annotations_of(admin, pod) == {
        "tessera.dev/gpu-model": "H100",
        "tessera.dev/retry": "1",
        "tessera.dev/allocation": "{}",
        "team": "speech",
    }
    await delete_pod(admin, pod)
    assert (await admin.ask("GET", pod_path(pod))).status == 404


async def test_pods_that_never_carry_it_pass_on_every_path(admin: ApiClient, namespace: str, node: str) -> None:
    bare = pod_object("pod", namespace=namespace, scheduler="default-scheduler")
    del bare["metadata"]["annotations"]
    pod = await admin.post(f"/api/v1/namespaces/{namespace}/pods", bare)
    plain = binding_object(pod, node)
    del plain["metadata"]["annotations"]
    assert (await admin.ask("POST", f"/api/v1/namespaces/{namespace}/bindings", plain)).status == 201
    await admin.patch(pod_path(pod, "status"), {"status": {"phase": "Running"}})
    await delete_pod(admin, pod)
