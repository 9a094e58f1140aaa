"""API servers that misbehave on purpose: a raw socket and a function that writes whatever it likes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.clock import RealClock
from scheduler.kube.api import ApiServer, Limits, connect


@dataclass
class Request:
    """What came in, and where to answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, status: int, body: Any, **headers: str) -> None:
        """Answer properly."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(raw)}", "Content-Type: application/json"]
        head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join(head).encode() + b"\r\n\r\n" + raw)

    async def stream(self) -> None:
        """Begin a chunked answer."""
        await self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, raw: bytes) -> None:
        """Send one chunk; an empty one ends the answer."""
        await self.raw(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")

    async def raw(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(raw)
        await self.writer.drain()


Play = Callable[[Request], Awaitable[None]]


@dataclass
class Server:
    """A running server: its address and what it was asked."""

    play: Play
    url: str = ""
    asked: list[Request] = field(default_factory=list)
    connections: int = 0
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self.tasks.append(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while not writer.is_closing():
                    await self._serve_one(reader, writer)
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(method, path, headers, body, reader, writer)
        self.asked.append(request)
        await self.play(request)

    async def stop(self) -> None:
        """End what still hangs."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks)


@contextlib.asynccontextmanager
async def serving(play: Play) -> AsyncIterator[Server]:
    """Run a server on the loopback."""
    server = Server(play)
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        try:
            yield server
        finally:
            await server.stop()


def write_kubeconfig(folder: Path, url: str, user: dict[str, Any]) -> str:
    """Write a kubeconfig of one cluster and one user."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    return str(path)


@contextlib.asynccontextmanager
async def client_of(play: Play, folder: Path, limits: Limits | None = None) -> AsyncIterator[tuple[ApiServer, Server]]:
    """Run a server and a client of it."""
    async with serving(play) as server:
        kubeconfig = write_kubeconfig(folder, server.url, {"token": "secret"})
        client = await connect(kubeconfig=kubeconfig, in_cluster=False, limits=limits or Limits(), clock=RealClock())
        try:
            yield client, server
        finally:
            await client.close()
