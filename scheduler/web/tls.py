"""Listeners over TLS 1.3. The extender's clients show a certificate of our own CA that names an allowed one of them.

Invariant: a stranger to the extender is turned away when the connection is made, so not one byte of a request of theirs
is read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import orjson
import structlog
from aiohttp import web

from scheduler.errors import ConfigError

log = structlog.get_logger(__name__)

HANDSHAKE_S = 5.0
SHUTDOWN_S = 1.0
ALPN = ("http/1.1",)
"""Go's client would rather speak HTTP/2; this listener does not, and says so."""

_Stamp: TypeAlias = tuple[tuple[int, int, int], ...]
_DETAIL = b"the client certificate names nobody on the list extender.clientNames"
_BODY = orjson.dumps({"code": "access.denied", "status": 403, "title": "access.denied", "detail": _DETAIL.decode()})
_REFUSAL = b"\r\n".join(
    (
        b"HTTP/1.1 403 Forbidden",
        b"Content-Type: application/problem+json",
        b"Content-Length: %d" % len(_BODY),
        b"Connection: close",
        b"",
        _BODY,
    )
)


@dataclass(frozen=True, slots=True)
class Files:
    """Where a listener's certificate chain, key and the CA of its clients are, in PEM; without a CA all may come."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def stamp(self) -> _Stamp:
        """Return what changes when one of the files is replaced. Raises OSError."""
        found = (path.stat() for path in (self.cert, self.key, self.client_ca) if path is not None)
        return tuple((one.st_mtime_ns, one.st_ino, one.st_size) for one in found)

    def load(self) -> ssl.SSLContext:
        """Return a context made of the files as they are now.

        Raises:
            OSError: one cannot be read, is not PEM, or key and certificate do not belong together (ssl.SSLError).
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # each connection shows its certificate anew
        context.set_alpn_protocols(list(ALPN))
        context.load_cert_chain(self.cert, self.key, password=lambda: "")  # never asks at a terminal
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cafile=self.client_ca)
        return context


class RotatingContext(ssl.SSLContext):
    """A server context that looks at its files for every new connection and follows when they were replaced.

    Files that cannot be used, such as those of a rotation halfway through, leave the last good ones in force.
    """

    _files: Files
    _stamp: _Stamp
    _current: ssl.SSLContext

    @classmethod
    def of(cls, files: Files) -> RotatingContext:
        """Load the files for the first time.

        Raises:
            ConfigError: they cannot be used; the sentence names them.
        """
        made = cls(ssl.PROTOCOL_TLS_SERVER)
        made._files = files
        try:
            made._stamp, made._current = files.stamp(), files.load()
        except (OSError, ValueError) as error:
            names = ", ".join(str(path) for path in (files.cert, files.key, files.client_ca) if path is not None)
            raise ConfigError(f"the TLS files {names} cannot be used: {error}") from error
        return made

    def current(self) -> ssl.SSLContext:
        """Return the context of the files as they are now, or of those that were good last."""
        try:
            stamp = self._files.stamp()
            if stamp != self._stamp:
                self._stamp = stamp  # a bad set is tried once, and again when it changes
                self._current = self._files.load()
                log.info("tls.reloaded", cert=str(self._files.cert))
        except (OSError, ValueError) as error:
            log.warning("tls.not_reloaded", cert=str(self._files.cert), error=str(error))
        return self._current

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - the parent's signature
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Start one connection; asyncio and uvloop call this for each."""
        return self.current().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def names_of(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the DNS names (lower case) and URIs of a peer's certificate as `ssl` shows it; the common name is none."""
    listed = (certificate or {}).get("subjectAltName", ())
    return frozenset(value.lower() if kind == "DNS" else value for kind, value in listed if kind in {"DNS", "URI"})


class _Door(asyncio.Protocol):
    """Stands where a connection ends its handshake: lets it in, or answers 403 and closes without reading."""

    def __init__(self, within: Callable[[], asyncio.BaseProtocol], allowed: frozenset[str]) -> None:
        self._within, self._allowed = within, allowed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        names = names_of(transport.get_extra_info("peercert"))
        if names & self._allowed:
            handler = self._within()
            transport.set_protocol(handler)
            handler.connection_made(transport)
            return
        log.warning("tls.refused", peer=str(transport.get_extra_info("peername")), names=sorted(names)[:8])
        cast("asyncio.WriteTransport", transport).write(_REFUSAL)
        transport.close()


class TlsSite(web.BaseSite):
    """A TCP site of an aiohttp runner behind TLS, with less patience for a handshake than asyncio's own minute."""

    def __init__(self, runner: web.BaseRunner, host: str, port: int, *, context: ssl.SSLContext) -> None:
        """Choose the place; nothing listens yet.

        Args:
            runner: after its `setup`.
            host: address to listen on.
            port: 0 takes a free one.
            context: of the listener's certificate.
        """
        super().__init__(runner, ssl_context=context)
        self._host, self._port = host, port

    @property
    def name(self) -> str:
        """Where it listens, as a URL."""
        return f"https://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        within = self._runner.server
        assert within is not None, "a runner that was set up"
        self._server = await asyncio.get_running_loop().create_server(
            self._door(within),
            self._host,
            self._port,
            ssl=self._ssl_context,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=SHUTDOWN_S,
        )

    def _door(self, within: Callable[[], asyncio.BaseProtocol]) -> Callable[[], asyncio.BaseProtocol]:
        """Return what takes a connection whose handshake is done."""
        return within


class MutualTlsSite(TlsSite):
    """A TCP site behind mutual TLS and a list of clients."""

    def __init__(
        self, runner: web.BaseRunner, host: str, port: int, *, context: RotatingContext, allowed: Collection[str]
    ) -> None:
        """Choose the place; nothing listens yet.

        Args:
            runner: after its `setup`.
            host: address to listen on.
            port: 0 takes a free one.
            context: of the listener's files.
            allowed: DNS names, without regard to case, or URIs, one of which a client's certificate must carry.
        """
        super().__init__(runner, host, port, context=context)
        self._allowed = frozenset(name if ":" in name else name.lower() for name in allowed)

    def _door(self, within: Callable[[], asyncio.BaseProtocol]) -> Callable[[], asyncio.BaseProtocol]:
        """Return what asks for a name first."""
        return lambda: _Door(within, self._allowed)
