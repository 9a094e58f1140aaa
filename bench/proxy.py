"""Proxies that can strike while a pod is in flight: before Tessera's extender, and between Tessera and kube-apiserver.

kube-scheduler keeps one address for the whole run; `Proxy` forwards to wherever Tessera listens at the moment and
answers 502 while it is down. Every call is recorded in the order of its answer. `ApiProxy` passes everything on,
watches included, until the Binding whose answer never comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

Json = dict[str, Any]

NAMES_KEPT = 16
_BODY_MAX = 64 << 20
_TIMEOUT_S = 10.0
_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
_CREATED = 201


class Moment(StrEnum):
    """When a strike falls, seen from the bind call it waits for."""

    BEFORE = "before"  # the bind never reaches Tessera: only an intent is in flight
    DURING = "during"  # Tessera works on it
    AFTER = "after"  # it is done and its answer is lost


@dataclass(slots=True)
class Strike:
    """One SIGKILL to come.

    Attributes:
        kill: kills Tessera; returns when it is dead.
        moment: when, seen from the next bind call.
        delay_s: for DURING, how long Tessera may work first.
        fell: set once it is dead.
    """

    kill: Callable[[], Awaitable[object]]
    moment: Moment
    delay_s: float
    fell: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to kube-scheduler, and a word when Tessera did not say it."""

    status: int
    body: bytes
    fault: str = ""


