"""Who may keep a listener waiting, and for how long: slow headers, slow bodies, too many connections from one address.

Invariant: a client that sends nothing, or a byte now and then, costs a connection of its own address for a bounded
time; it never costs a call of another client.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, cast

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

log = structlog.get_logger(__name__)

HEADERS_S = 10.0
BODY_S = 15.0
PER_ADDRESS = 256
_SWEEP_S = 1.0


class Guest(Protocol):
    """One connection that a `Crowd` counts."""

    def tick(self, now_s: float) -> None:
        """End what takes too long; called about once a second."""


Member = TypeVar("Member", bound=Guest)


class Crowd(Generic[Member]):
    """The connections of one listener: counts them by address and has them look at the clock."""

    def __init__(self) -> None:
        """Start empty; nothing runs before the first of them."""
        self._counts: Counter[str] = Counter()
        self._there: set[Member] = set()

    def enter(self, connection: Member, address: str) -> bool:
        """Count a connection; False when its address has as many as it may."""
        if self._counts[address] >= PER_ADDRESS:
            log.warning("http.too_many_connections", address=address)
            return False
        if not self._there:
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        self._counts[address] += 1
        self._there.add(connection)
        return True

    def leave(self, connection: Member, address: str) -> None:
        """Forget a connection that was counted."""
        if connection in self._there:
            self._there.discard(connection)
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def members(self) -> list[Member]:
        """Return the connections that are open."""
        return list(self._there)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in self.members():
            connection.tick(loop.time())
        if self._there:
            loop.call_later(_SWEEP_S, self._sweep)


class Guard(Crowd["Patient"]):
    """Makes the connections of a listener of aiohttp, and ends those that only keep it waiting."""

    def __init__(self, within: Callable[[], asyncio.BaseProtocol]) -> None:
        """Note what makes the connections' own protocol."""
        super().__init__()
        self._within = within

    def __call__(self) -> Patient:
        """Return the protocol of a new connection."""
        return Patient(self, cast("asyncio.Protocol", self._within()))


class Patient(asyncio.Protocol):
    """One connection: hands everything on, and knows since when it has been waiting for the rest of a header."""

    def __init__(self, guard: Guard, within: asyncio.Protocol) -> None:
        """Note to whom it belongs and who speaks HTTP."""
        self._guard, self._within = guard, within
        self._loop = asyncio.get_running_loop()
        self._address = ""
        self._transport: asyncio.Transport | None = None
        self._since_s: float | None = None
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in, or close it at once."""
        peer = transport.get_extra_info("peername")
        self._transport = cast("asyncio.Transport", transport)
        self._address = str(peer[0]) if peer else ""
        self._since_s = self._loop.time()
        self._within.connection_made(transport)
        if not self._guard.enter(self, self._address):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._guard.leave(self, self._address)
        self._within.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand on; the first bytes after an answer begin the next header."""
        if self._since_s is None and not self._busy:
            self._since_s = self._loop.time()
        self._within.data_received(data)

    def eof_received(self) -> bool | None:
        """Hand on."""
        return self._within.eof_received()

    def pause_writing(self) -> None:
        """Hand on."""
        self._within.pause_writing()

    def resume_writing(self) -> None:
        """Hand on."""
        self._within.resume_writing()

    def begun(self) -> None:
        """Take note that a whole header is there."""
        self._busy, self._since_s = True, None

    def ended(self) -> None:
        """Take note that its answer is made."""
        self._busy = False

    def tick(self, now_s: float) -> None:
        """Close without a word when a header has been under way for too long."""
        late = self._since_s is not None and now_s - self._since_s > HEADERS_S
        if late and self._transport is not None:
            self._transport.abort()


class GuardedRunner(web.AppRunner):
    """An aiohttp runner whose sites get guarded connections."""

    @property
    def server(self) -> Guard | None:  # type: ignore[override]  # sites only call it
        """What makes the connections; None before `setup`."""
        within = super().server
        return None if within is None else Guard(within)


@web.middleware
async def patience(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell the connection that its header is complete, and when its answer is made."""
    connection = request.transport.get_protocol() if request.transport is not None else None
    if not isinstance(connection, Patient):
        return await handler(request)
    connection.begun()
    try:
        return await handler(request)
    finally:
        connection.ended()


async def body_of(request: web.Request, *, within_s: float | None = None) -> bytes:
    """Return the whole body; it must come in `BODY_S` where no other time is named.

    Raises:
        HTTPRequestTimeout: it did not come in time.
        HTTPRequestEntityTooLarge: it is larger than the application takes.
    """
    if request.content.is_eof():
        return await request.read()
    try:
        async with asyncio.timeout(BODY_S if within_s is None else within_s):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason="the body did not come in time") from None
