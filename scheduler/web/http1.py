"""HTTP/1.1 for kube-scheduler's port: whole requests in, one write per reply, and little in between.

llhttp (httptools) reads; what is here decides how much, for how long and in which order. Invariant: replies leave in
the order of their requests, each whole and with its length; a bad or slow client costs its own connection at most.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from typing import TypeAlias, cast

import httptools
import structlog
from aiohttp import web

from scheduler.errors import TesseraError

from . import patience
from .patience import Crowd
from .problems import document

log = structlog.get_logger(__name__)

Reply: TypeAlias = tuple[int, bytes]
Answer: TypeAlias = Callable[[bytes], Reply | Awaitable[Reply]]

HEAD_MAX = 32 * 1024  # bytes of a request's line and headers
HEADERS_MAX = 128
PENDING_MAX = 16  # whole requests in line, beside what came in the same read
LINGER_S = 10.0  # a client that was refused may go on sending for so long, that it may hear why
IDLE_S = 3630.0  # longer than clients keep a connection that they do not use
STALLED_S = 15.0  # for a client to go on reading
_DIGITS_MAX = 12  # of a length that is worth reading


@dataclass(frozen=True, slots=True)
class Route:
    """One path: its method, who answers, the type of the answers, and what is done as soon as one is written."""

    method: str
    answer: Answer
    kind: str = "application/json"
    after: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class _Said:
    """What a reply says: status, body, type, and header lines of its own."""

    status: int
    body: bytes
    kind: str = "application/problem+json"
    more: str = ""


@dataclass(slots=True)
class _Call:
    """One request that is whole, or refused.

    `keep`: the connection goes on; `old`: HTTP/1.0; `bare`: HEAD, whose reply has no body.
    """

    route: Route | None
    body: bytes
    refusal: _Said | None
    keep: bool
    old: bool
    bare: bool


class _Reading(Enum):
    """What a connection reads, which bounds the time it has."""

    HEAD, BODY, NOTHING, TO_THE_END = range(4)


@lru_cache(64)  # thousands of requests of one read may be refused
def _refused(status: int, detail: str = "", *, code: str = "", more: str = "") -> _Said:
    code = code or f"http.{status}"
    return _Said(status, document(status, code, detail or HTTPStatus(status).phrase), more=more)


_TOO_LONG = _refused(431, f"the line and headers of a request may have {HEAD_MAX} bytes and {HEADERS_MAX} headers")


class Listener(Crowd["Connection"]):
    """Makes the connections of one port and ends them; stands where runners of aiohttp have their server."""

    def __init__(self, routes: Mapping[str, Route], body_max: int) -> None:
        """Note what is served.

        Args:
            routes: by path.
            body_max: most bytes of a request's body.
        """
        super().__init__()
        self.routes, self.body_max = routes, body_max
        self.too_large = _refused(413, f"the body is larger than {body_max} bytes", code="body.too_large")
        self._loop = asyncio.get_running_loop()
        self._heads: dict[tuple[int, str], str] = {}
        self._date, self._second = "", -1

    def __call__(self) -> Connection:
        """Return the protocol of a new connection."""
        return Connection(self)

    def head(self, status: int, kind: str) -> str:
        """Return the lines that begin a reply, up to where the length stands."""
        known = self._heads.get((status, kind))
        if known is None:
            known = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\nDate: "
            self._heads[status, kind] = known
        second = int(self._loop.time())
        if second != self._second:
            self._second, self._date = second, formatdate(usegmt=True)
        return f"{known}{self._date}\r\nContent-Length: "

    def pre_shutdown(self) -> None:
        """Close the connections that are owed nothing; the others close after their reply."""
        for connection in self.members():
            connection.retire()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as aiohttp calls it
        """Wait for replies under way, and end what is there after that."""
        if busy := [one.task for one in self.members() if one.task is not None]:
            await asyncio.wait(busy, timeout=timeout)
        for connection in self.members():
            connection.abort()


class ListenerRunner(web.BaseRunner):
    """A `Listener` for the sites of aiohttp, which open its port."""

    def __init__(self, routes: Mapping[str, Route], body_max: int, *, shutdown_timeout: float = 60.0) -> None:
        """Note what is served, and for how long replies under way are waited for at the end."""
        super().__init__(shutdown_timeout=shutdown_timeout)
        self._served = routes, body_max

    async def shutdown(self) -> None:
        """Nothing more to close."""

    async def _make_server(self) -> web.Server:
        return cast("web.Server", Listener(*self._served))

    async def _cleanup_server(self) -> None:
        """Nothing to forget."""


class Connection(asyncio.Protocol):
    """One client: what it sends becomes calls, which are answered one after the other."""

    def __init__(self, listener: Listener) -> None:
        """Note to whom it belongs."""
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._calls: deque[_Call] = deque()
        self.task: asyncio.Task[None] | None = None  # an answer that has to wait for something
        self._due: asyncio.Handle | None = None  # the next answer
        self._reading, self._since_s = _Reading.HEAD, self._loop.time()
        self._stalled_s: float | None = None  # since when the client does not read
        self._full = self._retired = False
        self._open = self._known = self._headed = self._expects = self._old = self._bare = False
        self._size = self._spent = self._headers = 0
        self._target = b""
        self._parts: list[bytes] = []
        self._route: Route | None = None
        self._refusal: _Said | None = None

    # the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in, or close it at once."""
        peer = transport.get_extra_info("peername")
        self._transport = cast("asyncio.Transport", transport)
        self._address = str(peer[0]) if peer else ""
        if not self._listener.enter(self, self._address):
            self._transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        """Give the place back; an answer under way is made all the same, and nobody hears it."""
        self._listener.leave(self, self._address)
        self._transport = None
        self._calls.clear()

    def data_received(self, data: bytes) -> None:
        """Read, and answer what is whole."""
        if self._reading is _Reading.TO_THE_END:
            return
        ends = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            ends = True  # its refusal is in line
        except httptools.HttpParserError as error:
            self._open, self._refusal = True, _refused(400, f"this is not HTTP/1.1: {error}")
        if self._open:
            self._spent += len(data) * self._known  # a read with the end of another request is not counted
            self._known = True
            if self._spent > HEAD_MAX + (2 * self._listener.body_max if self._headed else 0):
                self._refusal = self._refusal or (self._listener.too_large if self._headed else _TOO_LONG)
            if self._refusal is not None:  # what is missing is not waited for
                self._take(keep=False)
                ends = True
        self._read(self._now_reading(ends=ends))
        if self._transport is not None and len(self._calls) > PENDING_MAX and not self._full:
            self._full = True
            self._transport.pause_reading()
        if self.task is None and self._due is None:
            self._next()

    def pause_writing(self) -> None:
        """Answer nothing more until the client has read."""
        self._stalled_s = self._loop.time()

    def resume_writing(self) -> None:
        """Go on."""
        self._stalled_s = None
        self._go_on()

    def tick(self, now_s: float) -> None:
        """End what takes too long."""
        if self._stalled_s is not None and now_s - self._stalled_s > STALLED_S:
            self.abort()
        limits = {_Reading.HEAD: patience.HEADERS_S, _Reading.BODY: patience.BODY_S, _Reading.NOTHING: IDLE_S}
        if now_s - self._since_s <= limits.get(self._reading, LINGER_S) or self._full:
            return
        if self._reading is _Reading.BODY:
            self._refusal = _refused(408, "the body did not come in time")
            self._take(keep=False)
            self._read(_Reading.TO_THE_END)
            self._go_on()
        elif self._reading is not _Reading.NOTHING:
            self.abort()
        elif self.task is None:
            self.retire()

    def retire(self) -> None:
        """Close once nothing is owed."""
        self._retired = True
        if self._transport is not None and self.task is None and not self._calls:
            self._transport.close()

    def abort(self) -> None:
        """Close without a word, and give up an answer under way."""
        if self.task is not None:
            self.task.cancel()
        if self._transport is not None:
            self._transport.abort()

    # one request, as the parser finds it

    def on_message_begin(self) -> None:
        """Begin anew."""
        self._open, self._known, self._headed, self._expects = True, False, False, False
        self._target = b""
        self._parts = []
        self._size = self._spent = self._headers = 0
        self._route = self._refusal = None
        self._old = self._bare = False

    def on_url(self, part: bytes) -> None:
        """Take a part of the target."""
        self._size += len(part)
        if self._size <= HEAD_MAX:
            self._target += part
        else:
            self._refusal = _TOO_LONG

    def on_header(self, name: bytes, value: bytes) -> None:
        """Look at the few headers that matter."""
        self._headers += 1
        self._size += len(name) + len(value)
        if self._headers > HEADERS_MAX or (self._size > HEAD_MAX and not self._headed):
            self._refusal = _TOO_LONG
        key, value = name.lower(), value.strip().lower()
        if key == b"content-encoding" and value != b"identity":
            self._refusal = _refused(415, "send the body without Content-Encoding", code="body.encoded")
        elif key == b"expect":
            self._expects = value == b"100-continue"
            if not self._expects:
                self._refusal = _refused(417, "nothing but 100-continue can be expected")
        elif key == b"content-length" and (len(value) > _DIGITS_MAX or int(value) > self._listener.body_max):
            self._refusal = self._listener.too_large

    def on_headers_complete(self) -> None:
        """Find out who answers; nobody has to wait for the body of a request that is refused."""
        self._headed, self._size = True, 0
        version, method = self._parser.get_http_version(), self._parser.get_method().decode()
        self._old, self._bare = version == "1.0", method == "HEAD"
        self._route = route = self._listener.routes.get(self._target.partition(b"?")[0].decode("latin-1"))
        if self._refusal is not None:
            return
        if version not in {"1.0", "1.1"}:
            self._refusal = _refused(505, "this port speaks HTTP/1.1")
        elif self._parser.should_upgrade():
            self._refusal = _refused(400, "this port speaks HTTP/1.1 and nothing else")
        elif route is None:
            self._refusal = _refused(404)
        elif route.method != ("GET" if self._bare else method):
            self._refusal = _refused(405, more=f"Allow: {route.method}\r\n")

    def on_body(self, part: bytes) -> None:
        """Keep a part of the body, within its limit."""
        self._size += len(part)
        if self._size > self._listener.body_max:
            self._refusal = self._refusal or self._listener.too_large
        if self._refusal is None:
            self._parts.append(part)
        else:
            self._parts.clear()

    def on_message_complete(self) -> None:
        """Put the request in line."""
        self._take(keep=self._parser.should_keep_alive() and not self._parser.should_upgrade())
        self._open = False

    def _take(self, *, keep: bool) -> None:
        parts, self._parts = self._parts, []
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._calls.append(_Call(self._route, body, self._refusal, keep, self._old, self._bare))
        self._refusal = None

    def _now_reading(self, *, ends: bool) -> _Reading:
        if ends:
            return _Reading.TO_THE_END
        if not self._open:
            return _Reading.NOTHING
        return _Reading.BODY if self._headed else _Reading.HEAD

    def _read(self, what: _Reading) -> None:
        """Take note of what is read from now on; what is under way keeps its time."""
        if what is _Reading.NOTHING or what is not self._reading:
            self._reading, self._since_s = what, self._loop.time()

    # replies

    def _go_on(self) -> None:
        """Let the others have a turn, then answer the next."""
        if self.task is None and self._due is None:
            self._due = self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Answer the request whose turn it is."""
        self._due = None
        transport = self._transport
        if transport is None or self._stalled_s is not None or self.task is not None:
            return
        if self._full and len(self._calls) <= PENDING_MAX:
            self._full, self._since_s = False, self._loop.time()
            transport.resume_reading()
        if not self._calls:
            if self._expects and self._reading is _Reading.BODY:
                self._expects = False
                transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        call = self._calls.popleft()
        if call.refusal is not None or call.route is None:
            self._say(call, call.refusal or _refused(404))
            return
        self._answer(call, call.route)

    def _answer(self, call: _Call, route: Route) -> None:
        try:
            reply = route.answer(call.body)
            if isinstance(reply, tuple):
                said = _Said(*reply, route.kind)
            else:
                self.task = self._loop.create_task(self._finish(call, route, reply))
                return
        except Exception as error:  # noqa: BLE001 - one bad request never ends the process
            said = _failed(error, route)
        try:
            self._say(call, said)
        finally:
            if route.after is not None:
                _follow(route.after)

    async def _finish(self, call: _Call, route: Route, reply: Awaitable[Reply]) -> None:
        try:
            said = _Said(*await reply, route.kind)
        except Exception as error:  # noqa: BLE001 - as above
            said = _failed(error, route)
        finally:
            self.task = None
        self._say(call, said)

    def _say(self, call: _Call, said: _Said) -> None:
        """Write one reply, and close after it or go on."""
        transport = self._transport
        if transport is None:
            return
        keep = call.keep and not self._retired
        last = "" if keep and not call.old else f"Connection: {'keep-alive' if keep else 'close'}\r\n"
        head = f"{self._listener.head(said.status, said.kind)}{len(said.body)}\r\n{said.more}{last}\r\n".encode()
        transport.write(head if call.bare else head + said.body)
        if keep:
            if self._calls or self._expects:
                self._go_on()
        elif self._reading is _Reading.TO_THE_END:  # to close now would take the reply back: more may be on its way
            self._calls.clear()
            self._since_s = self._loop.time()
            if transport.can_write_eof():
                transport.write_eof()
        else:
            self._calls.clear()
            self._read(_Reading.TO_THE_END)
            transport.close()


def _follow(after: Callable[[], None]) -> None:
    """Do what follows a reply; the reply is gone, so a failure is for the log, and the connection goes on."""
    try:
        after()
    except Exception:
        log.exception("http.failed_after", after=getattr(after, "__name__", ""))


def _failed(error: Exception, route: Route) -> _Said:
    if isinstance(error, TesseraError):
        return _refused(503, str(error), code=error.code)
    log.error("http.failed", answer=getattr(route.answer, "__name__", ""), exc_info=error)
    return _refused(500, "something went wrong inside Tessera; its log has the details", code="internal")
