"""A small client of the Kubernetes API for tests and benches: plain JSON, one token, no models.

It shares no code with Tessera's own client, so that a fault there cannot hide itself here.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

Json = dict[str, Any]

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY = "application/apply-patch+yaml"


class ApiError(Exception):
    """The API server answered with a status of 400 or more."""

    def __init__(self, reply: Reply, what: str) -> None:
        """Keep the reply and say what was asked."""
        super().__init__(f"{what}: {reply.status} {reply.message}")
        self.status = reply.status
        self.message = reply.message


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: its HTTP status and its object (a `Status` when it failed)."""

    status: int
    body: Json

    @property
    def message(self) -> str:
        """The `Status` message, or an empty string."""
        return str(self.body.get("message", ""))


class ApiClient:
    """Speaks to one API server as one user; `async with` opens and closes its connections."""

    def __init__(self, url: str, token: str, ca_file: Path, *, connections: int = 64) -> None:
        """Note where and as whom; `connections` bounds the requests in flight."""
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._ca_file = ca_file
        self._connections = connections

    async def __aenter__(self) -> Self:
        """Open the connection pool on the running loop."""
        self._session = aiohttp.ClientSession(
            self._url,
            headers=self._headers,
            connector=aiohttp.TCPConnector(
                ssl=ssl.create_default_context(cafile=str(self._ca_file)), limit=self._connections
            ),
            timeout=aiohttp.ClientTimeout(total=60),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection pool."""
        await self._session.close()

    async def ask(self, method: str, path: str, body: object = None, *, content_type: str = "") -> Reply:
        """Send one request and return whatever the server answers, refusals included.

        Args:
            method: HTTP method.
            path: path and query.
            body: what to send as JSON, None for nothing.
            content_type: of the body; a merge patch for PATCH and plain JSON for the rest by default.
        """
        payload = None if body is None else orjson.dumps(body)
        default = MERGE if method == "PATCH" else "application/json"
        headers = {} if payload is None else {"Content-Type": content_type or default}
        async with self._session.request(method, path, data=payload, headers=headers) as http:
            raw = await http.read()
            if not http.content_type.endswith("json"):
                return Reply(http.status, {"message": raw.decode(errors="replace")})
            return Reply(http.status, orjson.loads(raw))

    async def _must(self, method: str, path: str, body: object = None, *, content_type: str = "") -> Json:
        reply = await self.ask(method, path, body, content_type=content_type)
        if reply.status >= 400:
            raise ApiError(reply, f"{method} {path}")
        return reply.body

    async def get(self, path: str) -> Json:
        """GET an object or a list; raises ApiError."""
        return await self._must("GET", path)

    async def post(self, path: str, body: object) -> Json:
        """POST a new object; raises ApiError."""
        return await self._must("POST", path, body)

    async def patch(self, path: str, body: object, *, content_type: str = "") -> Json:
        """PATCH an object, by merge patch unless another type is named; raises ApiError."""
        return await self._must("PATCH", path, body, content_type=content_type)

    async def delete(self, path: str, body: object = None) -> Json:
        """DELETE an object (or a collection); raises ApiError."""
        return await self._must("DELETE", path, body)

    async def watch(self, path: str, resource_version: str) -> AsyncIterator[Json]:
        """Yield watch events after `resource_version` until the server ends the stream."""
        mark = "&" if "?" in path else "?"
        url = f"{path}{mark}watch=1&resourceVersion={resource_version}"
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        async with self._session.get(url, timeout=timeout) as http:
            # Lines may be longer than the reader's limit, so chunks are joined here.
            rest = b""
            async for chunk in http.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield orjson.loads(line)
