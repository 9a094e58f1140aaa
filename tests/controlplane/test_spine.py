"""The whole path on a real control plane: pods, kube-scheduler, the product as a process, its ledger."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.apiclient import ApiClient
from bench.kube_objects import (
    binding_object,
    create_nodes,
    create_pods,
    delete_pod,
    node_object,
    pod_object,
    pod_path,
    set_phase,
)
from bench.product import Product
from bench.realcluster import TESSERA, RealCluster

Json = dict[str, Any]
ROUND = itertools.count(1)
NEVER = threading.Event()  # the processes outside have no fake clock
ALLOCATION = "tessera.dev/allocation"


async def until(done: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Wait for a real process; the API server is asked again after each of its answers."""
    try:
        async with asyncio.timeout(seconds):
            while not await done():
                await asyncio.to_thread(NEVER.wait, 0.05)
    except TimeoutError:
        pytest.fail(f"not within {seconds} s: {what}")


@pytest.fixture
async def nodes(admin: ApiClient) -> AsyncIterator[list[str]]:
    """Four exact and two observed 8-GPU nodes and one without GPUs, of this test alone."""
    number = next(ROUND)
    gpu = {"nvidia.com/gpu": "8"}
    marks = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.count": "8", "pool": f"p{number}"}
    made = [
        node_object(f"s{number}-exact-{i}", extended=gpu, labels={**marks, "tessera.dev/mode": "exact"})
        for i in range(4)
    ]
    made += [node_object(f"s{number}-seen-{i}", extended=gpu, labels=marks) for i in range(2)]
    made += [node_object(f"s{number}-cpu", labels={"pool": f"p{number}"})]
    await create_nodes(admin, made)
    names = [node["metadata"]["name"] for node in made]
    yield names
    for name in names:
        await admin.delete(f"/api/v1/nodes/{name}")


@pytest.fixture
async def product(real_cluster: RealCluster, nodes: list[str], tmp_path: Path) -> AsyncIterator[Product]:
    made = Product(tmp_path, real_cluster.kubeconfig(TESSERA))
    await made.start()
    await real_cluster.start_kube_scheduler(made.extender)
    yield made
    await real_cluster.stop_kube_scheduler(kill=True)
    await made.stop()


def gpu_pod(name: str, namespace: str, gpus: int, **how: Any) -> Json:
    amounts = {"cpu": "2", "memory": "4Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return pod_object(name, namespace=namespace, requests=amounts, **how)


async def pods_in(api: ApiClient, namespace: str) -> list[Json]:
    return (await api.get(f"/api/v1/namespaces/{namespace}/pods"))["items"]  # type: ignore[no-any-return]


def bound(pods: list[Json]) -> list[Json]:
    return [pod for pod in pods if pod["spec"].get("nodeName")]


def allocation(pod: Json) -> Json:
    return json.loads(pod["metadata"]["annotations"][ALLOCATION])  # type: ignore[no-any-return]


def nobody_shares_a_device(pods: list[Json]) -> bool:
    held: set[tuple[str, int]] = set()
    for pod in bound(pods):
        grants = [grant for part in allocation(pod)["containers"].values() for grant in part]
        devices = {(pod["spec"]["nodeName"], grant["dev"]) for grant in grants if "dev" in grant}
        if held & devices:
            return False
        held |= devices
    return True


async def verified(product: Product) -> Json:
    command = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scheduler",
        "ledger",
        "verify",
        "--db",
        product.db,
        "--json",
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await command.communicate()
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


async def test_whole_gpu_and_cpu_only_pods_are_bound_with_their_allocation(
    admin: ApiClient, namespace: str, product: Product
) -> None:
    asked = {f"p{number}": number % 5 for number in range(15)}
    await create_pods(admin, [gpu_pod(name, namespace, gpus) for name, gpus in asked.items()])

    async def all_bound() -> bool:
        return len(bound(await pods_in(admin, namespace))) == len(asked)

    await until(all_bound, 20, "15 pods bound")
    pods = await pods_in(admin, namespace)
    for pod in pods:
        written = allocation(pod)
        assert written["id"] == pod["metadata"]["uid"]
        assert written["node"] == pod["spec"]["nodeName"]
        grants = [grant for part in written["containers"].values() for grant in part]
        assert sum(grant.get("count", 1) for grant in grants) == asked[pod["metadata"]["name"]]
    assert nobody_shares_a_device(pods)
    assert (await verified(product))["ok"]


async def test_a_refused_pod_is_woken_when_room_comes_back(admin: ApiClient, namespace: str, product: Product) -> None:
    await create_pods(admin, [gpu_pod(f"full{number}", namespace, 8) for number in range(6)])

    async def full() -> bool:
        return len(bound(await pods_in(admin, namespace))) == 6

    await until(full, 20, "six pods fill six nodes")
    await create_pods(admin, [gpu_pod("late", namespace, 8)])

    async def parked() -> bool:
        late = await admin.get(f"/api/v1/namespaces/{namespace}/pods/late")
        return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in late["status"].get("conditions", []))

    await until(parked, 10, "the seventh is refused")
    first = next(pod for pod in await pods_in(admin, namespace) if pod["metadata"]["name"] == "full0")
    await set_phase(admin, first, "Succeeded")

    async def in_place() -> bool:
        return bool((await admin.get(f"/api/v1/namespaces/{namespace}/pods/late"))["spec"].get("nodeName"))

    await until(in_place, 10, "the refused pod is bound after room came back")


