"""The agent's one connection to Tessera: the present first, then what was kept while nobody listened.

Invariant: each report has a boot id and a sequence number that no other report of this machine has, and one that was
not acknowledged is sent again or kept, so that the last one always arrives. Nothing here waits for Tessera but this
stream: looking, health and `/metrics` go on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

import aiohttp

from nodeagent.messages import (
    ACK,
    DELTA,
    FULL,
    HELLO,
    PAST,
    PATH,
    REFUSED,
    WANTED,
    WELCOME,
    Hello,
    Place,
    delta,
    take,
    write,
)
from nodeagent.report import BadReport, Report, encode
from nodeagent.spool import Spool

ANSWER_S = 10.0
HUNG_S = 90.0
"""Tessera answers every report, and one comes at least once a minute: who says nothing for so long is not there."""

BEAT_S = 20.0
BACK_OFF_S, BACK_OFF_MAX_S = 1.0, 60.0
STEADY_S = 30.0  # a connection that held so long starts the back-off anew
UNANSWERED_MAX = 64
_FRAME_MAX = 1 << 16
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class LineError(Exception):
    """The connection cannot be made, or ended; the sentence says why."""


class Line(Protocol):
    """One connection."""

    async def send(self, frame: bytes) -> None:
        """Send a message. Raises LineError."""
        ...

    async def receive(self) -> bytes:
        """Return the next message. Raises LineError when none comes any more."""
        ...

    async def close(self) -> None:
        """Hang up."""
        ...


Connect: TypeAlias = Callable[[], Awaitable[Line]]
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A report that waits for its answer."""

    report: Report
    body: bytes


