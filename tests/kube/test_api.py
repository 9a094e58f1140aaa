"""What ApiServer makes of answers, refusals and broken connections."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import ConfigError
from scheduler.kube.api import ApiServer, Limits, connect
from scheduler.kube.port import ApiError, Conflict, Gone, NotFound, UnknownOutcome
from scheduler.kube.wire import advice
from tests.kube.servers import Play, Request, client_of, serving, write_kubeconfig

HASTY = Limits(read_s=0.3, write_s=0.3, connect_s=0.3)
POD = {"metadata": {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": "7"}}


def answers(status: int, body: Any, **headers: str) -> Play:
    async def play(request: Request) -> None:
        await request.answer(status, body, **headers)

    return play


def status(reason: str = "Because", **more: Any) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "reason": reason, "message": "as it is", **more}


async def silent(_: Request) -> None:
    await asyncio.Event().wait()


async def hang_up(request: Request) -> None:
    request.writer.close()


async def cut_short(request: Request) -> None:
    await request.raw(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"metadata"')
    request.writer.close()


async def write(client: ApiServer, verb: str) -> None:
    if verb == "create":
        await client.create("pods", "n", POD)
    elif verb == "replace":
        await client.replace("pods", "n", "p", POD)
    elif verb == "patch":
        await client.patch("pods", "n", "p", {}, subresource="status")
    elif verb == "delete":
        await client.delete("pods", "n", "p", uid="u", grace_s=0)
    else:
        await client.bind("n", "p", {"metadata": {"uid": "u"}})


WRITES = ["create", "replace", "patch", "delete", "bind"]


@pytest.mark.parametrize(
    ("code", "error"),
    [(404, NotFound), (409, Conflict), (410, Gone), (403, ApiError), (422, ApiError), (301, ApiError)],
)
@pytest.mark.parametrize("verb", [*WRITES, "get"])
async def test_a_refusal_is_an_error_of_its_status(code: int, error: type[ApiError], verb: str, tmp_path: Path) -> None:
    async with client_of(answers(code, status("Why"), Location="http://127.0.0.1:1/"), tmp_path) as (client, server):
        with pytest.raises(error) as caught:
            await (client.get("pods", "n", "p") if verb == "get" else write(client, verb))
        assert (caught.value.status, caught.value.reason, caught.value.message) == (code, "Why", "as it is")
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    "play", [answers(500, status()), answers(503, b"<html>"), answers(504, status()), silent, hang_up, cut_short]
)
@pytest.mark.parametrize("verb", WRITES)
async def test_a_write_without_a_clear_answer_has_an_unknown_outcome_and_is_sent_once(
    play: Play, verb: str, tmp_path: Path
) -> None:
    async with client_of(play, tmp_path, HASTY) as (client, server):
        with pytest.raises(UnknownOutcome, match="read the object back"):
            await write(client, verb)
        assert len(server.asked) == 1


@pytest.mark.parametrize("verb", WRITES)
async def test_a_write_on_a_kept_connection_that_breaks_is_not_sent_again(verb: str, tmp_path: Path) -> None:
    async def apply_then_hang_up(request: Request) -> None:
        if request.method == "GET":
            await request.answer(200, POD)
        else:
            request.writer.close()

    async with client_of(apply_then_hang_up, tmp_path) as (client, server):
        await client.get("pods", "n", "p")
        with pytest.raises(UnknownOutcome):
            await write(client, verb)
        assert [request.method for request in server.asked].count("GET") == len(server.asked) - 1
        assert server.connections == 1


async def test_a_write_that_found_no_server_was_surely_not_made(tmp_path: Path) -> None:
    async with client_of(silent, tmp_path) as (client, server):
        pass
    client = await connect(
        kubeconfig=write_kubeconfig(tmp_path, server.url, {"token": "t"}), in_cluster=False, limits=HASTY
    )
    with pytest.raises(ApiError) as caught:
        await client.bind("n", "p", {})
    assert caught.value.status == 503
    await client.close()


@pytest.mark.parametrize(("play", "code"), [(silent, 504), (hang_up, 503), (cut_short, 503), (answers(200, b"x"), 502)])
async def test_a_read_without_an_answer_is_refused(play: Play, code: int, tmp_path: Path) -> None:
    async with client_of(play, tmp_path, HASTY) as (client, _):
        with pytest.raises(ApiError) as caught:
            await client.get("nodes", "", "n")
        assert caught.value.status == code


@pytest.mark.parametrize(
    ("headers", "body", "wanted"),
    [
        ({"Retry_After": "3"}, {}, 3.0),
        ({}, {"details": {"retryAfterSeconds": 4}}, 4.0),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}, 0.0),
        ({}, {"details": "odd"}, 0.0),
    ],
)
@pytest.mark.parametrize("code", [429, 503, 504])
async def test_what_the_server_asks_for_is_kept(
    code: int, headers: dict[str, str], body: dict[str, Any], wanted: float, tmp_path: Path
) -> None:
    async with client_of(answers(code, status(**body), **headers), tmp_path) as (client, _):
        with pytest.raises(ApiError) as caught:
            await client.list("pods")
        assert (caught.value.status, caught.value.retry_after_s) == (code, wanted)


async def test_a_429_to_a_write_is_a_refusal(tmp_path: Path) -> None:
    async with client_of(answers(429, status("TooManyRequests"), Retry_After="1"), tmp_path) as (client, _):
        with pytest.raises(ApiError) as caught:
            await client.bind("n", "p", {})
        assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)


async def test_verbs_are_what_kubernetes_expects(tmp_path: Path) -> None:
    async with client_of(answers(200, POD), tmp_path) as (client, server):
        for verb in WRITES:
            await write(client, verb)
        await client.patch("nodes", "", "a/b?c", [], patch_type="json")
        await client.patch("leases", "n", "l", {}, patch_type="strategic")
        await client.create("events", "n", {})
        assert await client.get("nodes", "", "n") == POD
    seen = [(r.method, r.path, r.headers.get("content-type", "")) for r in server.asked]
    assert seen == [
        ("POST", "/api/v1/namespaces/n/pods", "application/json"),
        ("PUT", "/api/v1/namespaces/n/pods/p", "application/json"),
        ("PATCH", "/api/v1/namespaces/n/pods/p/status", "application/merge-patch+json"),
        ("DELETE", "/api/v1/namespaces/n/pods/p", "application/json"),
        ("POST", "/api/v1/namespaces/n/pods/p/binding", "application/json"),
        ("PATCH", "/api/v1/nodes/a%2Fb%3Fc", "application/json-patch+json"),
        ("PATCH", "/apis/coordination.k8s.io/v1/namespaces/n/leases/l", "application/strategic-merge-patch+json"),
        ("POST", "/apis/events.k8s.io/v1/namespaces/n/events", "application/json"),
        ("GET", "/api/v1/nodes/n", ""),
    ]
    assert json.loads(server.asked[3].body) == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "preconditions": {"uid": "u"},
        "gracePeriodSeconds": 0,
    }
    assert {r.headers["authorization"] for r in server.asked} == {"bearer secret"}
    assert server.connections == 1


async def test_pages_are_followed_by_their_token(tmp_path: Path) -> None:
    body = {"metadata": {"resourceVersion": "9", "continue": "a=b&c"}, "items": None}
    async with client_of(answers(200, body), tmp_path) as (client, server):
        page = await client.list("pods", limit=2)
        await client.list("pods", limit=2, after=page.next)
    assert (page.items, page.resource_version, page.next) == ([], "9", "a=b&c")
    assert [r.path for r in server.asked] == ["/api/v1/pods?limit=2", "/api/v1/pods?limit=2&continue=a%3Db%26c"]


def event(kind: str, version: str) -> bytes:
    return json.dumps({"type": kind, "object": {"metadata": {"name": "p", "resourceVersion": version}}}).encode()


async def read_watch(client: ApiServer, timeout_s: float = 300) -> list[tuple[str, str]]:
    return [
        (e.type, e.object["metadata"]["resourceVersion"]) async for e in client.watch("pods", "5", timeout_s=timeout_s)
    ]


async def test_a_watch_yields_lines_however_they_are_cut(tmp_path: Path) -> None:
    async def play(request: Request) -> None:
        await request.stream()
        whole = event("ADDED", "6") + b"\n\n" + event("BOOKMARK", "7") + b"\n" + event("DELETED", "8") + b"\n"
        for start in range(0, len(whole), 11):
            await request.chunk(whole[start : start + 11])
        await request.chunk(b"")

    async with client_of(play, tmp_path) as (client, server):
        assert await read_watch(client) == [("ADDED", "6"), ("BOOKMARK", "7"), ("DELETED", "8")]
    assert server.asked[0].path == "/api/v1/pods?watch=1&resourceVersion=5&allowWatchBookmarks=true&timeoutSeconds=300"


def streams(*chunks: bytes, end: bool = True) -> Play:
    async def play(request: Request) -> None:
        await request.stream()
        for chunk in chunks:
            await request.chunk(chunk)
        if end:
            await request.chunk(b"")
        else:
            request.writer.close()

    return play


ERROR_410 = json.dumps({"type": "ERROR", "object": status("Expired", code=410)}).encode() + b"\n"


@pytest.mark.parametrize("play", [streams(ERROR_410), answers(410, status("Expired", code=410))])
async def test_an_aged_version_is_gone_as_event_and_as_status(play: Play, tmp_path: Path) -> None:
    async with client_of(play, tmp_path) as (client, _):
        with pytest.raises(Gone):
            await read_watch(client)


@pytest.mark.parametrize(
    ("play", "code"),
    [
        (streams(event("ADDED", "6")[:20], end=False), 503),
        (streams(b'{"type":"ERROR","object":{"code":500}}\n'), 500),
        (streams(b'{"type":"ERROR","object":{"code":"odd"}}\n'), 502),
        (streams(b"[]\n"), 502),
        (streams(b'{"type":"ADDED"}\n'), 502),
        (streams(b'{"type":"ADDED","object":{}}\n'), 502),
        (streams(b"x" * 700, b"y" * 700), 502),
        (answers(500, b"oops"), 500),
        (hang_up, 503),
    ],
)
async def test_a_broken_watch_is_refused(play: Play, code: int, tmp_path: Path) -> None:
    async with client_of(play, tmp_path, Limits(line_bytes=1000)) as (client, _):
        with pytest.raises(ApiError) as caught:
            await read_watch(client)
        assert caught.value.status == code


async def test_a_cut_last_line_is_no_event(tmp_path: Path) -> None:
    async with client_of(streams(event("ADDED", "6") + b"\n" + event("ADDED", "7")[:-5]), tmp_path) as (client, _):
        assert await read_watch(client) == [("ADDED", "6")]


async def test_a_half_open_watch_ends_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.kube.api.READ_GRACE_S", 0.2)

    async def play(request: Request) -> None:
        await request.stream()
        await request.chunk(event("ADDED", "6") + b"\n")
        await asyncio.Event().wait()

    async with client_of(play, tmp_path) as (client, _):
        stream = client.watch("pods", "5", timeout_s=0.1)
        assert (await anext(stream)).type == "ADDED"
        with pytest.raises(ApiError) as caught:
            await anext(stream)
        assert caught.value.status == 504


async def test_leaving_a_watch_closes_its_connection(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def play(request: Request) -> None:
        await request.stream()
        await request.chunk(event("ADDED", "6") + b"\n")
        await request.reader.read()
        left.set()

    async with client_of(play, tmp_path) as (client, _):
        stream = client.watch("pods", "5", timeout_s=300)
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(left.wait(), 5)


async def test_no_more_calls_than_the_pace_allows(tmp_path: Path) -> None:
    limits = Limits(qps=0.01, burst=2, bind_qps=0.01, bind_burst=1, read_s=1, write_s=1)
    async with client_of(answers(200, POD), tmp_path, limits) as (client, server):
        await client.get("nodes", "", "n")
        await client.patch("pods", "n", "p", {})
        with pytest.raises(ApiError) as caught:
            await client.get("nodes", "", "n")
        assert (caught.value.status, caught.value.reason) == (429, "OwnPace")
        assert 98 < caught.value.retry_after_s <= 100
        await client.bind("n", "p", {})
        assert len(server.asked) == 3


async def test_a_token_file_is_read_again(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    clock = _Hand()
    async with serving(answers(200, POD)) as server:
        kubeconfig = write_kubeconfig(tmp_path, server.url, {"tokenFile": str(token)})
        client = await connect(kubeconfig=kubeconfig, in_cluster=False, clock=clock)
        token.write_text("second")
        await client.get("nodes", "", "n")
        clock.now_s += 61
        await client.get("nodes", "", "n")
        token.unlink()
        clock.now_s += 61
        await client.get("nodes", "", "n")
        await client.close()
    sent = [request.headers["authorization"] for request in server.asked]
    assert sent == ["bearer first", "bearer second", "bearer second"]


async def test_unusable_credentials_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="service account"):
        await connect(kubeconfig=None, in_cluster=True)
    (tmp_path / "broken").write_text("clusters: [")
    (tmp_path / "empty").write_text("")
    for name in ("absent", "broken", "empty"):
        with pytest.raises(ConfigError, match=name):
            await connect(kubeconfig=str(tmp_path / name), in_cluster=False)


class _Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def wall_us(self) -> int:
        return 0

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def call_later(self, seconds: float, call: Any) -> asyncio.TimerHandle:
        raise NotImplementedError


async def test_https_where_plain_http_is_spoken_is_said_so(tmp_path: Path) -> None:
    async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as listening:
        url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        client = await connect(
            kubeconfig=write_kubeconfig(tmp_path, url, {"token": "t"}), in_cluster=False, limits=HASTY
        )
        with pytest.raises(ApiError) as caught:
            await client.get("nodes", "", "n")
        assert advice(caught.value).startswith("what answers there speaks no TLS: write http:// in the kubeconfig")
        await client.close()


async def test_http_where_https_is_spoken_is_said_so(tmp_path: Path) -> None:
    said = b"Client sent an HTTP request to an HTTPS server.\n"
    async with client_of(answers(400, said), tmp_path) as (client, _):
        with pytest.raises(ApiError) as caught:
            await client.get("nodes", "", "n")
        assert advice(caught.value).startswith("the API server speaks HTTPS: write https:// in the kubeconfig")


async def test_an_address_that_is_no_web_address_is_refused_at_once(tmp_path: Path) -> None:
    kubeconfig = write_kubeconfig(tmp_path, "ftp://127.0.0.1:6443", {"token": "t"})
    with pytest.raises(ConfigError, match=r"ftp://127.0.0.1:6443 must begin with https://"):
        await connect(kubeconfig=kubeconfig, in_cluster=False)


def test_the_client_library_is_imported_without_its_other_half() -> None:
    """What the package's `__init__` would import costs every start half a second."""
    story = (
        "import asyncio, sys; from scheduler.kube.api import connect; from scheduler.errors import ConfigError\n"
        "try: asyncio.run(connect(kubeconfig='/nowhere', in_cluster=False))\n"
        "except ConfigError: print(*sorted(sys.modules))\n"
    )
    loaded = subprocess.run([sys.executable, "-c", story], capture_output=True, check=True, text=True).stdout.split()
    assert "kubernetes.aio.config.kube_config" in loaded
    assert not {"kubernetes.client", "kubernetes.config", "kubernetes.dynamic", "requests", "urllib3"} & set(loaded)