async def test_kill_9_at_any_moment_loses_and_doubles_nothing(
    admin: ApiClient, namespace: str, product: Product, real_cluster: RealCluster
) -> None:
    for wave in range(3):
        await create_pods(admin, [gpu_pod(f"w{wave}-{number}", namespace, 1) for number in range(12)])

        async def some_bound(least: int = wave * 12 + 3) -> bool:
            return len(bound(await pods_in(admin, namespace))) >= least

        await until(some_bound, 20, "some of the wave bound")
        await product.kill()
        await real_cluster.stop_kube_scheduler(kill=True)
        await product.start()
        await real_cluster.start_kube_scheduler(product.extender)

    async def all_bound() -> bool:
        return len(bound(await pods_in(admin, namespace))) == 36

    await until(all_bound, 40, "36 pods bound after three kills")
    assert nobody_shares_a_device(await pods_in(admin, namespace))
    result = await verified(product)
    assert result["ok"]


async def test_down_for_a_minute_others_are_not_touched_and_ours_follow(
    admin: ApiClient, namespace: str, product: Product, real_cluster: RealCluster, nodes: list[str]
) -> None:
    await product.kill()
    foreign = gpu_pod("foreign", namespace, 1, scheduler="somebody-else")
    await create_pods(admin, [foreign, *(gpu_pod(f"ours{number}", namespace, 1) for number in range(5))])
    created = await admin.get(pod_path(foreign))
    await admin.post(pod_path(foreign, "binding"), binding_object(created, nodes[4]))
    await asyncio.to_thread(NEVER.wait, 60)
    pods = {pod["metadata"]["name"]: pod for pod in await pods_in(admin, namespace)}
    assert [name for name, pod in pods.items() if pod["spec"].get("nodeName")] == ["foreign"]
    extender = product.extender
    await product.start()
    assert product.extender != extender or real_cluster.kube_scheduler
    await real_cluster.stop_kube_scheduler(kill=True)
    await real_cluster.start_kube_scheduler(product.extender)

    async def ours_bound() -> bool:
        return len(bound(await pods_in(admin, namespace))) == 6

    await until(ours_bound, 15, "ours are bound after Tessera's return")
    after = await admin.get(pod_path(foreign))
    assert after["metadata"]["resourceVersion"] == pods["foreign"]["metadata"]["resourceVersion"]


async def test_a_pod_made_anew_under_the_same_name_is_another_pod(
    admin: ApiClient, namespace: str, product: Product
) -> None:
    async def in_place() -> bool:
        return bool((await admin.get(f"/api/v1/namespaces/{namespace}/pods/again"))["spec"].get("nodeName"))

    seen = set()
    for _ in range(3):
        await create_pods(admin, [gpu_pod("again", namespace, 2)])
        await until(in_place, 10, "the pod is bound")
        pod = await admin.get(f"/api/v1/namespaces/{namespace}/pods/again")
        assert allocation(pod)["id"] == pod["metadata"]["uid"]
        seen.add(pod["metadata"]["uid"])
        await delete_pod(admin, pod)
    assert len(seen) == 3


async def test_a_second_tessera_on_the_same_cluster_or_database_refuses_to_start(
    product: Product, real_cluster: RealCluster, tmp_path: Path
) -> None:
    for db in (product.db, f"sqlite:///{tmp_path / 'other.db'}"):
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scheduler", "serve", "--kubeconfig", str(real_cluster.kubeconfig(TESSERA))),
            *("--db", db, "--extender", "127.0.0.1:0", "--api", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            _, said = await command.communicate()
        assert command.returncode == 1
        assert b"[start.occupied]" in said


async def test_an_empty_database_on_a_living_cluster_adopts_what_is_bound(
    admin: ApiClient, namespace: str, product: Product, real_cluster: RealCluster, tmp_path: Path
) -> None:
    await create_pods(admin, [gpu_pod(f"old{number}", namespace, 4) for number in range(4)])

    async def all_bound(count: int = 4) -> bool:
        return len(bound(await pods_in(admin, namespace))) == count

    await until(all_bound, 20, "four pods bound")
    assert await product.stop() == 0
    product.db = f"sqlite:///{tmp_path / 'fresh.db'}"
    await product.start()
    await real_cluster.stop_kube_scheduler(kill=True)
    await real_cluster.start_kube_scheduler(product.extender)
    await create_pods(admin, [gpu_pod(f"new{number}", namespace, 8) for number in range(4)])
    await until(lambda: all_bound(8), 20, "four more bound around the adopted ones")
    assert nobody_shares_a_device(await pods_in(admin, namespace))
    assert (await verified(product))["ok"]