class Stream:
    """Carries the reports of one machine to Tessera, in order. One event loop calls all of it."""

    def __init__(self, connect: Connect, *, spool: Spool | None, rng: Random, say: Say) -> None:
        """Connect to nobody yet.

        Args:
            connect: makes a connection; raises LineError.
            spool: keeps what cannot be sent; None = it is lost.
            rng: spreads the tries of many agents.
            say: takes a sentence for people.
        """
        self._connect, self._spool, self._rng, self._say = connect, spool, rng, say
        self._boot, self._shift = "", 0
        self._news: _Sent | None = None  # not sent yet
        self._last: _Sent | None = None  # given last, sent or not
        self._unanswered: dict[tuple[str, int], _Sent] = {}
        self._past: tuple[str, int] | None = None  # of the spool, sent and not answered
        self._base: bytes | None = None  # what the next delta is made against
        self._connected = False
        self._bell = asyncio.Event()
        self._said = ""

    def publish(self, report: Report) -> None:
        """Take the next report.

        The agent counts from 1 when it starts; here it counts on from the time at which it did, in milliseconds.
        """
        if report.boot != self._boot:
            self._boot, self._shift = report.boot, report.at_us // 1000 - report.seq
        report = replace(report, seq=report.seq + self._shift)
        if self._news is not None:
            self._keep(self._news)
        self._news = self._last = _Sent(report, encode(report))
        if not self._connected:
            self._keep_news()
        self._bell.set()

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        failures = 0
        while True:
            began_s = asyncio.get_running_loop().time()
            try:
                await self._once()
            except (LineError, BadReport, TimeoutError) as error:
                self._complain(str(error) or "Tessera did not answer in time")
            self._settle()
            failures = 0 if asyncio.get_running_loop().time() - began_s >= STEADY_S else failures + 1
            longest = min(BACK_OFF_MAX_S, BACK_OFF_S * 2 ** min(failures, 16))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(longest * self._rng.uniform(0.5, 1.0)):
                    await asyncio.Event().wait()

    def close(self) -> None:
        """Keep what was not acknowledged."""
        self._settle()
        if self._spool is not None:
            self._spool.close()

    async def _once(self) -> None:
        """Use one connection until it ends. Raises LineError, BadReport or TimeoutError."""
        while self._last is None:
            self._bell.clear()
            await self._bell.wait()
        async with asyncio.timeout(2 * ANSWER_S):
            line = await self._connect()
        try:
            await self._greet(line)
            self._connected = True
            self._complain("")
            ways = [asyncio.ensure_future(work) for work in (self._send(line), self._listen(line))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                ended = await asyncio.gather(*ways, return_exceptions=True)
            for error in ended:
                if isinstance(error, Exception):
                    raise error
        finally:
            self._connected = False
            await line.close()

    async def _greet(self, line: Line) -> None:
        """Say who speaks, and count on from what Tessera has seen."""
        assert self._last is not None
        report = self._last.report
        await line.send(write(HELLO, Hello(report.node, report.boot, report.agent)))
        async with asyncio.timeout(ANSWER_S):
            frame = await line.receive()
        if frame[:1] != WELCOME:
            raise LineError(_refusal(frame))
        known = take(Place, frame[1:])
        now = self._last.report  # another may have come meanwhile
        if known.boot == now.boot and known.seq > now.seq:  # the clock was set back before this agent started
            self._shift += known.seq + 1 - now.seq
            now = replace(now, seq=known.seq + 1)
        self._base = None
        self._news = self._last = _Sent(now, encode(now))

    async def _send(self, line: Line) -> None:
        """Send the newest report whenever there is one, else one of the past when none is under way."""
        while True:
            self._bell.clear()
            news, self._news = self._news, None
            if news is not None:
                if len(self._unanswered) >= UNANSWERED_MAX:
                    self._keep(news)
                    raise LineError("Tessera does not answer reports")
                self._unanswered[news.report.boot, news.report.seq] = news
                await line.send(self._frame(news.body))
            elif (past := self._next_past()) is not None:
                await line.send(PAST + past)
            else:
                await self._bell.wait()

    def _frame(self, body: bytes) -> bytes:
        """Return a report as what changed since the one before, where that is shorter."""
        base, self._base = self._base, body
        if base is not None and len(change := delta(base, body)) < len(body):
            return DELTA + change
        return FULL + body

    def _next_past(self) -> bytes | None:
        if self._spool is None or self._past is not None:
            return None
        while (body := self._spool.peek()) is not None:
            try:
                place = take(Place, body)
            except BadReport:  # of another version, or no report: nobody would take it
                self._spool.done()
                continue
            self._past = place.boot, place.seq
            return body
        return None

    async def _listen(self, line: Line) -> None:
        """Take Tessera's answers."""
        while True:
            async with asyncio.timeout(HUNG_S):
                frame = await line.receive()
            kind = frame[:1]
            if kind == WANTED:
                self._base = None
                if self._news is None:
                    self._news = self._last
            elif kind in {ACK, REFUSED}:
                place = take(Place, frame[1:])
                key = place.boot, place.seq
                self._unanswered.pop(key, None)
                if self._past == key and self._spool is not None:
                    self._spool.done()
                    self._past = None
                if kind == REFUSED:
                    self._base = None
                    self._complain(place.why)
            else:
                raise LineError(_refusal(frame))
            self._bell.set()

    def _settle(self) -> None:
        """Keep what a connection that ended left without an answer."""
        for sent in self._unanswered.values():
            self._keep(sent)
        self._unanswered.clear()
        self._past = None
        self._keep_news()

    def _keep_news(self) -> None:
        """Keep the newest report too: the next connection sends it first, and under the same number it counts once."""
        if self._news is not None:
            self._keep(self._news)
            self._news = None

    def _keep(self, sent: _Sent) -> None:
        if self._spool is not None:
            self._spool.put(sent.report.at_us, sent.body)

    def _complain(self, text: str) -> None:
        """Tell people, once while it lasts."""
        if text and text != self._said:
            self._say(text)
        self._said = text


def _refusal(frame: bytes) -> str:
    if frame[:1] == REFUSED:
        return take(Place, frame[1:]).why
    return "Tessera answered with what is no answer; run agent and Tessera of the same release"


class _WebSocketLine:
    """A connection over aiohttp's WebSocket client."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._session, self._socket = session, socket

    async def send(self, frame: bytes) -> None:
        try:
            await self._socket.send_bytes(frame)
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            raise LineError(f"the connection to Tessera broke: {error}") from error

    async def receive(self) -> bytes:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY and isinstance(message.data, bytes):
            return message.data
        why = str(message.extra or "") if message.type is aiohttp.WSMsgType.CLOSE else ""
        raise LineError(f"Tessera hung up: {why}" if why else "the connection to Tessera ended")

    async def close(self) -> None:
        async with asyncio.timeout(ANSWER_S):
            await self._socket.close()
            await self._session.close()


@dataclass(frozen=True, slots=True)
class Tessera:
    """Where Tessera is, as whom to speak to it, and where to keep what it misses; without a folder that is lost."""

    url: str
    token: Path
    authority: Path | None = None
    spool: Path | None = None

    def check(self) -> None:
        """Refuse to send a token where others may read it. Raises ValueError."""
        parts = urlsplit(self.url)
        if parts.scheme not in {"ws", "wss"} or not parts.hostname:
            raise ValueError(f"{self.url!r} is no wss://HOST:PORT")
        if parts.scheme == "ws" and parts.hostname not in _LOOPBACK:
            raise ValueError(f"{self.url!r} would show the token to the network; use wss://")

    async def connect(self) -> Line:
        """Connect with the token as it is now, since the kubelet renews it. Raises LineError."""
        try:
            token = self.token.read_text(encoding="ascii").strip()
            tls = ssl.create_default_context(cafile=self.authority) if self.url.startswith("wss") else True
        except (OSError, ValueError) as error:
            raise LineError(f"token or CA cannot be read: {error}") from error
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_connect=ANSWER_S))
        try:
            socket = await session.ws_connect(
                self.url.rstrip("/") + PATH,
                headers={"Authorization": f"Bearer {token}"},
                heartbeat=BEAT_S,
                max_msg_size=_FRAME_MAX,
                ssl=tls,
            )
        except aiohttp.WSServerHandshakeError as error:
            await session.close()
            raise LineError(f"Tessera refuses this agent: {error.status} {error.message}") from error
        except BaseException as error:
            await session.close()
            if isinstance(error, aiohttp.ClientError | OSError | ValueError):
                raise LineError(f"Tessera cannot be reached at {self.url}: {error}") from error
            raise
        return _WebSocketLine(session, socket)


class Uplink:
    """A stream in a thread of its own, so that looking at the machine never waits for it."""

    def __init__(self, tessera: Tessera, *, rng: Random, say: Say) -> None:
        """Begin. Raises OSError when the spool cannot be used."""
        self._loop = asyncio.new_event_loop()
        spool = Spool(tessera.spool) if tessera.spool is not None else None
        self._stream = Stream(tessera.connect, spool=spool, rng=rng, say=say)
        self._task = self._loop.create_task(self._stream.run())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def publish(self, report: Report) -> None:
        """Hand a report over; any thread may."""
        self._loop.call_soon_threadsafe(self._stream.publish, report)

    def close(self) -> None:
        """Hang up, and keep what was not acknowledged."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._stream.close()
        self._loop.close()
