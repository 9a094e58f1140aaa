"""Where a pod may run: Tessera's answer for every pair of random pods and nodes equals the real kube-scheduler's.

kube-scheduler sends its extender exactly the nodes that passed its own plugins, and nothing when none did.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.apiclient import ApiClient, Json
from bench.kube_objects import create_nodes, create_pods, node_object, pod_object
from bench.realcluster import RealCluster
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.selection import admits

NODES = 30
PODS = 60
CORDON = "node.kubernetes.io/unschedulable"
KEYS = ["disk", "example.com/rank", "team"]
VALUES = ["", "1", "2", "10", "ssd"]
EFFECTS = ["NoSchedule", "NoExecute", "PreferNoSchedule"]


@dataclass
class Witness:
    """Refuses every node and remembers which ones it was asked about, by pod UID."""

    seen: dict[str, list[frozenset[str]]] = field(default_factory=dict)
    url: str = ""

    async def filter(self, http: web.Request) -> web.Response:
        body = await http.json()
        self.seen.setdefault(body["Pod"]["metadata"]["uid"], []).append(frozenset(body["NodeNames"]))
        refused = dict.fromkeys(body["NodeNames"], "only looking")
        return web.json_response({"NodeNames": [], "FailedAndUnresolvableNodes": refused})


@pytest.fixture
async def witness() -> AsyncIterator[Witness]:
    stub = Witness()
    app = web.Application()
    app.router.add_post("/scheduler/filter", stub.filter)
    async with TestServer(app) as server:
        stub.url = str(server.make_url("/scheduler"))
        yield stub


def drawn_node(rng: random.Random, name: str) -> Json:
    labels = {key: rng.choice(VALUES) for key in KEYS if rng.random() < 0.6}
    taints = {(rng.choice(KEYS), rng.choice(EFFECTS)): rng.choice(VALUES) for _ in range(rng.choice([0, 0, 0, 1, 2]))}
    listed = [{"key": key, "effect": effect, "value": value} for (key, effect), value in taints.items()]
    node = node_object(name, labels=labels, taints=listed)
    node["spec"]["unschedulable"] = rng.random() < 0.15
    return node


def drawn_expression(rng: random.Random) -> Json:
    key, operator = rng.choice(KEYS), rng.choice(["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"])
    values = {"In": rng.sample(VALUES, 3), "NotIn": rng.sample(VALUES, 2), "Gt": ["1"], "Lt": ["10"]}.get(operator, [])
    return {"key": key, "operator": operator, "values": values}


def drawn_term(rng: random.Random, names: list[str]) -> Json:
    term: Json = {}
    if rng.random() < 0.85:
        term["matchExpressions"] = [drawn_expression(rng) for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < 0.2:
        values = [rng.choice(names)]
        term["matchFields"] = [{"key": "metadata.name", "operator": rng.choice(["In", "NotIn"]), "values": values}]
    return term


def drawn_toleration(rng: random.Random) -> Json:
    key = rng.choice([*KEYS, *KEYS, "", CORDON])
    toleration: Json = {"key": key, "operator": "Exists"} if key else {"operator": "Exists"}
    if key and rng.random() < 0.4:
        toleration = {"key": key, "operator": rng.choice(["Equal", ""]), "value": rng.choice(["", "1", "ssd"])}
    if rng.random() < 0.5:
        toleration["effect"] = rng.choice(EFFECTS)
    return toleration


def drawn_pod(rng: random.Random, name: str, namespace: str, names: list[str]) -> Json:
    pod = pod_object(name, namespace=namespace, requests={"cpu": "1m"})
    spec = pod["spec"]
    if rng.random() < 0.2:
        spec["nodeSelector"] = {rng.choice(KEYS): rng.choice(["1", "ssd"])}
    if rng.random() < 0.6:
        terms = [drawn_term(rng, names) for _ in range(rng.choice([1, 1, 2, 3]))]
        spec["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        }
    spec["tolerations"] = [drawn_toleration(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    return pod


async def until_judged(admin: ApiClient, pods: list[Json], version: str) -> None:
    """Watch until kube-scheduler has written PodScheduled=False on every pod."""
    waiting = {pod["metadata"]["uid"] for pod in pods}
    path = f"/api/v1/namespaces/{pods[0]['metadata']['namespace']}/pods"
    async with asyncio.timeout(60):
        events = admin.watch(path, version)
        async for event in events:
            if event["object"].get("status", {}).get("conditions"):
                waiting.discard(event["object"]["metadata"]["uid"])
            if not waiting:
                break
        await events.aclose()


@pytest.fixture
async def nodes(admin: ApiClient) -> AsyncIterator[list[Json]]:
    rng = random.Random(11)
    made = await create_nodes(admin, [drawn_node(rng, f"pair-{number:02}") for number in range(NODES)])
    yield made
    for node in made:
        await admin.delete(f"/api/v1/nodes/{node['metadata']['name']}")


async def test_every_pair_is_judged_as_the_real_one_does(
    real_cluster: RealCluster, admin: ApiClient, witness: Witness, nodes: list[Json], namespace: str
) -> None:
    rng = random.Random(7)
    names = [node["metadata"]["name"] for node in nodes]
    await real_cluster.start_kube_scheduler(witness.url, percentage=100)
    try:
        bodies = [drawn_pod(rng, f"pair-{number:02}", namespace, names) for number in range(PODS)]
        version = (await admin.get(f"/api/v1/namespaces/{namespace}/pods"))["metadata"]["resourceVersion"]
        pods = await create_pods(admin, bodies)
        await until_judged(admin, pods, version)
    finally:
        await real_cluster.stop_kube_scheduler()

    model = {name: read_node(node, {}) for name, node in zip(names, nodes, strict=True)}
    yes = 0
    for pod in pods:
        calls = witness.seen.get(pod["metadata"]["uid"], [frozenset()])
        theirs = calls[0] & set(names)
        assert set(calls) == {calls[0]}, "kube-scheduler changed its mind about a pod"
        request = read_pod(pod).request
        assert request.refusal is None
        ours = {name for name, node in model.items() if node is not None and admits(request.selection, node)}
        assert ours == theirs, pod["spec"]
        yes += len(theirs)
    pairs = len(pods) * len(nodes)
    assert pairs >= 500
    assert 0.1 < yes / pairs < 0.9  # both answers are well represented
