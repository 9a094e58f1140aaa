"""Tessera's API over a real socket with a desk behind it, and the command line that asks it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import structlog
from aiohttp import web

from policies.columns import Health
from scheduler import geometry
from scheduler.__main__ import main
from scheduler.clock import RealClock
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.ledger.ledger import advance
from scheduler.ledger.taking import newborn
from scheduler.metrics import Metrics
from scheduler.model.pod import Pod
from scheduler.model.reservation import Event
from scheduler.web.access import Access, Bearers, Rate
from scheduler.web.routes import api_app
from scheduler.web.views import Views
from tests.objects import raw_node, raw_pod


@dataclass
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.out.splitlines()[-1])
        return found


@dataclass
class Stage:
    """Two 8-GPU nodes, one exact and one observed, and one without GPUs."""

    desk: Desk = field(default_factory=lambda: Desk(RealClock(), Policies()))
    unready: str = ""
    url: str = ""
    bearers: tuple[Bearers, ...] = ()

    def __post_init__(self) -> None:
        for raw in (raw_node("exact-1"), raw_node("seen-1", mode="observed"), raw_node("cpu-1", gpus=0)):
            self.node(raw)

    def node(self, raw: dict[str, Any], more: dict[str, str] | None = None) -> None:
        """Take in a node, with more resources than it has."""
        shares = {"tessera.dev/share": "512"} if raw["metadata"]["labels"]["tessera.dev/mode"] == "exact" else {}
        raw["status"]["allocatable"] = {**raw["status"]["allocatable"], **shares, **(more or {})}
        node = read_node(raw, geometry.products())
        assert node is not None
        self.desk.registry.put_node(node)

    def sick(self, node: str, slot: int) -> None:
        self.desk.registry.columns.column("health")[slot, self.desk.registry.columns.rows[node]] = Health.BAD

    def pod(self, name: str, gpus: int = 1, **how: Any) -> Pod:
        """Take in a pod that waits, as the watch and the ledger do."""
        pod = read_pod(raw_pod(name, gpus, **how))
        self.desk.registry.put_pod(pod)
        event = Event.SUBMIT if pod.request.refusal is None else Event.REJECT
        self.step(pod, event, pod.request.refusal.reason if pod.request.refusal else "")
        return pod

    def bound(self, name: str, node: str, gpus: int = 1, ask: dict[str, str] | None = None, **how: Any) -> Pod:
        """Take in a pod that Tessera has bound; `ask` replaces the whole GPUs."""
        raw = raw_pod(name, 0 if ask else gpus, **how)
        for amounts in raw["spec"]["containers"][0]["resources"].values():
            amounts.update(ask or {})
        pod = read_pod(raw)
        self.desk.registry.put_pod(pod)
        self.desk.claim(pod, node)
        self.step(pod, Event.POST)
        return pod

    def step(self, pod: Pod, event: Event, reason: str = "") -> None:
        row, now_us = self.desk.book.rows.get(pod.uid), self.desk.clock.wall_us()
        born = newborn(pod.request, fence=self.desk.fence, now_us=self.desk.clock.wall_us()) if row is None else None
        self.desk.book.apply((advance(row, event, now_us=now_us, fence=0, born=born, reason=reason),))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Stage]:
        views = Views(self.desk, Metrics(self.desk.clock, "test"), lambda: self.unready)
        access = Access(self.bearers, Rate(self.desk.clock))
        runner = web.AppRunner(api_app(views, access), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


async def tessera(capsys: pytest.CaptureFixture[str], *arguments: str) -> Said:
    """Run the command in this process, beside the loop that serves it."""

    def call() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tessera", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0)

    capsys.readouterr()
    policy = asyncio.get_event_loop_policy()
    try:
        code = await asyncio.to_thread(call)
    finally:  # what a process of its own would take with it
        asyncio.set_event_loop_policy(policy)
        structlog.reset_defaults()
    out, err = capsys.readouterr()
    return Said(code, out, err)
