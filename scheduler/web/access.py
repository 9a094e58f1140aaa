"""Who may do what: one table, role by route, and the door that every request of the API goes through.

Invariant: a route without a row is no route: `seal` refuses to start with it. Whoever is not known gets 401, whoever
may not do it 403; a single thing out of reach is 404 to them, as if it were not there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Protocol, TypeAlias

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from scheduler.clock import Clock
from scheduler.errors import ConfigError, TesseraError
from scheduler.model.subject import Grant, Reach, Role, Scope, Subject, reach_of

from .problems import problem

log = structlog.get_logger(__name__)

SUBJECT = web.RequestKey("subject", Subject)
REACH = web.RequestKey("reach", Reach)
SUBJECTS_MAX = 10_000
CALL_S = 0.002
"""What one call may take; with 50 calls a second nobody but an administrator takes more than a tenth of the loop."""
TRUSTED = frozenset({Role.ADMIN, Role.OPERATOR})
ANYBODY: dict[Role, Scope] = {}
"""The row of a route that asks for no token."""

Row: TypeAlias = dict[Role, Scope]


def _row(admin: Scope, operator: Scope, user: Scope, viewer: Scope, service: Scope) -> Row:
    return dict(zip(Role, (admin, operator, user, viewer, service), strict=True))


_ALL, _QUEUE, _OWN = Scope.ALL, Scope.QUEUE, Scope.OWN

RULES: Mapping[tuple[str, str], Row] = {
    # method, route                                        admin operator user  viewer  service
    ("GET", "/api/v1/me"): _row(_ALL, _ALL, _ALL, _ALL, _ALL),
    ("GET", "/api/v1/nodes"): _row(_ALL, _ALL, _ALL, _ALL, _ALL),
    ("GET", "/api/v1/gpus"): _row(_ALL, _ALL, _OWN, _QUEUE, _OWN),
    ("GET", "/api/v1/queues"): _row(_ALL, _ALL, _ALL, _ALL, _ALL),
    ("GET", "/api/v1/queues/{name}"): _row(_ALL, _ALL, _OWN, _QUEUE, _OWN),
    ("GET", "/api/v1/requests"): _row(_ALL, _ALL, _OWN, _QUEUE, _OWN),
    ("GET", "/api/v1/requests/{id}"): _row(_ALL, _ALL, _OWN, _QUEUE, _OWN),
    ("GET", "/api/v1/requests/{id}/explanation"): _row(_ALL, _ALL, _OWN, _QUEUE, _OWN),
    ("GET", "/api/v1/openapi.json"): ANYBODY,
    ("GET", "/healthz"): ANYBODY,
    ("GET", "/readyz"): ANYBODY,
}
"""Deny by default. A role's scope on a route says which requests its holder sees there: of a list only those, of the
queue's line and the GPUs' holders only those; nodes, GPUs and queues themselves are no secret to whoever has a role."""


class Bearers(Protocol):
    """Knows people by their tokens."""

    async def subject(self, token: str) -> Subject | None:
        """Return who shows this token; None = nobody whom this one knows. Raises TesseraError: cannot be found out."""
        ...


@dataclass(slots=True)
class Rate:
    """So many calls a second by one subject, and so many at once after a rest."""

    clock: Clock
    per_second: float = 50.0
    burst: float = 200.0
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait_s(self, name: str) -> float:
        """Count one call; return 0, or in how many seconds there is room for it."""
        now_s = self.clock.monotonic()
        left, at_s = self._left.pop(name, (self.burst, now_s))
        left = min(left + (now_s - at_s) * self.per_second, self.burst)
        allowed = left >= 1.0
        self._left[name] = (left - 1.0 if allowed else left, now_s)
        if len(self._left) > SUBJECTS_MAX:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self.per_second

    def charge(self, name: str, took_s: float) -> None:
        """Count a call that took long as several: it held up decisions, which are made on the same loop."""
        left, at_s = self._left.get(name, (self.burst, self.clock.monotonic()))
        self._left[name] = max(left - max(took_s / CALL_S - 1.0, 0.0), -self.burst), at_s


LOCAL = Subject("local", (Grant(Role.ADMIN),))
"""Whoever reaches the loopback listener of a Tessera that has no access configured."""


@dataclass(slots=True)
class Access:
    """The door.

    Attributes:
        bearers: asked one after the other; none = the listener is on loopback and everybody is `LOCAL`.
        rate: how often one subject may call.
    """

    bearers: tuple[Bearers, ...]
    rate: Rate

    async def subject(self, request: web.Request) -> Subject | None:
        """Return who asks, None for a stranger."""
        if not self.bearers:
            return LOCAL if _here(request.host) else None
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token or not token.isascii():
            return None
        for one in self.bearers:
            found = await one.subject(token.strip())
            if found is not None:
                return found
        return None

    def door(self) -> Middleware:
        """Return the middleware that lets in whom the table lets in."""

        @web.middleware
        async def door(request: web.Request, handler: Handler) -> web.StreamResponse:
            resource = request.match_info.route.resource
            row = None if resource is None else RULES.get((_named(request.method), resource.canonical))
            if row is None or row is ANYBODY:  # without a row: no such path or method, which the router says
                return await handler(request)
            try:
                subject = await self.subject(request)
            except TesseraError as error:  # what went wrong inside is nothing for strangers
                log.warning("access.unavailable", error=str(error))
                answer = problem(503, "access.unavailable", "who you are cannot be found out now; try again")
                answer.headers["Retry-After"] = "1"
                return answer
            if subject is None:
                answer = problem(401, "access.unauthenticated", "send `Authorization: Bearer TOKEN` with a valid token")
                answer.headers["WWW-Authenticate"] = 'Bearer realm="tessera"'
                return answer
            wait_s = self.rate.wait_s(subject.name)
            if wait_s > 0:
                answer = problem(429, "rate.limited", "too many calls; wait as long as Retry-After says")
                answer.headers["Retry-After"] = str(max(1, round(wait_s + 0.5)))
                return answer
            reach = reach_of(subject.grants, row)
            if not reach:
                log.info("access.denied", subject=subject.name, method=request.method, path=request.path)
                return problem(403, "access.denied", "no role of yours allows this here; an administrator can bind one")
            request[SUBJECT], request[REACH] = subject, reach
            began_s = self.rate.clock.monotonic()
            try:
                return await handler(request)
            finally:
                if not any(grant.role in TRUSTED for grant in subject.grants):
                    self.rate.charge(subject.name, self.rate.clock.monotonic() - began_s)

        return door


def _here(host: str) -> bool:
    """Say whether a Host header names this machine: a page in a browser may lead its own name to 127.0.0.1."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        return name == "localhost" or ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def seal(app: web.Application) -> web.Application:
    """Return the application, each of whose routes has a row. Raises ConfigError naming those that have none."""
    routes = {(_named(route.method), route.resource.canonical) for route in app.router.routes() if route.resource}
    lacking = sorted(f"{method} {path}" for method, path in routes - RULES.keys())
    if lacking:
        raise ConfigError(f"no role has a scope on: {', '.join(lacking)}; give each a row in web/access.py")
    return app


def _named(method: str) -> str:
    return "GET" if method == "HEAD" else method


@dataclass(frozen=True, slots=True)
class Binding:
    """Who has a grant: people and groups by name, each with where it is known from, as a Subject's name has it."""

    grant: Grant
    users: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()


def bound(source: str, user: str, groups: Iterable[str], bindings: Iterable[Binding]) -> Subject:
    """Return somebody known from a source, with the roles that these bindings give the name or the groups."""
    name, there = f"{source}:{user}", {f"{source}:{group}" for group in groups}
    return Subject(name, tuple(one.grant for one in bindings if name in one.users or there & one.groups))
