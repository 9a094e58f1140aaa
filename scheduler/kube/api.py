"""The real API server behind the port: raw bytes and orjson over one pool of kept connections, no typed models.

Invariant: a write is sent at most once, and it ends in exactly one of three ways: done, refused (ApiError: nothing was
changed), or UnknownOutcome (it may have been done). No write that may have been sent is ever reported as refused by
anything but the server's own word.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import aiohttp
import orjson
from yarl import URL

from scheduler.clock import Clock, RealClock
from scheduler.errors import TesseraError
from scheduler.kube.port import ApiError, Kind, Object, Page, PatchBody, PatchType, UnknownOutcome, WatchEvent
from scheduler.kube.wire import PATCH_TYPES, Bucket, decode, lines, path_of, refusal, watch_event

if TYPE_CHECKING:
    from scheduler.kube.credentials import Credentials

JSON = "application/json"
READ_GRACE_S = 15.0
_REFUSED, _BROKEN = 300, 500
_UNREACHABLE, _TIMED_OUT = 503, 504
_IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may use.

    Attributes:
        connections: connections at once, watches included.
        connect_s: seconds for a connection to come up.
        read_s: seconds for a get or one page of a list.
        write_s: seconds for a write; after them its outcome is unknown.
        qps, burst: pace of all calls but Bindings. A queued pod takes two of them, nominate and ungate.
        bind_qps, bind_burst: pace of Bindings, of their own so that nothing else can hold them up.
        line_bytes: longest event of a watch.
    """

    connections: int = 256
    connect_s: float = 5.0
    read_s: float = 30.0
    write_s: float = 10.0
    qps: float = 1000.0
    burst: int = 2000
    bind_qps: float = 1000.0
    bind_burst: int = 2000
    line_bytes: int = 8 * 2**20


DEFAULT_LIMITS = Limits()


async def connect(
    *, kubeconfig: str | None, in_cluster: bool, limits: Limits = DEFAULT_LIMITS, clock: Clock | None = None
) -> ApiServer:
    """Return a client; no call is made yet.

    Args:
        kubeconfig: path of a kubeconfig; None takes $KUBECONFIG or ~/.kube/config.
        in_cluster: use the pod's service account instead.
        limits: deadlines, pace and sizes.
        clock: the real one by default.

    Raises:
        ConfigError: the credentials are missing or make no sense.
    """
    for package in ("kubernetes", "kubernetes.aio"):
        _forgo_init(package)
    from scheduler.kube import credentials  # noqa: PLC0415 - time and memory that only a real cluster needs

    used = clock or RealClock()
    return ApiServer(await credentials.load(kubeconfig=kubeconfig, in_cluster=in_cluster, clock=used), limits, used)


def _forgo_init(package: str) -> None:
    """Make a package's modules importable without what its `__init__` imports.

    Those of `kubernetes` and `kubernetes.aio` define nothing that is used here, and import a second, synchronous client
    with 300 modules: half a second and 20 MB.
    """
    if package not in sys.modules and (spec := find_spec(package)) is not None:
        sys.modules[package] = module_from_spec(spec)


