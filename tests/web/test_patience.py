"""Slow and greedy clients, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from scheduler.web import patience
from scheduler.web.patience import GuardedRunner
from scheduler.web.problems import problems
from tests.web.test_faces import Faces, body

HEAD = b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\n"
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def take(http: web.Request) -> web.Response:
    return web.Response(body=b"%d" % len(await patience.body_of(http)))


def framework() -> web.BaseRunner:
    app = web.Application(middlewares=[patience.patience, problems])
    app.router.add_post("/scheduler/filter", take)
    return GuardedRunner(app, access_log=None, shutdown_timeout=0.1)


STACKS: dict[str, Callable[[], web.BaseRunner]] = {"http1": lambda: Faces().runner(), "aiohttp": framework}


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def listening(stack: str) -> AsyncGenerator[int, None]:
    runner = STACKS[stack]()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def connected(port: int, first: bytes) -> Pair:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    await writer.drain()
    return reader, writer


def whole(sent: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(sent), sent)


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])
    return head + await reader.readexactly(length)


@pytest.mark.parametrize("start", [b"", b"POST /scheduler/fil", HEAD])
async def test_a_header_that_does_not_come_ends_the_connection(
    stack: str, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "HEADERS_S", 0.05)
    monkeypatch.setattr(patience, "_SWEEP_S", 0.02)
    async with listening(stack) as port, asyncio.timeout(10):
        reader, writer = await connected(port, start)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()


async def test_the_next_header_on_a_kept_connection_has_its_own_time(
    stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "HEADERS_S", 0.05)
    monkeypatch.setattr(patience, "_SWEEP_S", 0.02)
    async with listening(stack) as port, asyncio.timeout(10):
        reader, writer = await connected(port, whole(body()))
        assert b" 200 " in await answer(reader)
        writer.write(whole(body()))
        assert b" 200 " in await answer(reader)
        writer.write(HEAD)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()


async def test_a_body_that_does_not_come_is_answered_and_let_go(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "BODY_S", 0.05)
    async with listening(stack) as port, asyncio.timeout(10):
        reader, writer = await connected(port, HEAD + b"Content-Length: 100\r\n\r\n{")
        said = await answer(reader)
        assert b" 408 " in said
        assert b'"code":"http.408"' in said
        writer.close()


async def test_one_address_has_a_bounded_number_of_connections(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PER_ADDRESS", 3)
    async with listening(stack) as port, asyncio.timeout(10):
        pairs = [await connected(port, whole(body())) for _ in range(3)]
        for reader, _ in pairs:
            assert b" 200 " in await answer(reader)
        reader, writer = await connected(port, b"")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        pairs[0][1].close()
        await pairs[0][1].wait_closed()
        served = False
        while not served:  # the server hears of the end a moment later
            reader, writer = await connected(port, whole(body()))
            with contextlib.suppress(ConnectionResetError, asyncio.IncompleteReadError):
                served = b" 200 " in await answer(reader)
            writer.close()
        for _, each in pairs[1:]:
            each.close()
