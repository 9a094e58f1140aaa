"""How the Kubernetes API writes on HTTP: paths of kinds, refusals, lines of a watch, and our own pace.

Invariant: what is read here is never trusted to be well-formed; the worst outcome is an ApiError.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import quote

import orjson

from scheduler.clock import Clock
from scheduler.kube.port import ApiError, Conflict, Gone, Kind, NotFound, PatchType, WatchEvent

UNAUTHORIZED, FORBIDDEN, NOT_FOUND, CONFLICT, GONE, TOO_MANY = 401, 403, 404, 409, 410, 429
BAD_GATEWAY, UNAVAILABLE = 502, 503

_ROOTS: dict[Kind, str] = {
    "pods": "/api/v1",
    "nodes": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "events": "/apis/events.k8s.io/v1",
    "secrets": "/api/v1",
    "mutatingwebhookconfigurations": "/apis/admissionregistration.k8s.io/v1",
    "namespaces": "/api/v1",
    "queues": "/apis/tessera.dev/v1alpha1",
}
_REFUSALS: dict[int, type[ApiError]] = {NOT_FOUND: NotFound, CONFLICT: Conflict, GONE: Gone}

PATCH_TYPES: dict[PatchType, str] = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}


def path_of(kind: Kind, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """Return the quoted URL path of a collection, an object or a subresource; no namespace means all of them."""
    path = _ROOTS[kind]
    if namespace:
        path += f"/namespaces/{quote(namespace, safe='')}"
    path += f"/{kind}"
    for part in (name, subresource):
        if part:
            path += f"/{quote(part, safe='')}"
    return path


def decode(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ApiError: 502 when it is something else, such as a proxy's error page.
    """
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(BAD_GATEWAY, "NotJson", f"the answer is not JSON: {raw[:200]!r}") from error
    if not isinstance(found, dict):
        raise ApiError(BAD_GATEWAY, "NotJson", f"the answer is not a JSON object: {raw[:200]!r}")
    return found


def refusal(status: int, raw: bytes, retry_after: str = "") -> ApiError:
    """Return the error that an HTTP answer of 300 or more stands for, its class by the status.

    Args:
        status: HTTP status.
        raw: the body: a Status object, or whatever a proxy sent.
        retry_after: the header, in seconds; a date or nonsense counts as not given.
    """
    try:
        body = decode(raw)
    except ApiError:
        body = {"message": raw[:200].decode(errors="replace")}
    return _from_status(status, body, float(retry_after) if retry_after.isdecimal() else 0.0)


def _from_status(status: int, body: dict[str, Any], retry_after_s: float) -> ApiError:
    """Return the error of a Status object."""
    details = body.get("details")
    wished = details.get("retryAfterSeconds", 0) if isinstance(details, dict) else 0
    return _REFUSALS.get(status, ApiError)(
        status,
        str(body.get("reason", "")),
        str(body.get("message", "")),
        retry_after_s=retry_after_s or (float(wished) if isinstance(wished, int) else 0.0),
    )


def advice(error: Exception) -> str:
    """Return the error as a sentence for people who wait for the API server, with the next step where one is known."""
    said = str(error) or type(error).__name__
    status = error.status if isinstance(error, ApiError) else 0
    if isinstance(error, TimeoutError):
        step = "the API server does not answer in time"
    elif status == UNAUTHORIZED:
        step = "the API server does not accept our credentials: renew the token or name another kubeconfig"
    elif status == FORBIDDEN:
        step = "the API server knows us, but forbids it: grant the rights of deploy/ (see `tessera doctor`)"
    elif "HTTP request to an HTTPS server" in said:
        step = "the API server speaks HTTPS: write https:// in the kubeconfig"
    elif "WRONG_VERSION_NUMBER" in said or "record layer failure" in said:
        step = "what answers there speaks no TLS: write http:// in the kubeconfig, or another port"
    elif "CERTIFICATE_VERIFY_FAILED" in said:
        step = "the server's certificate is not one that the kubeconfig's CA vouches for: correct the CA or the address"
    elif status == UNAVAILABLE:
        step = "the API server cannot be reached"
    else:
        return said
    return f"{step} ({said})"


def watch_event(line: bytes) -> WatchEvent:
    """Parse one line of a watch.

    Raises:
        Gone: it is the ERROR event with code 410.
        ApiError: it is another ERROR event, or no event at all.
    """
    found = decode(line)
    kind, body = found.get("type"), found.get("object")
    if not isinstance(kind, str) or not isinstance(body, dict):
        raise ApiError(BAD_GATEWAY, "NotAnEvent", f"a watch sent {line[:200]!r}")
    if kind == "ERROR":
        code = body.get("code")
        raise _from_status(code if isinstance(code, int) else BAD_GATEWAY, body, 0.0)
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("resourceVersion"), str):
        raise ApiError(BAD_GATEWAY, "NotAnEvent", f"a watch sent an object without a version: {line[:200]!r}")
    return WatchEvent(kind, body)


async def lines(chunks: AsyncIterator[bytes], limit: int) -> AsyncGenerator[bytes, None]:
    """Yield whole, non-empty lines, each at most `limit` bytes; a last line without its end is dropped.

    Raises:
        ApiError: a line is longer, so that a broken server cannot fill our memory.
    """
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            line = b"".join((*parts, end))
            parts, size = [], 0
            if line:
                yield line
        if rest:
            parts.append(rest)
            size += len(rest)
        if size > limit:
            raise ApiError(BAD_GATEWAY, "LineTooLong", f"a watch event is longer than {limit} bytes")


class Bucket:
    """Our own pace: `burst` calls at once, then `qps` a second, in order of asking."""

    def __init__(self, clock: Clock, *, qps: float, burst: int) -> None:
        """Start full. Both are > 0."""
        assert qps > 0, "a pace above zero"
        assert burst > 0, "at least one call at a time"
        self._clock = clock
        self._step = 1.0 / qps
        self._slack = (burst - 1) * self._step
        self._next = clock.monotonic() - self._slack

    async def take(self, deadline_s: float) -> None:
        """Wait for our turn.

        Raises:
            ApiError: 429, at once and without a turn taken, when the wait would reach the deadline.
        """
        now = self._clock.monotonic()
        turn = max(self._next, now - self._slack)
        if turn - now >= deadline_s:
            raise ApiError(TOO_MANY, "OwnPace", "too many calls wait for their turn", retry_after_s=turn - now)
        self._next = turn + self._step
        if turn > now:
            await self._clock.sleep(turn - now)