class ApiServer:
    """`scheduler.kube.port.Cluster` over HTTP. Make it on the running loop and `close` it there."""

    def __init__(self, credentials: Credentials, limits: Limits, clock: Clock) -> None:
        """Open an empty pool of connections."""
        self._credentials = credentials
        self._limits = limits
        self._clock = clock
        self._calls = Bucket(clock, qps=limits.qps, burst=limits.burst)
        self._binds = Bucket(clock, qps=limits.bind_qps, burst=limits.bind_burst)
        # A compressed answer costs more time to unpack here than it saves on the way from a control plane near by.
        headers = {"Accept": JSON, "Accept-Encoding": "identity", "User-Agent": "tessera"}
        connector = aiohttp.TCPConnector(
            limit=limits.connections, keepalive_timeout=_IDLE_S, ssl=credentials.ssl or True
        )
        self._session = aiohttp.ClientSession(
            connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=2**18
        )
        # aiohttp sends PUT and DELETE again when a kept connection breaks; the second answer (409, 404) would hide
        # that the first one was carried out. It has no public switch for this.
        self._session._retry_connection = False  # noqa: SLF001

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        """Return one page over all namespaces, read consistently. Raises Gone when `after` aged."""
        query = {"limit": str(limit), **({"continue": after} if after else {})}
        body = await self._read(f"{path_of(kind)}?{urlencode(query)}")
        meta = body.get("metadata", {})
        return Page(body.get("items") or [], meta.get("resourceVersion", ""), meta.get("continue", ""))

    async def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncGenerator[WatchEvent, None]:
        """Yield what happens after this resourceVersion, bookmarks included, until about `timeout_s`.

        Raises:
            Gone: the version is too old, said by status or by event.
            ApiError: refused, unreachable, broken in the middle, or not ended `READ_GRACE_S` after its time.
        """
        query = {
            "watch": "1",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(round(timeout_s)),
        }
        await self._calls.take(self._limits.read_s)
        timeout = aiohttp.ClientTimeout(total=timeout_s + READ_GRACE_S, sock_connect=self._limits.connect_s)
        url = f"{path_of(kind)}?{urlencode(query)}"
        try:
            async with await self._send("GET", url, timeout) as response:
                if response.status >= _REFUSED:
                    raise refusal(response.status, await response.read(), response.headers.get("Retry-After", ""))
                async with aclosing(_events(response, self._limits.line_bytes)) as events:
                    async for event in events:
                        yield event
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _not_read(f"watch {kind}", error) from error

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """Return one object. Raises NotFound."""
        return await self._read(path_of(kind, namespace, name))

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Create and return. Raises Conflict when the name is taken."""
        return await self._write("POST", path_of(kind, namespace), body)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        """PUT; metadata.resourceVersion in the body is a precondition."""
        return await self._write("PUT", path_of(kind, namespace, name), body)

    async def patch(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: PatchBody,
        *,
        patch_type: PatchType = "merge",
        subresource: str = "",
    ) -> Object:
        """Patch the object or its subresource (`status`) and return it; metadata.uid in the body is a guard."""
        path = path_of(kind, namespace, name, subresource)
        return await self._write("PATCH", path, body, content_type=PATCH_TYPES[patch_type])

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str = "", grace_s: int | None = None) -> None:
        """Ask for deletion; a given uid is a precondition."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        await self._write("DELETE", path_of(kind, namespace, name), options)

    async def bind(self, namespace: str, name: str, body: Object) -> None:
        """POST a Binding to pods/NAME/binding: uid and resourceVersion in its metadata are preconditions."""
        await self._write("POST", path_of("pods", namespace, name, "binding"), body, pace=self._binds)

    async def close(self) -> None:
        """Give back connections."""
        await self._session.close()
        await self._clock.sleep(0)  # lets what was aborted close its sockets

    async def ask(self, path: str, review: Object | None = None) -> tuple[Object, str]:
        """GET any path, or POST a review, which changes nothing; return the answer and its Date header.

        Every failure is an ApiError, because nothing was put at stake.
        """
        method, data = ("GET", None) if review is None else ("POST", orjson.dumps(review))
        await self._calls.take(self._limits.read_s)
        timeout = aiohttp.ClientTimeout(total=self._limits.read_s, sock_connect=self._limits.connect_s)
        try:
            async with await self._send(method, path, timeout, data, JSON) as response:
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _not_read(f"{method} {path}", error) from error
        if response.status >= _REFUSED:
            raise refusal(response.status, raw, response.headers.get("Retry-After", ""))
        return decode(raw), response.headers.get("Date", "")

    async def _read(self, url: str) -> Object:
        """GET an object."""
        return (await self.ask(url))[0]

    async def _write(
        self, method: str, path: str, body: PatchBody, *, content_type: str = JSON, pace: Bucket | None = None
    ) -> Object:
        """Send one write, once."""
        await (pace or self._calls).take(self._limits.write_s)
        timeout = aiohttp.ClientTimeout(total=self._limits.write_s, sock_connect=self._limits.connect_s)
        try:
            async with await self._send(method, path, timeout, orjson.dumps(body), content_type) as response:
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _not_written(f"{method} {path}", error) from error
        if response.status >= _BROKEN:
            refused = refusal(response.status, raw)
            raise UnknownOutcome(f"{method} {path}: {refused}; read the object back before anything else")
        if response.status >= _REFUSED:
            raise refusal(response.status, raw, response.headers.get("Retry-After", ""))
        try:
            return decode(raw)
        except ApiError as error:
            raise UnknownOutcome(f"{method} {path}: {error}; read the object back before anything else") from error

    async def _send(
        self, method: str, url: str, limit: aiohttp.ClientTimeout, data: bytes | None = None, content_type: str = ""
    ) -> aiohttp.ClientResponse:
        """Send one request and return the answer's head; the body is not read yet."""
        headers = {"Content-Type": content_type} if data is not None else {}
        if authorization := await self._credentials.authorization():
            headers["Authorization"] = authorization
        return await self._session.request(
            method,
            URL(self._credentials.url + url, encoded=True),
            data=data,
            headers=headers,
            timeout=limit,
            allow_redirects=False,
            proxy=self._credentials.proxy,
            server_hostname=self._credentials.server_hostname,
        )


async def _events(response: aiohttp.ClientResponse, line_bytes: int) -> AsyncGenerator[WatchEvent, None]:
    """Yield a watch's events; one that is left before its end breaks its connection.

    Otherwise the connection stays open for half a minute, until TLS gives up taking leave of a server that streams on.
    """
    try:
        async with aclosing(lines(response.content.iter_any(), line_bytes)) as found:
            async for line in found:
                yield watch_event(line)
    finally:
        if response.connection and response.connection.transport:
            response.connection.transport.abort()


def _not_read(what: str, error: Exception) -> ApiError:
    """Return the error of a read that got no whole answer."""
    if isinstance(error, TimeoutError):
        return ApiError(_TIMED_OUT, "Timeout", f"{what}: no answer in time")
    return ApiError(_UNREACHABLE, "Unreachable", f"{what}: {error or type(error).__name__}")


def _not_written(what: str, error: Exception) -> TesseraError:
    """Return the error of a write that got no whole answer: only one that found no connection was surely not sent."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return ApiError(_UNREACHABLE, "Unreachable", f"{what}: {error or 'no connection in time'}")
    return UnknownOutcome(f"{what}: {error or type(error).__name__}; read the object back before anything else")