class Proxy:
    """`async with` starts and stops it.

    Attributes:
        url: urlPrefix for kube-scheduler's configuration.
        upstream: Tessera's urlPrefix; empty while it is down.
        calls: what was recorded.
    """

    def __init__(self) -> None:
        """Start with nobody behind."""
        self.url = ""
        self.upstream = ""
        self.calls: list[Json] = []
        self._strike: Strike | None = None

    async def __aenter__(self) -> Self:
        """Listen on a free port of the loopback."""
        app = web.Application(client_max_size=_BODY_MAX)
        app.router.add_post("/scheduler/{verb}", self._handle)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))
        self._runner = web.AppRunner(app, access_log=None)
        port = await _listen(self._runner)
        self.url = f"http://127.0.0.1:{port}/scheduler"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        await self._runner.cleanup()
        await self._session.close()

    def arm(self, strike: Strike) -> None:
        """Let the next bind call meet this strike; one at a time."""
        assert self._strike is None, "one strike at a time"
        self._strike = strike

    def disarm(self) -> None:
        """Take back a strike that has not fallen."""
        self._strike = None

    async def _handle(self, http: web.Request) -> web.Response:
        verb, body = http.match_info["verb"], await http.read()
        at, begun = time.time(), time.perf_counter()
        strike = self._strike if verb == "bind" and self.upstream else None
        if strike:
            self._strike = None
            answer = await self._struck(strike, body)
        else:
            answer = await self._forward(verb, body)
        self.calls.append(_record(verb, body, answer, at=at, took_s=time.perf_counter() - begun))
        return web.Response(status=answer.status, body=answer.body, content_type="application/json")

    async def _forward(self, verb: str, body: bytes) -> Answer:
        if not self.upstream:
            return _failed("down")
        try:
            url, headers = f"{self.upstream}/{verb}", {"Content-Type": "application/json"}
            async with self._session.post(url, data=body, headers=headers) as http:
                return Answer(http.status, await http.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            return _failed(f"unreachable: {type(error).__name__}")

    async def _struck(self, strike: Strike, body: bytes) -> Answer:
        """Kill Tessera around one bind call, whose answer kube-scheduler never gets."""
        call = None if strike.moment is Moment.BEFORE else asyncio.create_task(self._forward("bind", body))
        if call:
            await asyncio.wait({call}, timeout=strike.delay_s if strike.moment is Moment.DURING else None)
        self.upstream = ""
        await strike.kill()
        strike.fell.set()
        if call:
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
        return _failed(f"killed {strike.moment}")


class ApiProxy:
    """Stands before kube-apiserver under its certificate; `async with` starts and stops it.

    Attributes:
        url: what a client names as its server.
    """

    def __init__(self, server: str, ca_file: Path, certificate: Path, key: Path) -> None:
        """Note whom it stands before, who signed that one's certificate, and the certificate to show."""
        self.url = ""
        self._server = server
        self._trust = ssl.create_default_context(cafile=str(ca_file))
        self._shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._shown.load_cert_chain(certificate, key)
        self._strike: Strike | None = None
        self._killing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Listen on a free port of the loopback."""
        connector = aiohttp.TCPConnector(ssl=self._trust, limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )
        app = web.Application(client_max_size=_BODY_MAX)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        port = await _listen(self._runner, self._shown)
        self.url = f"https://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        await self._runner.cleanup()
        await self._session.close()

    def arm(self, strike: Strike) -> None:
        """Let the next Binding be applied and its answer never come."""
        assert self._strike is None, "one strike at a time"
        self._strike = strike

    def disarm(self) -> None:
        """Take back a strike that has not fallen."""
        self._strike = None

    def kubeconfig(self, of: Path, to: Path) -> Path:
        """Write a kubeconfig like another, but with this proxy as its server; return its path."""
        config = json.loads(of.read_text())
        config["clusters"][0]["cluster"]["server"] = self.url
        to.write_text(json.dumps(config))
        return to

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in http.headers.items() if name.lower() not in _HOP}
        url = URL(self._server + http.raw_path, encoded=True)
        try:
            async with self._session.request(http.method, url, data=await http.read(), headers=headers) as said:
                if said.status == _CREATED and http.path.endswith("/binding"):
                    await self._strike_now()
                kept = {name: value for name, value in said.headers.items() if name.lower() not in _HOP}
                answer = web.StreamResponse(status=said.status, headers=kept)
                await answer.prepare(http)
                async for chunk in said.content.iter_any():
                    await answer.write(chunk)
                await answer.write_eof()
                return answer
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"kube-apiserver is not there: {type(error).__name__}")

    async def _strike_now(self) -> None:
        """Kill the client, if a strike waits, before it can hear of its Binding."""
        strike, self._strike = self._strike, None
        if strike:
            self._killing = asyncio.create_task(_killed(strike))
            await asyncio.shield(self._killing)  # the client's death cancels whoever serves it


async def _killed(strike: Strike) -> None:
    await strike.kill()
    strike.fell.set()


def _failed(why: str) -> Answer:
    return Answer(502, orjson.dumps({"Error": f"Tessera is not there: {why}"}), why)


def _record(verb: str, body: bytes, answer: Answer, *, at: float, took_s: float) -> Json:
    """Return one line of `calls.jsonl`: t (seconds), verb, pod, uid, nodes (how many were offered), answer, ms."""
    parsed = _parse(body)
    asked: Json = parsed if isinstance(parsed, dict) else {}
    meta = (asked.get("Pod") or {}).get("metadata") or {}
    namespace = meta.get("namespace", asked.get("PodNamespace", ""))
    name = meta.get("name", asked.get("PodName", ""))
    said = {"error": answer.fault} if answer.fault else _summary(verb, _parse(answer.body))
    return {
        "t": round(at, 6),
        "verb": verb,
        "pod": f"{namespace}/{name}",
        "uid": meta.get("uid", asked.get("PodUID", "")),
        "nodes": 1 if "Node" in asked else len(asked.get("NodeNames") or ()),
        "status": answer.status,
        "answer": said,
        "ms": round(took_s * 1000, 3),
    }


def _parse(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _summary(verb: str, said: object) -> Json:
    """Shorten an answer: a filter's names and reasons are counted, and the first names kept."""
    if isinstance(said, list):
        best: Json = max(said, key=lambda one: one["Score"], default={})
        return {"hosts": len(said), "best": best.get("Host", "")}
    if not isinstance(said, dict):
        return {"error": "no JSON object"}
    if verb != "filter":
        return {"error": said.get("Error", "")}
    names = said.get("NodeNames") or []
    failed = {**(said.get("FailedNodes") or {}), **(said.get("FailedAndUnresolvableNodes") or {})}
    reasons = dict(sorted(Counter(failed.values()).items()))
    return {"names": names[:NAMES_KEPT], "count": len(names), "reasons": reasons, "error": said.get("Error", "")}


async def _listen(runner: web.AppRunner, shown: ssl.SSLContext | None = None) -> int:
    """Listen on a free port of the loopback, over TLS where a certificate is to be shown; return the port."""
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=shown).start()
    port: int = runner.addresses[0][1]
    return port
