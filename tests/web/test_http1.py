"""kube-scheduler's port byte by byte, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import orjson
import pytest
import uvloop
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import TesseraError
from scheduler.web import http1
from scheduler.web.http1 import HEAD_MAX, HEADERS_MAX, PENDING_MAX, Connection, Listener, ListenerRunner, Reply, Route

BODY_MAX = 100_000
TEXT = "text/plain; charset=utf-8"
BUSY = "too busy"
GREET = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


class BusyError(TesseraError):
    code = "busy"


@dataclass
class Port:
    """A listener with answers of its own; `gate` holds back those that wait."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    heard: list[bytes] = field(default_factory=list)
    runner: ListenerRunner = field(init=False)
    listener: Listener = field(init=False)
    connections: list[Connection] = field(default_factory=list)
    number: int = 0

    def echo(self, body: bytes) -> Reply:
        self.heard.append(body)
        return 200, body

    async def wait(self, body: bytes) -> Reply:
        self.heard.append(body)
        await self.gate.wait()
        if body == b"fail":
            raise BusyError(BUSY)
        return 200, body

    def fail(self, body: bytes) -> Reply:
        if not body:
            raise ZeroDivisionError
        raise BusyError(BUSY)

    def huge(self, body: bytes) -> Reply:
        self.heard.append(body)
        return 200, b"x" * 4_000_000

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[Port, None]:
        routes = {
            "/echo": Route("POST", self.echo),
            "/wait": Route("POST", self.wait),
            "/fail": Route("POST", self.fail),
            "/huge": Route("POST", self.huge),
            "/healthz": Route("GET", lambda _: (200, b"ok"), TEXT),
        }
        self.runner = ListenerRunner(routes, BODY_MAX, shutdown_timeout=0.2)
        await self.runner.setup()
        self.listener = cast("Listener", self.runner.server)
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.number = self.runner.addresses[0][1]
        try:
            async with asyncio.timeout(20):
                yield self
        finally:
            await self.runner.cleanup()

    async def connected(self, sent: bytes = b"") -> tuple[Reader, Writer]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.number)
        writer.write(sent)
        return reader, writer

    async def told(self, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send on a connection of its own and return the first reply."""
        reader, writer = await self.connected(sent)
        try:
            return await reply(reader)
        finally:
            writer.close()


async def turn() -> None:
    await asyncio.sleep(0)


async def until(true: Callable[[], object]) -> None:
    while not true():
        await turn()


async def reply(reader: Reader, *, bare: bool = False) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    assert first.startswith("HTTP/1.1 "), "and nothing else before it"
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = b"" if bare else await reader.readexactly(int(headers.get("content-length", 0)))
    return int(first.split(" ")[1]), headers, body


def post(path: str, body: bytes = b"", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def test_a_reply_has_its_length_its_type_and_a_date_and_the_connection_stays() -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(post("/echo", b"one"))
        status, headers, body = await reply(reader)
        assert (status, body) == (200, b"one")
        assert headers["content-type"] == "application/json"
        assert headers["date"].endswith(" gmt")
        assert not {"connection", "transfer-encoding"} & set(headers)
        writer.write(b"GET /healthz?full=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, body = await reply(reader)
        assert (status, body, headers["content-type"]) == (200, b"ok", TEXT)
        writer.close()


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404, "http.404"),
        (b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n", 405, "http.405"),
        (b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""),
        (post("/healthz"), 405, "http.405"),
        (post("/echo", b"x", "Content-Encoding: gzip\r\n"), 415, "body.encoded"),
        (post("/echo", b"x", "Content-Encoding: Identity\r\n"), 200, ""),
        (post("/fail"), 500, "internal"),
        (post("/fail", b"x"), 503, "busy"),
        (post("/echo", b"x" * BODY_MAX), 200, ""),
    ],
)
async def test_a_whole_request_is_answered_and_the_connection_goes_on(sent: bytes, status: int, code: str) -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(sent)
        answered, headers, body = await reply(reader, bare=sent.startswith(b"HEAD"))
        assert answered == status
        if code:
            assert headers["content-type"] == "application/problem+json"
            assert orjson.loads(body)["code"] == code
            assert orjson.loads(body)["detail"]
        if status == 405:
            assert headers["allow"] in {"post", "get"}
        writer.write(post("/echo", b"again"))
        assert (await reply(reader))[::2] == (200, b"again")
        writer.close()


REFUSED = {
    "not HTTP": (b"hello\r\n\r\n", 400),
    "another version": (b"POST /echo HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "a tunnel": (b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "an upgrade": (post("/echo", b"x", "Connection: Upgrade\r\nUpgrade: h2c\r\n"), 400),
    "two lengths": (GREET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "length and chunks": (GREET + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a negative length": (GREET + b"Content-Length: -1\r\n\r\n", 400),
    "an endless length": (GREET + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    "a bad chunk": (GREET + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "a long target": (b"POST /" + b"a" * HEAD_MAX + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "a long header": (GREET + b"X: " + b"a" * HEAD_MAX + b"\r\n\r\n", 431),
    "a header without end": (GREET + b"X: " + b"a" * 20 * HEAD_MAX, 431),
    "many headers": (GREET + b"X: y\r\n" * HEADERS_MAX + b"\r\n", 431),
    "a large body told": (GREET + b"Content-Length: %d\r\n\r\n{" % (BODY_MAX + 1), 413),
    "a large body sent": (
        GREET + b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 8,
        413,
    ),
    "a body of tiny chunks": (GREET + b"Transfer-Encoding: chunked\r\n\r\n" + b"1;" + b"e" * 9 * BODY_MAX, 413),
    "an encoded body to come": (GREET + b"Content-Encoding: br\r\nContent-Length: 9\r\n\r\n", 415),
    "another expectation": (GREET + b"Expect: wonders\r\nContent-Length: 9\r\n\r\n", 417),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_no_request_is_refused_once_and_the_connection_ends(case: str) -> None:
    sent, status = REFUSED[case]
    async with Port().listening() as port:
        reader, writer = await port.connected(sent)
        answered, headers, body = await reply(reader)
        assert answered == status
        assert orjson.loads(body)["status"] == status
        if not (status == 431 and sent.endswith(b"\r\n\r\n")):  # a head that is whole costs no connection
            assert headers["connection"] == "close"
            assert await reader.read() == b""
        writer.close()
        assert port.heard == []
        assert (await port.told(post("/echo", b"next")))[::2] == (200, b"next")


async def test_a_client_that_is_refused_may_finish_and_still_hears_why() -> None:
    async with Port().listening() as port:
        sent = GREET + b"Content-Length: 60000000\r\n\r\n"
        reader, writer = await port.connected(sent)
        for _ in range(60):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
        assert (await reply(reader))[0] == 413
        assert await reader.read() == b""
        writer.close()


async def test_a_refused_client_that_does_not_go_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "LINGER_S", 0.05)
    monkeypatch.setattr("scheduler.web.patience._SWEEP_S", 0.02)
    async with Port().listening() as port:
        _, writer = await port.connected(b"junk\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(b"x" * 1000)
                await writer.drain()
        await until(lambda: not (port.listener.members()))


async def test_an_idle_connection_ends_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "IDLE_S", 0.05)
    monkeypatch.setattr("scheduler.web.patience._SWEEP_S", 0.02)
    async with Port().listening() as port:
        reader, writer = await port.connected(post("/echo", b"x"))
        assert (await reply(reader))[0] == 200
        assert await reader.read() == b""
        writer.close()


async def test_requests_in_line_are_answered_in_order_one_at_a_time() -> None:
    async with Port().listening() as port:
        many = b"".join(post("/echo", b"%d" % number) for number in range(200))
        reader, writer = await port.connected(post("/wait", b"first") + many)
        await until(lambda: port.heard)
        other = await port.told(post("/echo", b"other"))
        assert other[2] == b"other"
        assert port.heard == [b"first", b"other"]
        port.gate.set()
        assert [(await reply(reader))[2] for _ in range(201)] == [b"first", *(b"%d" % number for number in range(200))]
        writer.close()


async def test_others_have_a_turn_between_two_requests_of_one_read() -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(post("/echo", b"a") * 100)
        turns = 0
        while len(port.heard) < 100:
            before = len(port.heard)
            await asyncio.sleep(0)
            turns += before < len(port.heard)
        assert turns > 50
        for _ in range(100):
            await reply(reader)
        writer.close()


async def test_no_more_is_read_of_a_client_with_many_requests_in_line() -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(post("/wait", b"first"))
        sent = post("/echo", b"x" * 10_000) * 2000
        writer.write(sent)
        await until(lambda: any(one._full for one in port.listener.members()))
        connection = port.listener.members()[0]
        transport = connection._transport
        assert transport is not None
        assert not transport.is_reading()
        assert PENDING_MAX < len(connection._calls) < 200
        port.gate.set()
        assert (await reply(reader))[2] == b"first"
        for _ in range(2000):
            assert len((await reply(reader))[2]) == 10_000
        writer.close()


async def test_nothing_more_is_answered_to_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(post("/huge") * 20)
        await until(lambda: any(one._stalled_s for one in port.listener.members()))
        for _ in range(100):
            await turn()
        assert 1 <= len(port.heard) < 20
        for _ in range(20):
            assert len((await reply(reader))[2]) == 4_000_000
        monkeypatch.setattr(http1, "STALLED_S", 0.05)
        writer.write(post("/huge") * 20)
        await until(lambda: port.listener.members()[0]._stalled_s is not None)
        port.listener.members()[0].tick(asyncio.get_running_loop().time() + 1)
        await until(lambda: not (port.listener.members()))
        writer.close()


async def test_a_body_may_come_in_chunks_and_late() -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(GREET + b"Expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"3\r\nabc\r\n4;x=y\r\ndefg\r\n")
        writer.write(b"0\r\nTrailer: z\r\n\r\n" + post("/echo", b"next"))
        assert (await reply(reader))[2] == b"abcdefg"
        assert (await reply(reader))[2] == b"next"
        writer.close()


async def test_a_client_waits_for_leave_no_longer_than_for_the_reply_before() -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(post("/wait", b"first"))
        writer.write(GREET + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        await until(lambda: port.heard)
        port.gate.set()
        assert (await reply(reader))[2] == b"first"
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ab")
        assert (await reply(reader))[2] == b"ab"
        writer.close()


async def test_an_old_client_is_served_in_its_own_way() -> None:
    async with Port().listening() as port:
        reader, writer = await port.connected(b"GET /healthz HTTP/1.0\r\n\r\n")
        _, headers, body = await reply(reader)
        assert (headers["connection"], body) == ("close", b"ok")
        assert await reader.read() == b""
        writer.close()
        reader, writer = await port.connected(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert (await reply(reader))[1]["connection"] == "keep-alive"
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reply(reader))[1]["connection"] == "close"
        assert await reader.read() == b""
        writer.close()


async def test_a_failure_later_on_is_a_problem_too() -> None:
    async with Port().listening() as port:
        port.gate.set()
        status, _, body = await port.told(post("/wait", b"fail"))
        assert (status, orjson.loads(body)["code"]) == (503, "busy")


async def test_at_the_end_what_is_under_way_is_answered_and_the_rest_closed() -> None:
    port = Port()
    async with port.listening():
        reader, writer = await port.connected(post("/wait", b"last") + post("/echo", b"too late"))
        idle, still = await port.connected(post("/echo", b"x"))
        await reply(idle)
        await until(lambda: len(port.heard) == 2)
        ending = asyncio.ensure_future(port.runner.cleanup())
        assert await idle.read() == b""
        port.gate.set()
        _, headers, body = await reply(reader)
        assert (headers["connection"], body) == ("close", b"last")
        assert await reader.read() == b""
        await ending
        assert sorted(port.heard) == [b"last", b"x"]
        writer.close()
        still.close()


async def test_the_end_waits_only_so_long() -> None:
    port = Port()
    async with port.listening():
        reader, writer = await port.connected(post("/wait", b"never"))
        await until(lambda: port.heard)
        await port.runner.cleanup()
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_goes_away_stops_nothing() -> None:
    async with Port().listening() as port:
        _, writer = await port.connected(post("/wait", b"gone") + post("/echo", b"unheard"))
        await until(lambda: port.heard)
        (connection,), task = port.listener.members(), port.listener.members()[0].task
        writer.transport.abort()
        await until(lambda: not (port.listener.members()))
        port.gate.set()
        assert task is not None
        await task
        assert port.heard == [b"gone"]
        assert connection.task is None


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_replies_leave_at_once(loop: object) -> None:
    async def story() -> None:
        async with Port().listening() as port:
            await port.told(post("/echo", b"x"))
            reader, writer = await port.connected(post("/echo", b"x"))
            await reply(reader)
            transport = port.listener.members()[0]._transport
            assert transport is not None
            sock = transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]  # one of the two above
        runner.run(story())


class Wire(asyncio.Transport):
    """Takes what is written, one entry per write."""

    def __init__(self, writes: list[bytes] | None = None) -> None:
        super().__init__()
        self.writes: list[bytes] = [] if writes is None else writes
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("client", 1) if name == "peername" else default

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


async def test_what_comes_after_a_reply_comes_before_everything_else() -> None:
    told: list[bytes] = []

    def answer(body: bytes) -> Reply:
        told.append(b"answer " + body)
        return 200, body

    def after() -> None:
        told.append(b"after")

    connection = Listener({"/echo": Route("POST", answer, after=after)}, 100)()
    connection.connection_made(Wire(told))
    connection.data_received(post("/echo", b"1") + post("/echo", b"2"))
    await settled(connection)
    assert [one.split()[0] for one in told] == [b"answer", b"HTTP/1.1", b"after"] * 2
    connection.connection_lost(None)


async def settled(connection: Connection) -> None:
    await until(lambda: connection._due is None and connection.task is None)


async def _both(pieces: list[bytes], gate: asyncio.Event) -> list[bytes]:
    port, wire = Port(gate), Wire()
    routes = {"/echo": Route("POST", port.echo), "/wait": Route("POST", port.wait)}
    listener = Listener(routes, 1000)
    connection = listener()
    connection.connection_made(wire)
    for piece in pieces:
        connection.data_received(piece)
        await settled(connection)
    connection.connection_lost(None)
    return [one.split(b"\r\n", 1)[0] + one.partition(b"\r\n\r\n")[2] for one in wire.writes]


BODIES = st.lists(st.tuples(st.sampled_from(["/echo", "/wait"]), st.binary(max_size=40)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(calls=BODIES, cuts=st.lists(st.integers(0, 1000), max_size=20), junk=st.binary(max_size=30))
def test_it_does_not_matter_where_the_bytes_are_cut(
    calls: list[tuple[str, bytes]], cuts: list[int], junk: bytes
) -> None:
    stream = b"".join(post(path, body) for path, body in calls)
    points = sorted({min(cut, len(stream)) for cut in cuts})
    pieces = [stream[start:end] for start, end in zip([0, *points], [*points, len(stream)], strict=True) if start < end]

    async def story() -> None:
        gate = asyncio.Event()
        gate.set()
        replies = await _both([*pieces, junk or b"\0"], gate)
        whole = replies[: len(calls)]
        assert whole == [b"HTTP/1.1 200 OK" + body for _, body in calls]
        assert len(replies) <= len(calls) + 1

    asyncio.run(story())
