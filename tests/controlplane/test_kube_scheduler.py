"""The real kube-scheduler under the shipped configuration and rights, against an extender of a few lines."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.apiclient import STRATEGIC, ApiClient, Json
from bench.kube_objects import binding_object, create_nodes, create_pods, node_object, pod_object, pod_path
from bench.realcluster import RealCluster

GPU_POD = {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "2"}
SECRET = "/api/v1/namespaces/tessera-system/secrets/kube-scheduler-token"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/tessera-system/leases/tessera-kube-scheduler"
NODES = ["gpu-a", "gpu-b", "gpu-c"]


@dataclass
class Extender:
    """Answers filter with the first name and binds with Tessera's token; keeps every body."""

    api: ApiClient
    refuse: bool = False
    filters: list[Json] = field(default_factory=list)
    prioritizes: list[Json] = field(default_factory=list)
    binds: list[Json] = field(default_factory=list)
    url: str = ""

    async def filter(self, http: web.Request) -> web.Response:
        self.filters.append(body := await http.json())
        if self.refuse:
            refused = dict.fromkeys(body["NodeNames"], "no free GPU")
            return web.json_response({"NodeNames": [], "FailedAndUnresolvableNodes": refused})
        return web.json_response({"NodeNames": body["NodeNames"][:1]})

    async def prioritize(self, http: web.Request) -> web.Response:
        self.prioritizes.append(await http.json())
        return web.json_response([])

    async def bind(self, http: web.Request) -> web.Response:
        self.binds.append(body := await http.json())
        pod = {"metadata": {"name": body["PodName"], "namespace": body["PodNamespace"]}}
        allocation = {"tessera.dev/allocation": "{}"}
        binding = binding_object(pod, body["Node"], annotations=allocation, uid=body["PodUID"])
        reply = await self.api.ask("POST", pod_path(pod, "binding"), binding)
        return web.json_response({"Error": "" if reply.status == 201 else reply.message})


@pytest.fixture
async def extender(tessera: ApiClient) -> AsyncIterator[Extender]:
    stub = Extender(tessera)
    app = web.Application()
    app.router.add_post("/scheduler/filter", stub.filter)
    app.router.add_post("/scheduler/prioritize", stub.prioritize)
    app.router.add_post("/scheduler/bind", stub.bind)
    async with TestServer(app) as server:
        stub.url = str(server.make_url("/scheduler"))
        yield stub


@pytest.fixture
async def nodes(admin: ApiClient) -> AsyncIterator[None]:
    await create_nodes(admin, [node_object(name, extended={"nvidia.com/gpu": "8"}) for name in NODES])
    yield
    for name in NODES:
        await admin.delete(f"/api/v1/nodes/{name}")


async def until_pod(admin: ApiClient, pod: Json, path: str) -> Json:
    """Watch a pod until it has `spec.nodeName` or the status condition PodScheduled, as `path` says; return it."""
    async with asyncio.timeout(30):
        query = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods"
        events = admin.watch(query, pod["metadata"]["resourceVersion"])
        async for event in events:
            seen = event["object"]
            if seen["metadata"]["uid"] != pod["metadata"]["uid"]:
                continue
            if path == "nodeName" and seen["spec"].get("nodeName"):
                break
            if path == "refused" and seen["status"].get("conditions"):
                break
        await events.aclose()
    return seen


async def account_token(admin: ApiClient) -> str:
    """The token that kube-controller-manager wrote into the shipped Secret."""
    secrets, _, name = SECRET.rpartition("/")
    listed = await admin.get(secrets)  # a list's version can be watched from, an object's may be compacted away
    first = next(secret for secret in listed["items"] if secret["metadata"]["name"] == name)
    if "token" not in first.get("data", {}):
        async with asyncio.timeout(30):
            events = admin.watch(secrets, listed["metadata"]["resourceVersion"])
            async for event in events:
                first = event["object"]
                if first["metadata"]["name"] == name and "token" in first.get("data", {}):
                    break
            await events.aclose()
    return base64.b64decode(first["data"]["token"]).decode()


@pytest.fixture
async def shipped_token(real_cluster: RealCluster, admin: ApiClient) -> AsyncIterator[str]:
    await real_cluster.start_controller_manager()
    yield await account_token(admin)
    await real_cluster.stop_controller_manager()


