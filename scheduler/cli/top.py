"""`tessera top`: the cluster on one screen, GPUs as a grid; live on a terminal, once for pipes and scripts."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scheduler.clock import RealClock

from .api import Api
from .nodes import state
from .output import console, gib, reporting, table

EVERY_S = 2.0
WAITING_SHOWN = 10
MARKS = {"free": ".", "whole": "#", "shared": "s", "mig": "m"}
CLOSED = "/"
LEGEND = f"# whole  m MIG  s shared  . free  x unhealthy  {CLOSED} closed: not to be had whole"
UNUSED = (("free", MARKS["free"]), ("unhealthy", "x"), ("closed", CLOSED))
Item = dict[str, Any]


def top(url: str, *, once: bool) -> None:
    """Print the picture once, or keep it up to date until Ctrl-C."""
    api = Api(url)
    with reporting(as_json=False):
        if once or not sys.stdout.isatty():
            console().print(picture(api))
            return
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_watch(api))


async def _watch(api: Api) -> None:
    clock = RealClock()
    with Live(picture(api), console=console(), screen=True, auto_refresh=False) as live:
        while True:
            await clock.sleep(EVERY_S)
            live.update(picture(api), refresh=True)


def picture(api: Api) -> Group:
    """Ask the API and draw: totals, nodes with their GPUs, and who waits longest."""
    unready, nodes, gpus = api.ready(), api.items("/nodes"), api.items("/gpus")
    waiting = api.items("/requests", state="HELD,QUEUED")
    held = api.items("/requests", state="RESERVED,BOUND,RUNNING")
    marks = _marks(nodes, gpus)
    counted = Counter("".join(marks.values()))
    used = sum(counted[mark] for mark in "#ms")
    states = Counter(one["state"].lower() for one in held)
    return Group(
        Text(f"Tessera  {api.url}  {unready or 'ready'}"),
        Text(
            f"GPUs     {counted.total()}: {used} used, " + ", ".join(f"{counted[mark]} {what}" for what, mark in UNUSED)
        ),
        Text(f"         {LEGEND}"),
        Text(f"Requests {len(waiting)} waiting, " + ", ".join(f"{states[s]} {s}" for s in SHOWN)),
        Text(""),
        _nodes(nodes, marks),
        *_waiting(waiting),
    )


SHOWN = ("reserved", "bound", "running")


def _marks(nodes: Sequence[Item], gpus: Sequence[Item]) -> dict[str, str]:
    """Return per node one character a GPU; where NVIDIA's plugin chooses, only how many are used is known."""
    by_node: dict[str, list[Item]] = defaultdict(list)
    for gpu in gpus:
        by_node[gpu["node"]].append(gpu)
    found: dict[str, str] = {}
    for node in nodes:
        devices = by_node[node["name"]]
        if node["mode"] == "exact":
            drawn = "".join(_mark(gpu) for gpu in devices)
        else:
            free = min(node["gpus"]["free"], node["gpus"]["total"])
            drawn = "#" * (node["gpus"]["total"] - free) + MARKS["free"] * free
        found[node["name"]] = drawn if _open(node) else drawn.replace(MARKS["free"], CLOSED)
    return found


def _mark(gpu: Item) -> str:
    if gpu["health"] != "healthy":
        return "x"
    return CLOSED if gpu["use"] == "free" and gpu["migMode"] else MARKS[gpu["use"]]


def _open(node: Item) -> bool:
    """Say whether anybody can get a whole GPU of a node that is free."""
    return bool(node["schedulable"] and node["ready"] and node["wholeGpus"] and not node["unnamedHolder"])


def _nodes(nodes: Sequence[Item], marks: dict[str, str]) -> Table:
    rows = (
        (
            node["name"],
            node["mode"],
            node["product"] or "-",
            marks[node["name"]] or "-",
            f"{node['cpuMilli']['free'] / 1000:g}",
            gib(node["memoryBytes"]["free"]),
            str(node["pods"]),
            state(node),
        )
        for node in nodes
    )
    return table(("NODE", "MODE", "PRODUCT", "GPUS", "CPU FREE>", "MEMORY FREE>", "PODS>", "STATE"), rows)


def _waiting(waiting: Sequence[Item]) -> list[Table | Text]:
    if not waiting:
        return []
    rows = ((f"{one['namespace']}/{one['name']}", one["queue"]) for one in waiting[:WAITING_SHOWN])
    more = len(waiting) - WAITING_SHOWN
    return [
        Text(""),
        table(("WAITING, OLDEST FIRST", "QUEUE"), rows),
        *([Text(f"and {more} more; `tessera why POD -n NAMESPACE` says why")] if more > 0 else []),
    ]
