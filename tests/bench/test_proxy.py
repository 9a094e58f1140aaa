from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.proxy import ApiProxy, Moment, Proxy, Strike
from tests.bench.dumps import Json, pod

BIND = {"PodName": "train", "PodNamespace": "default", "PodUID": "uid-train", "Node": "node-1"}
FILTER = {"Pod": pod("train", 1), "Nodes": None, "NodeNames": ["node-1", "node-2", "node-3"]}


class Tessera:
    """An extender that answers from a list, keeps what it was asked, and can be held in the middle of a bind."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Json]] = []
        self.hold: asyncio.Event | None = None
        self.began = asyncio.Event()

    async def answer(self, http: web.Request) -> web.Response:
        verb, body = http.match_info["verb"], await http.json()
        self.asked.append((verb, body))
        self.began.set()
        if self.hold:
            await self.hold.wait()
        refused = {"node-2": "GpusBusy", "node-3": "GpusBusy"}
        said: dict[str, object] = {
            "filter": {"NodeNames": ["node-1"], "FailedAndUnresolvableNodes": refused},
            "prioritize": [{"Host": "node-1", "Score": 3}, {"Host": "node-2", "Score": 9}],
            "bind": {"Error": ""},
        }
        return web.json_response(said[verb])


@pytest.fixture
async def tessera() -> AsyncIterator[tuple[Tessera, str]]:
    stub = Tessera()
    app = web.Application()
    app.router.add_post("/scheduler/{verb}", stub.answer)
    async with TestServer(app) as server:
        yield stub, str(server.make_url("/scheduler"))


async def ask(proxy: Proxy, verb: str, body: object) -> tuple[int, object]:
    async with aiohttp.ClientSession() as session, session.post(f"{proxy.url}/{verb}", json=body) as http:
        return http.status, await http.json()


async def test_calls_go_through_and_are_recorded(tessera: tuple[Tessera, str]) -> None:
    stub, url = tessera
    async with Proxy() as proxy:
        proxy.upstream = url
        status, said = await ask(proxy, "filter", FILTER)
        assert (status, said) == (
            200,
            {"NodeNames": ["node-1"], "FailedAndUnresolvableNodes": {"node-2": "GpusBusy", "node-3": "GpusBusy"}},
        )
        assert await ask(proxy, "prioritize", FILTER) == (
            200,
            [{"Host": "node-1", "Score": 3}, {"Host": "node-2", "Score": 9}],
        )
        assert await ask(proxy, "bind", BIND) == (200, {"Error": ""})
    assert stub.asked == [("filter", FILTER), ("prioritize", FILTER), ("bind", BIND)]
    records = [(call["verb"], call["pod"], call["uid"], call["nodes"], call["answer"]) for call in proxy.calls]
    filtered = {"names": ["node-1"], "count": 1, "reasons": {"GpusBusy": 2}, "error": ""}
    assert records == [
        ("filter", "default/train", "uid-train", 3, filtered),
        ("prioritize", "default/train", "uid-train", 3, {"hosts": 2, "best": "node-2"}),
        ("bind", "default/train", "uid-train", 1, {"error": ""}),
    ]
    times = [call["t"] for call in proxy.calls]
    assert times == sorted(times)
    assert all(call["ms"] > 0 and call["status"] == 200 for call in proxy.calls)


async def test_without_tessera_behind_it_every_call_fails() -> None:
    async with Proxy() as proxy:
        assert (await ask(proxy, "filter", FILTER))[0] == 502
        proxy.upstream = "http://127.0.0.1:9/scheduler"
        assert (await ask(proxy, "bind", BIND))[0] == 502
    assert [call["answer"]["error"] for call in proxy.calls] == ["down", "unreachable: ClientConnectorError"]


async def test_a_body_that_is_no_json_is_recorded_too(tessera: tuple[Tessera, str]) -> None:
    async with Proxy() as proxy:
        proxy.upstream = tessera[1].replace("/scheduler", "/nowhere")
        status, _ = await ask_raw(proxy, b"\xff")
    assert status == 404
    assert proxy.calls[0]["answer"] == {"error": "no JSON object"}


async def ask_raw(proxy: Proxy, body: bytes) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.post(f"{proxy.url}/filter", data=body) as http:
        return http.status, await http.read()


@pytest.mark.parametrize(("moment", "reached"), [(Moment.BEFORE, 0), (Moment.DURING, 1), (Moment.AFTER, 1)])
async def test_a_strike_falls_on_the_next_bind_and_its_answer_is_lost(
    tessera: tuple[Tessera, str], moment: Moment, reached: int
) -> None:
    stub, url = tessera
    killed: list[str] = []

    async def kill() -> None:
        killed.append(moment)

    async with Proxy() as proxy:
        proxy.upstream = url
        strike = Strike(kill, moment, 0.0)
        proxy.arm(strike)
        assert (await ask(proxy, "filter", FILTER))[0] == 200
        assert not killed
        if moment is Moment.DURING:
            stub.hold = asyncio.Event()
        status, _ = await ask(proxy, "bind", BIND)
        assert (status, killed, strike.fell.is_set(), proxy.upstream) == (502, [moment], True, "")
        assert (await ask(proxy, "bind", BIND))[0] == 502
        if stub.hold:
            stub.hold.set()
    assert sum(verb == "bind" for verb, _ in stub.asked) <= reached
    if moment is Moment.AFTER:
        assert stub.asked[-1] == ("bind", BIND)
    assert [call["answer"]["error"] for call in proxy.calls[1:]] == [f"killed {moment}", "down"]


async def test_a_strike_that_was_taken_back_does_not_fall(tessera: tuple[Tessera, str]) -> None:
    async def kill() -> None:
        raise AssertionError("nobody asked for it")

    async with Proxy() as proxy:
        proxy.upstream = tessera[1]
        proxy.arm(Strike(kill, Moment.BEFORE, 0.0))
        proxy.disarm()
        assert await ask(proxy, "bind", BIND) == (200, {"Error": ""})


class Server:
    """An API server that lists, watches and binds, over TLS."""

    def __init__(self) -> None:
        self.bound: list[str] = []
        self.seen: list[str] = []
        self.go_on = asyncio.Event()

    async def list(self, http: web.Request) -> web.StreamResponse:
        self.seen.append(f"{http.path_qs} {http.headers['Authorization']}")
        if "watch" not in http.query:
            return web.json_response({"items": []}, headers={"Audit-Id": "7"})
        stream = web.StreamResponse()
        await stream.prepare(http)
        await stream.write(b"{}\n")
        await self.go_on.wait()
        await stream.write(b"[]\n")
        return stream

    async def bind(self, http: web.Request) -> web.Response:
        name = http.match_info["name"]
        if name in self.bound:
            return web.json_response({"reason": "Conflict"}, status=409)
        self.bound.append(name)
        return web.json_response({"got": await http.json()}, status=201)


@pytest.fixture
async def behind(tmp_path: Path) -> AsyncIterator[tuple[Server, ApiProxy, ssl.SSLContext]]:
    authority, stub, app = trustme.CA(), Server(), web.Application()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    shown = authority.issue_cert("127.0.0.1")
    shown.private_key_pem.write_to_path(str(tmp_path / "key"))
    shown.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    app.router.add_get("/pods", stub.list)
    app.router.add_post("/pods/{name}/binding", stub.bind)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.configure_cert(context)
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=context)
    url = f"https://127.0.0.1:{server.port}"
    async with ApiProxy(url, tmp_path / "ca.crt", tmp_path / "crt", tmp_path / "key") as proxy:
        yield stub, proxy, ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    await server.close()


async def test_calls_to_the_api_server_go_through_and_a_watch_says_each_line_at_once(
    behind: tuple[Server, ApiProxy, ssl.SSLContext],
) -> None:
    stub, proxy, trust = behind
    headers = {"Authorization": "Bearer me"}
    async with aiohttp.ClientSession(proxy.url, connector=aiohttp.TCPConnector(ssl=trust), headers=headers) as session:
        async with session.get("/pods?a=%26b") as said:
            assert (await said.json(), said.headers["Audit-Id"]) == ({"items": []}, "7")
        async with session.get("/pods?watch=1") as said:
            assert await said.content.readline() == b"{}\n"
            stub.go_on.set()
            assert await said.content.readline() == b"[]\n"
        async with session.post("/pods/one/binding", json={"target": 1}) as said:
            assert (said.status, await said.json()) == (201, {"got": {"target": 1}})
    assert stub.seen == ["/pods?a=%26b Bearer me", "/pods?watch=1 Bearer me"]


async def test_a_binding_is_applied_and_its_answer_never_comes(
    behind: tuple[Server, ApiProxy, ssl.SSLContext],
) -> None:
    stub, proxy, trust = behind
    stub.bound.append("other")
    async with aiohttp.ClientSession(proxy.url, connector=aiohttp.TCPConnector(ssl=trust)) as session:

        async def kill() -> None:
            calling.cancel()  # the client dies
            await asyncio.gather(calling, return_exceptions=True)
            await asyncio.wait({asyncio.ensure_future(session.close())})

        strike = Strike(kill, Moment.AFTER, 0.0)
        proxy.arm(strike)
        async with session.post("/pods/other/binding", json={}) as refused:
            assert (refused.status, strike.fell.is_set()) == (409, False)
        calling = asyncio.ensure_future(session.post("/pods/one/binding", json={}))
        async with asyncio.timeout(10):
            await strike.fell.wait()
        assert calling.cancelled()
    assert stub.bound == ["other", "one"]


async def test_an_api_server_that_is_away_is_said_so(behind: tuple[Server, ApiProxy, ssl.SSLContext]) -> None:
    proxy, trust = behind[1], behind[2]
    proxy._server = "https://127.0.0.1:9"
    async with (
        aiohttp.ClientSession(proxy.url, connector=aiohttp.TCPConnector(ssl=trust)) as session,
        session.get("/pods") as said,
    ):
        assert said.status == 502


def test_a_kubeconfig_for_the_proxy_differs_in_its_server_alone(tmp_path: Path) -> None:
    authority = trustme.CA()
    shown = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    shown.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both"))
    config = {"clusters": [{"name": "real", "cluster": {"server": "https://a", "x": 1}}], "users": ["u"]}
    (tmp_path / "of").write_text(json.dumps(config))
    proxy = ApiProxy("https://a", tmp_path / "ca.crt", tmp_path / "both", tmp_path / "both")
    proxy.url = "https://b"
    told = json.loads(proxy.kubeconfig(tmp_path / "of", tmp_path / "to").read_text())
    config["clusters"][0]["cluster"]["server"] = "https://b"  # type: ignore[index]
    assert told == config