@pytest.mark.usefixtures("nodes")
async def test_the_shipped_account_and_configuration_bind_a_pod_through_the_extender(
    real_cluster: RealCluster, admin: ApiClient, extender: Extender, namespace: str, shipped_token: str
) -> None:
    mine = real_cluster.write_kubeconfig("shipped", shipped_token)
    await real_cluster.start_kube_scheduler(extender.url, leader_election=True, kubeconfig=mine)
    try:
        labels, notes = {"tessera.dev/queue": "research"}, {"tessera.dev/gpu-model": "H100"}
        body = pod_object("train", namespace=namespace, requests=GPU_POD, labels=labels, annotations=notes)
        (pod,) = await create_pods(admin, [body])
        bound = await until_pod(admin, pod, "nodeName")
        lease = await admin.get(LEASE)
        log = real_cluster.kube_scheduler.log.read_text() if real_cluster.kube_scheduler else ""
    finally:
        await real_cluster.stop_kube_scheduler()
    assert bound["spec"]["nodeName"] in NODES
    assert bound["metadata"]["annotations"] == {**notes, "tessera.dev/allocation": "{}"}
    assert lease["spec"]["holderIdentity"]
    assert "forbidden" not in log

    (asked,) = extender.filters
    assert set(asked) == {"Pod", "Nodes", "NodeNames"}
    assert asked["Nodes"] is None
    assert sorted(asked["NodeNames"]) == NODES
    sent = asked["Pod"]
    assert set(sent) == {"metadata", "spec", "status"}
    assert set(sent["metadata"]) == {
        *("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "labels", "annotations"),
    }
    assert sent["metadata"]["uid"] == pod["metadata"]["uid"]
    assert sent["metadata"]["resourceVersion"] == pod["metadata"]["resourceVersion"]
    assert sent["spec"]["containers"][0]["resources"] == {"limits": GPU_POD, "requests": GPU_POD}
    assert sent["status"] == {"phase": "Pending", "qosClass": "Guaranteed"}
    # One node left: no scoring, so /prioritize is not asked.
    assert extender.prioritizes == []
    assert extender.binds == [
        {
            "PodName": "train",
            "PodNamespace": namespace,
            "PodUID": pod["metadata"]["uid"],
            "Node": bound["spec"]["nodeName"],
        }
    ]


@pytest.mark.usefixtures("nodes")
async def test_a_nominated_pod_is_asked_for_with_its_node_alone(
    real_cluster: RealCluster, admin: ApiClient, tessera: ApiClient, extender: Extender, namespace: str
) -> None:
    held = pod_object("held", namespace=namespace, requests=GPU_POD, gates=["tessera.dev/hold"])
    (pod,) = await create_pods(admin, [held])
    await real_cluster.start_kube_scheduler(extender.url)
    try:
        await tessera.patch(pod_path(pod, "status"), {"status": {"nominatedNodeName": NODES[1]}})
        ungate = {"spec": {"schedulingGates": [{"$patch": "delete", "name": "tessera.dev/hold"}]}}
        await tessera.patch(pod_path(pod), ungate, content_type=STRATEGIC)
        bound = await until_pod(admin, pod, "nodeName")
    finally:
        await real_cluster.stop_kube_scheduler()
    assert bound["spec"]["nodeName"] == NODES[1]
    assert [asked["NodeNames"] for asked in extender.filters] == [[NODES[1]]]


@pytest.mark.usefixtures("nodes")
async def test_a_refused_pod_waits_and_a_new_kube_scheduler_binds_it(
    real_cluster: RealCluster, admin: ApiClient, extender: Extender, namespace: str
) -> None:
    extender.refuse = True
    await real_cluster.start_kube_scheduler(extender.url)
    try:
        (pod,) = await create_pods(admin, [pod_object("train", namespace=namespace, requests=GPU_POD)])
        refused = await until_pod(admin, pod, "refused")
        await real_cluster.stop_kube_scheduler(kill=True)
        extender.refuse = False
        await real_cluster.start_kube_scheduler(extender.url)
        bound = await until_pod(admin, pod, "nodeName")
    finally:
        await real_cluster.stop_kube_scheduler()
    (condition,) = refused["status"]["conditions"]
    assert (condition["reason"], condition["status"]) == ("Unschedulable", "False")
    assert "3 no free GPU" in condition["message"]
    assert bound["spec"]["nodeName"] in NODES


@pytest.mark.usefixtures("nodes")
async def test_a_plain_kube_scheduler_binds_without_an_extender(
    real_cluster: RealCluster, admin: ApiClient, namespace: str
) -> None:
    await real_cluster.start_kube_scheduler(None, None)
    try:
        (pod,) = await create_pods(admin, [pod_object("plain", namespace=namespace, requests=GPU_POD)])
        bound = await until_pod(admin, pod, "nodeName")
    finally:
        await real_cluster.stop_kube_scheduler()
    assert bound["spec"]["nodeName"] in NODES
