"""Start and stop of the whole: what breaks is said, and nobody who hangs keeps Tessera from stopping."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import orjson
import pytest

from scheduler.app import App
from scheduler.clock import LoopClock, RealClock, VirtualLoop
from scheduler.config import Settings
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.ids import seeded_ids
from scheduler.kube.port import Object
from scheduler.model.reservation import State
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter
from tests.contract.cases_bind_protocol import Meddler, Stage
from tests.objects import raw_node


async def flawed(*_: object, **__: object) -> NoReturn:
    raise ZeroDivisionError("a bug")


def running(loop: VirtualLoop) -> Stage:
    """Join a Tessera that is not started yet, on a cluster with one node and one pod."""
    clock = LoopClock(loop)
    cluster = EmbeddedCluster(clock, seeded_ids(random.Random(1)))
    cluster.preload("nodes", [raw_node("a")])
    store = Store.open("sqlite://")
    meddler = Meddler(cluster)
    app = App(Settings(), clock, meddler, store, InlineWriter(store), random.Random(3))
    return Stage(cluster, meddler, app, "a")


def test_a_bug_in_a_loop_ends_the_start_instead_of_waiting_for_ever() -> None:
    loop = VirtualLoop()

    async def inside() -> None:
        here = running(loop)
        here.app.reflectors[1].step = flawed  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(60):
                await here.app.start()
        await here.app.stop()
        here.app.store.close()

    loop.run_until_complete(inside())
    loop.close()


def test_a_bug_in_a_loop_is_heard_of_when_all_runs() -> None:
    loop = VirtualLoop()

    async def inside() -> None:
        here = running(loop)
        await here.app.start()
        here.app.crew.check()
        here.app.reflectors[1].step = flawed  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(3600):
                await here.app.crew.failed()
        await here.app.stop()
        here.app.store.close()

    loop.run_until_complete(inside())
    loop.close()


def test_a_bind_that_never_ends_does_not_keep_it_from_stopping() -> None:
    loop = VirtualLoop()

    async def inside() -> None:
        here = running(loop)
        await here.app.start()
        pod = await here.pod()

        async def hang(_: Object) -> None:
            await here.app.clock.sleep(3600)

        here.meddler.before = hang
        assert "deadline" in await here.bind(pod)
        began_s = here.app.clock.monotonic()
        await here.app.stop()
        assert here.app.clock.monotonic() - began_s < 5
        row = here.app.store.row(pod["metadata"]["uid"])
        assert row is not None
        assert row.state is State.BINDING  # the next start reads back what became of it
        here.app.store.close()

    loop.run_until_complete(inside())
    loop.close()


def started(ready: bytes) -> tuple[str, int]:
    """Return host and port of the extender from the line that says ready."""
    host, port = orjson.loads(ready)["extender"].removeprefix("http://").partition("/")[0].split(":")
    return host, int(port)


async def test_sigterm_ends_it_in_ten_seconds_whoever_holds_on(tmp_path: Path) -> None:
    """A client has sent half a body and never sends the rest."""
    (tmp_path / "nodes.json").write_bytes(orjson.dumps({"kind": "List", "items": [raw_node("a")]}))
    (tmp_path / "pods.json").write_bytes(orjson.dumps({"kind": "List", "items": []}))
    anywhere = [part for name in ("extender", "api", "metrics") for part in (f"--{name}", "127.0.0.1:0")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler", "serve", "--embedded", str(tmp_path), *anywhere),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "TESSERA_STATE": str(tmp_path / "state")},
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        address = started(await process.stdout.readline())
    with socket.create_connection(address) as client:
        client.sendall(b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in await reader.readline()  # by now it reads the other one's body, too
        clock = RealClock()
        began_s = clock.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(12):
                assert await process.wait() == 0
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        assert clock.monotonic() - began_s < 10
        writer.close()
