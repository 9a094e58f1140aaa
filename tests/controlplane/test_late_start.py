"""Tessera starts before its API server does: it waits, says for what, and is ready soon after."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from pathlib import Path

import aiohttp

from bench.child import Child
from bench.realcluster import TESSERA, RealCluster, free_ports

NEVER = threading.Event()  # the processes outside have no fake clock
FILTER = {"Pod": {"metadata": {"name": "p", "namespace": "default", "uid": "u"}, "spec": {}}, "NodeNames": ["a"]}


async def pause() -> None:
    await asyncio.to_thread(NEVER.wait, 0.1)


async def test_an_api_server_that_comes_late_is_waited_for(real_cluster: RealCluster, tmp_path: Path) -> None:
    await real_cluster.stop_api_server()
    log = tmp_path / "log"
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "scheduler", "serve", f"--kubeconfig={real_cluster.kubeconfig(TESSERA)}"]
    argv += [f"--db=sqlite:///{tmp_path / 'tessera.db'}", f"--extender=127.0.0.1:{port}"]
    argv += ["--api=127.0.0.1:0", "--metrics=127.0.0.1:0"]
    child = Child("Tessera", argv, log, {**os.environ, "TESSERA_STATE": str(tmp_path)})
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(120):
            while "start.waits" not in log.read_text():
                assert child.alive, child.tail()
                await pause()
            async with session.get(f"{address}/healthz") as http:
                assert http.status == 200
            async with session.get(f"{address}/readyz") as http:
                assert (http.status, "waiting for the API server" in await http.text()) == (503, True)
            async with asyncio.timeout(1), session.post(f"{address}/scheduler/filter", json=FILTER) as http:
                assert (await http.json(content_type=None))["Error"]
            assert child.alive
            await real_cluster.start_api_server()
            while '{"ready":true' not in log.read_text():
                assert child.alive, child.tail()
                await pause()
            async with session.get(f"{address}/readyz") as http:
                assert http.status == 200
        said = [json.loads(line) for line in log.read_text().splitlines() if '"start.waits"' in line]
        assert "cannot be reached" in said[0]["reason"]
        assert await child.stop() == 0
    finally:
        if real_cluster.api_server is None:
            await real_cluster.start_api_server()
        if child.alive:
            await child.kill()
