"""What Tessera needs of an API server. Two implementations keep it: the real one and the embedded cluster.

Objects cross this port as plain dicts in Kubernetes' own JSON form. Invariant: an UnknownOutcome may or may not have
taken effect; whoever gets one reads back before doing anything else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from scheduler.errors import TesseraError

Object: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal[
    "pods", "nodes", "leases", "events", "secrets", "mutatingwebhookconfigurations", "namespaces", "queues"
]
PatchBody: TypeAlias = Object | list[Object]
PatchType: TypeAlias = Literal["merge", "strategic", "json"]


class ApiError(TesseraError):
    """The API server refused.

    Attributes:
        status: HTTP status.
        reason: Status.reason, such as `Conflict` or `AlreadyExists`.
        retry_after_s: what a 429 asked for, 0 when it said nothing.
    """

    code = "kube.refused"

    def __init__(self, status: int, reason: str, message: str, *, retry_after_s: float = 0.0) -> None:
        """Keep the parts of the Status object."""
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class NotFound(ApiError):  # noqa: N818 - named after the status it is
    """404: the object is not there."""


class Conflict(ApiError):  # noqa: N818 - named after the status it is
    """409: a precondition (uid, resourceVersion, unbound) did not hold; nothing was changed."""


class Gone(ApiError):  # noqa: N818 - named after the status it is
    """410: the resourceVersion is too old; list again."""


class Unavailable(ApiError):  # noqa: N818 - named after the status it is
    """503 of our own: the API server has failed of late, so the call was not sent."""


class UnknownOutcome(TesseraError):  # noqa: N818 - it says what is known
    """Time-out, broken connection or 5xx: the write may have happened."""

    code = "kube.unknown"


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list. `next` is empty on the last one; the resourceVersion is that of the whole list."""

    items: list[Object]
    resource_version: str
    next: str = ""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """ADDED, MODIFIED, DELETED or BOOKMARK, with the object (a bookmark's carries only its resourceVersion)."""

    type: str
    object: Object


class Cluster(Protocol):
    """The verbs. Namespaced kinds take the namespace, the others take an empty one."""

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        """Return one page over all namespaces; `after` is the `next` of the page before. Raises Gone when it aged."""
        ...

    def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncGenerator[WatchEvent, None]:
        """Yield what happens after this resourceVersion, bookmarks included, until about `timeout_s`. Raises Gone."""
        ...

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """Return one object. Raises NotFound."""
        ...

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Create and return. Raises Conflict when the name is taken."""
        ...

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        """PUT; metadata.resourceVersion in the body is a precondition."""
        ...

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
        ...

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str = "", grace_s: int | None = None) -> None:
        """Ask for deletion; a given uid is a precondition."""
        ...

    async def bind(self, namespace: str, name: str, body: Object) -> None:
        """POST a Binding to pods/NAME/binding: uid and resourceVersion in its metadata are preconditions."""
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...
