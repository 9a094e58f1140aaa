"""`tessera nodes` and `tessera gpus`: what Tessera knows of the cluster, as tables or as JSON."""

from __future__ import annotations

from typing import Any

from .api import Api
from .output import console, gib, reporting, say_json, table

Item = dict[str, Any]


def nodes(url: str, *, as_json: bool) -> None:
    """Print every node with its free and total amounts."""
    with reporting(as_json=as_json):
        found = Api(url).items("/nodes")
        if as_json:
            say_json({"nodes": found}, ok=True)
            return
        columns = (
            "NODE",
            "MODE",
            "PRODUCT",
            "GPUS FREE>",
            "SLICES FREE",
            "CPU FREE>",
            "MEMORY FREE>",
            "PODS>",
            "STATE",
        )
        console().print(table(columns, (_node(node) for node in found)))


def gpus(url: str, *, as_json: bool) -> None:
    """Print every device."""
    with reporting(as_json=as_json):
        found = Api(url).items("/gpus")
        if as_json:
            say_json({"gpus": found}, ok=True)
            return
        columns = ("NODE", "DEV>", "MODEL", "MEMORY>", "MIG", "USE", "HEALTH", "REQUESTS")
        console().print(table(columns, (_gpu(gpu) for gpu in found)))


def state(node: Item) -> str:
    """Return a node's state in a word or two: `ok`, else what is odd about it."""
    odd = [
        *(["not ready"] if not node["ready"] else []),
        *(["cordoned"] if not node["schedulable"] else []),
        *(["unnamed holder"] if node["unnamedHolder"] else []),
        *(["odd labels"] if node["warnings"] else []),
    ]
    return ", ".join(odd) or "ok"


def _node(node: Item) -> tuple[str, ...]:
    cpu, memory, gpu = node["cpuMilli"], node["memoryBytes"], node["gpus"]
    return (
        node["name"],
        node["mode"],
        node["product"] or "-",
        f"{gpu['free']}/{gpu['total']}",
        " ".join(f"{profile} {one['free']}/{one['total']}" for profile, one in node["slices"].items()) or "-",
        f"{cpu['free'] / 1000:g}/{cpu['total'] / 1000:g}",
        f"{gib(memory['free'])}/{gib(memory['total'])}",
        str(node["pods"]),
        state(node),
    )


def _gpu(gpu: Item) -> tuple[str, ...]:
    return (
        gpu["node"],
        str(gpu["dev"]),
        gpu["model"] or "-",
        f"{gpu['memoryMiB']}Mi" if gpu["memoryMiB"] else "-",
        "on" if gpu["migMode"] else "off",
        _use(gpu),
        gpu["health"],
        ",".join(gpu["requests"]) or "-",
    )


def _use(gpu: Item) -> str:
    """Return what a GPU is used for; of a divided one also by what, and what is left."""
    if gpu["use"] == "mig":
        return "mig " + ",".join(f"{part['profile']}@{part['start']}" for part in gpu["parts"])
    if gpu["use"] == "shared":
        return f"shared, {gpu['milliFree']}m {gpu['memoryMiBFree']}Mi free"
    return str(gpu["use"])
