"""Who asks, and how far that reaches: roles, grants, and the requests that a grant covers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Role(StrEnum):
    """What somebody is to Tessera."""

    ADMIN = "admin"
    OPERATOR = "operator"
    USER = "user"
    VIEWER = "viewer"
    SERVICE = "service"


class Scope(IntEnum):
    """How far a role reaches on a route: not at all, to its own namespaces, to its queues as well, to everything."""

    NONE = 0
    OWN = 1
    QUEUE = 2
    ALL = 3


@dataclass(frozen=True, slots=True)
class Grant:
    """One role of somebody, and where: the namespaces that are theirs, and the queues that they answer for."""

    role: Role
    namespaces: frozenset[str] = frozenset()
    queues: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks.

    Attributes:
        name: unique, with where it is known from: `oidc:alice@example.org`, `kubernetes:system:serviceaccount:a:b`,
            `token:ci`.
        grants: the roles; empty = known, and allowed nothing.
    """

    name: str
    grants: tuple[Grant, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """The requests that somebody may see or change on one route."""

    everything: bool = False
    namespaces: frozenset[str] = frozenset()
    queues: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.everything or bool(self.namespaces or self.queues)

    def covers(self, namespace: str, queue: str) -> bool:
        """Say whether a request of this namespace and queue is within."""
        return self.everything or namespace in self.namespaces or queue in self.queues


def reach_of(grants: Iterable[Grant], scopes: dict[Role, Scope]) -> Reach:
    """Return how far these grants reach together where each role has its scope; a role without one reaches nothing."""
    namespaces, queues = set[str](), set[str]()
    for grant in grants:
        scope = scopes.get(grant.role, Scope.NONE)
        if scope is Scope.ALL:
            return Reach(everything=True)
        if scope >= Scope.OWN:
            namespaces |= grant.namespaces
        if scope >= Scope.QUEUE:
            queues |= grant.queues
    return Reach(namespaces=frozenset(namespaces), queues=frozenset(queues))
