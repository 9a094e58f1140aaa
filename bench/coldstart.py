"""`bench coldstart`: how long Tessera is away when it is killed and started again on a cluster that is in use.

A real API server holds the nodes and the bound pods, the ledger a row for each pod. Tessera is killed with SIGKILL and
started; the clock runs from the start of the process to its ready line, imports included. Invariant: the start counts
only when, afterwards, every node is as free as the pods on it leave it, by the bench's own count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.apiclient import ApiClient, ApiError
from bench.errors import BenchError
from bench.kube_objects import (
    binding_object,
    create_nodes,
    create_pods,
    gather_bounded,
    node_object,
    pod_object,
    pod_path,
)
from bench.product import Product, ProductError
from bench.realcluster import TESSERA, RealCluster
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]

GPU = "nvidia.com/gpu"
GPUS = 8
PAGE = 500
ADOPT_S = 300.0
CLOCK = RealClock()


class ColdstartError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """The cluster: nodes, pods, and the node of each pod by place in the list."""

    nodes: list[Json]
    pods: list[Json]
    places: list[int]

    def free(self) -> dict[str, int]:
        """Return the free GPUs of each node, by node name."""
        free = {node["metadata"]["name"]: GPUS for node in self.nodes}
        for pod, place in zip(self.pods, self.places, strict=True):
            free[self.nodes[place]["metadata"]["name"]] -= gpus_of(pod)
        return free


def load(nodes: int, pods: int) -> Load:
    """Draw nothing: pods go round the nodes, GPU pods as long as a node has one left, every second node exact.

    Args:
        nodes: how many, with 8 GPUs each.
        pods: how many; beyond six a node they ask for no GPU, so two GPUs stay free everywhere.
    """
    made = []
    for number in range(nodes):
        labels = {f"{GPU}.product": "NVIDIA-H100-80GB-HBM3", f"{GPU}.count": str(GPUS), f"{GPU}.memory": "81559"}
        labels |= {"tessera.dev/mode": "exact"} if number % 2 else {}
        made.append(node_object(f"node-{number:05}", cpu="192", memory="2Ti", extended={GPU: str(GPUS)}, labels=labels))
    asks = []
    for number in range(pods):
        amounts = {"cpu": "1", "memory": "1Gi"} | ({GPU: "1"} if number // nodes < GPUS - 2 else {})
        asks.append(pod_object(f"pod-{number:06}", requests=amounts))
    return Load(made, asks, [number % nodes for number in range(pods)])


def gpus_of(pod: Json) -> int:
    """Return how many GPUs a pod of this load asks."""
    return int(pod["spec"]["containers"][0]["resources"]["requests"].get(GPU, 0))


def allocation(pod: Json, node: Json, device: int) -> Json:
    """Return what a Binding says about a pod of this load: its device on an exact node, a count on others."""
    exact = node["metadata"]["labels"].get("tessera.dev/mode") == "exact"
    grant = {"dev": device, "kind": "whole"} if exact else {"kind": "whole", "count": 1}
    return {
        "v": 1,
        "id": pod["metadata"]["uid"],
        "epoch": 1,
        "fence": 1,
        "node": node["metadata"]["name"],
        "mode": "exact" if exact else "observed",
        "containers": {"main": [grant]} if gpus_of(pod) else {},
    }


async def run_coldstart(nodes: int, pods: int, say: Say) -> Json:
    """Fill a cluster, let Tessera adopt it, kill it, start it again and return the report.

    Raises:
        ColdstartError: the run could not be finished.
        UnavailableError: there is no real control plane on this machine.
    """
    wanted = load(nodes, pods)
    async with RealCluster() as cluster, cluster.client() as admin, cluster.client(TESSERA) as tessera:
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA))
        try:
            await _fill(admin, tessera, wanted, say)
            await product.start()
            say(f"an empty ledger was ready after {product.ready_s[0]:.1f} s; it adopts {pods} pods")
            await _adopted(product, pods)
            await product.kill()
            await product.start()
            phases = started(product.log.read_text(errors="replace"))
            wrong = await _wrong(product, wanted)
        except (ProductError, ApiError, aiohttp.ClientError) as error:
            raise ColdstartError(str(error)) from error
        finally:
            await product.kill()
    for sentence in wrong[:5]:
        say(f"wrong: {sentence}")
    return {
        "ready_s": round(product.ready_s[1], 2),
        **phases,
        "first_ready_s": round(product.ready_s[0], 2),
        "nodes": nodes,
        "pods": pods,
        "checked": nodes,
        "wrong": len(wrong),
        "seed": None,
        "ok": not wrong,
    }


def started(log: str) -> Json:
    """Return the phases of a start as Tessera logged them: list_s, rebuild_s, verify_s.

    Raises:
        ColdstartError: the log says nothing of them.
    """
    for line in log.splitlines():
        if '"recovered"' in line:
            said = json.loads(line)
            return {key: said[key] for key in ("list_s", "rebuild_s", "verify_s")}
    raise ColdstartError("Tessera's log does not say how long its start took")


async def _fill(admin: ApiClient, tessera: ApiClient, wanted: Load, say: Say) -> None:
    """Make nodes and pods, and bind each pod as Tessera would: one Binding with its annotation."""
    begun = time.monotonic()
    await create_nodes(admin, wanted.nodes)
    made = {pod["metadata"]["name"]: pod for pod in await create_pods(admin, wanted.pods)}
    calls = []
    for number, place in enumerate(wanted.places):
        pod, node = made[wanted.pods[number]["metadata"]["name"]], wanted.nodes[place]
        text = json.dumps(allocation(pod, node, number // len(wanted.nodes)), separators=(",", ":"))
        binding = binding_object(pod, node["metadata"]["name"], annotations={"tessera.dev/allocation": text})
        calls.append(tessera.post(pod_path(pod, "binding"), binding))
    await gather_bounded(calls)
    say(f"{len(wanted.nodes)} nodes and {len(wanted.pods)} bound pods made in {time.monotonic() - begun:.0f} s")


async def _adopted(product: Product, pods: int) -> None:
    """Wait until the ledger has a row for every pod."""
    deadline = time.monotonic() + ADOPT_S
    while (rows := len(await _pages(f"{product.api}/api/v1/requests", "state=BOUND,RUNNING"))) < pods:
        product.check()
        if time.monotonic() > deadline:
            raise ColdstartError(f"only {rows} of {pods} pods were adopted in {ADOPT_S:.0f} s")
        await CLOCK.sleep(1.0)


async def _wrong(product: Product, wanted: Load) -> list[str]:
    """Return what Tessera says of the nodes and the pods do not."""
    shown = {node["name"]: node["gpus"]["free"] for node in await _pages(f"{product.api}/api/v1/nodes")}
    truth = wanted.free()
    names = sorted(shown.keys() | truth.keys())
    return [
        f"{name}: {shown.get(name)} GPUs free, {truth.get(name)} expected"
        for name in names
        if shown.get(name) != truth.get(name)
    ]


async def _pages(url: str, query: str = "") -> list[Json]:
    """Return all items of a list."""
    items: list[Json] = []
    cursor = ""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}?limit={PAGE}&cursor={cursor}&{query}") as http:
                page = await http.json()
            items += page["items"]
            if not page["next"]:
                return items
            cursor = page["next"]
