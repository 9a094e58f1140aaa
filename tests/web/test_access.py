"""The door of the API: roles x routes as the table says, strangers, reach, rate; and that no route lacks a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import aiohttp
import orjson
import pytest
from aiohttp import web

from scheduler.clock import RealClock
from scheduler.errors import ConfigError
from scheduler.intake.pod import read_pod
from scheduler.kube.port import ApiError
from scheduler.ledger.ledger import advance
from scheduler.ledger.taking import newborn
from scheduler.model.pod import Pod
from scheduler.model.queue import Queue, Selector
from scheduler.model.reservation import Event
from scheduler.model.subject import Grant, Reach, Role, Scope, Subject, reach_of
from scheduler.web.access import ANYBODY, CALL_S, RULES, Access, Binding, Rate, bound, seal
from scheduler.web.routes import api_app
from tests.objects import raw_pod
from tests.web.test_faces import Faces, serving

VISION = frozenset({"vision"})
PEOPLE = {role: Subject(f"test:{role}", (Grant(role, VISION, frozenset({"research"})),)) for role in Role}
PEOPLE_BY_TOKEN = {role.value: subject for role, subject in PEOPLE.items()} | {"nobody": Subject("test:nobody")}


@dataclass
class Slow:
    """A clock that stands still until it is moved."""

    now_s: float = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Known:
    """Takes the name of a role for a token."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def subject(self, token: str) -> Subject | None:
        self.asked.append(token)
        return PEOPLE_BY_TOKEN.get(token)


@dataclass
class Door:
    """The API behind a door, with requests of several namespaces and queues."""

    ROWS: ClassVar = (
        ("a", "vision", "default"),
        ("b", "vision", "research"),
        ("c", "text", "research"),
        ("d", "text", "default"),
    )

    faces: Faces = field(default_factory=Faces)
    known: Known = field(default_factory=Known)
    burst: float = 1e6

    def app(self) -> web.Application:
        desk = self.faces.desk
        desk.queues.replace([(Queue("research", namespaces=Selector()), "")])
        for name, namespace, queue in self.ROWS:
            pod = self.pod(name, namespace, queue)
            desk.registry.put_pod(pod)
            born = newborn(pod.request, fence=0, now_us=self.faces.clock.wall_us())
            desk.book.apply((advance(None, Event.SUBMIT, now_us=1, fence=0, born=born),))
        return api_app(self.faces.views, Access((self.known,), Rate(RealClock(), 1.0, self.burst)))

    @staticmethod
    def pod(name: str, namespace: str, queue: str) -> Pod:
        raw = raw_pod(name, 1)
        raw["metadata"] |= {"namespace": namespace, "labels": {"tessera.dev/queue": queue}}
        return read_pod(raw)

    def hold(self, name: str, namespace: str, node: str) -> str:
        """Have somebody hold a GPU; return its request's id."""
        pod = self.pod(name, namespace, "default")
        self.faces.desk.registry.put_pod(pod)
        self.faces.desk.claim(pod, node)
        return pod.uid


async def told(client: aiohttp.ClientSession, path: str, token: str | None) -> tuple[int, dict[str, object]]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with client.get(path, headers=headers) as answer:
        raw = await answer.read()
        return answer.status, orjson.loads(raw) if raw.startswith(b"{") else {}


def paths() -> list[str]:
    return sorted(path for method, path in RULES if method == "GET")


@pytest.mark.parametrize("path", paths())
async def test_each_role_gets_through_where_its_row_says_so(path: str) -> None:
    row = RULES["GET", path]
    url = path.replace("{name}", "default").replace("{id}", "uid-a")
    async with serving(Door().app()) as client:
        for role in Role:
            status, found = await told(client, url, role.value)
            allowed = row is ANYBODY or row[role] is not Scope.NONE
            assert (status == 403) is not allowed, (role, found)
            assert status < 500
        assert (await told(client, url, "nobody"))[0] == (200 if row is ANYBODY else 403)
        for stranger in (None, "unknown", "", "a" * 8000):
            assert (await told(client, url, stranger))[0] == (200 if row is ANYBODY else 401)


async def test_a_stranger_is_told_how_to_come_in_and_a_bad_header_is_no_token() -> None:
    async with serving(Door().app()) as client:
        async with client.get("/api/v1/nodes") as answer:
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="tessera"'
            assert (await answer.json(content_type=None))["code"] == "access.unauthenticated"
        for header in ("admin", "Basic admin", "Bearer", "Bearer  ", "Bearer \u00e4"):
            async with client.get("/api/v1/nodes", headers={"Authorization": header}) as answer:
                assert answer.status == 401, header
        async with client.get("/api/v1/nodes", headers={"Authorization": "bearer admin"}) as answer:
            assert answer.status == 200  # the scheme's case does not matter
        assert (await told(client, "/api/v1/nowhere", None))[0] == 404


@pytest.mark.parametrize(
    ("role", "seen"),
    [
        (Role.ADMIN, "abcd"),
        (Role.OPERATOR, "abcd"),
        (Role.USER, "ab"),
        (Role.SERVICE, "ab"),
        (Role.VIEWER, "abc"),
    ],
)
async def test_requests_are_those_of_ones_namespaces_and_for_viewers_of_ones_queues(role: Role, seen: str) -> None:
    """a and b are of namespace vision, c is of another one in the queue research, d of neither."""
    async with serving(Door().app()) as client:
        status, found = await told(client, "/api/v1/requests?sort=name", role.value)
        assert status == 200
        items = found["items"]
        assert isinstance(items, list)
        assert sorted(str(one["name"]) for one in items) == list(seen)
        for name in "abcd":
            for path in (f"/api/v1/requests/uid-{name}", f"/api/v1/requests/uid-{name}/explanation"):
                status, found = await told(client, path, role.value)
                assert status == (200 if name in seen else 404), (name, found)
                if status == 404:
                    assert found["code"] == "request.not_found"
        status, found = await told(client, "/api/v1/queues/research", role.value)
        waiting = found["waiting"]
        assert isinstance(waiting, list)
        assert sorted(str(one["name"]) for one in waiting) == [name for name in "bc" if name in seen]


async def test_ones_own_place_in_a_line_is_shown_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.web.views.LINE_MAX", 1)
    async with serving(Door().app()) as client:
        for token, seen in (("user", [("b", 2)]), ("admin", [("c", 1)])):
            _, found = await told(client, "/api/v1/queues/research", token)
            waiting = found["waiting"]
            assert isinstance(waiting, list)
            assert [(one["name"], one["position"]) for one in waiting] == seen


async def test_the_holders_of_gpus_are_those_within_reach() -> None:
    door = Door()
    app = door.app()
    holder = door.hold("held", "text", "a")
    async with serving(app) as client:
        for role, seen in ((Role.ADMIN, True), (Role.USER, False), (Role.VIEWER, False)):
            _, found = await told(client, "/api/v1/gpus", role.value)
            items = found["items"]
            assert isinstance(items, list)
            assert any(holder in one["requests"] for one in items) is seen
            assert any(one["use"] == "whole" for one in items)  # taken all the same


async def test_where_tokens_cannot_be_looked_up_strangers_hear_nothing_of_what_is_wrong() -> None:
    door = Door()

    async def away(_token: str) -> Subject | None:
        raise ApiError(403, "Forbidden", "system:serviceaccount:tessera-system:tessera cannot create tokenreviews")

    door.known.subject = away  # type: ignore[method-assign, assignment]
    async with (
        serving(door.app()) as client,
        client.get("/api/v1/nodes", headers={"Authorization": "Bearer x"}) as answer,
    ):
        text = await answer.text()
        assert (answer.status, orjson.loads(text)["code"]) == (503, "access.unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert "tessera-system" not in text


async def test_me_tells_name_and_grants() -> None:
    async with serving(Door().app()) as client:
        _, found = await told(client, "/api/v1/me", "user")
    grant = {"role": "user", "namespaces": ["vision"], "queues": ["research"]}
    assert found == {"name": "test:user", "grants": [grant]}


async def test_too_many_calls_are_put_off_for_one_and_not_for_another() -> None:
    async with serving(Door(burst=2).app()) as client:
        for _ in range(2):
            assert (await told(client, "/api/v1/nodes", "admin"))[0] == 200
        headers = {"Authorization": "Bearer admin"}
        async with client.get("/api/v1/nodes", headers=headers) as answer:
            assert (answer.status, int(answer.headers["Retry-After"]) >= 1) == (429, True)
        assert (await told(client, "/api/v1/nodes", "user"))[0] == 200
        assert (await told(client, "/healthz", None))[0] == 200


def test_a_rate_fills_up_again_and_remembers_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Slow()
    rate = Rate(clock, per_second=2.0, burst=3.0)  # type: ignore[arg-type]
    assert [rate.wait_s("a") for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now_s = 0.5
    assert [rate.wait_s("a"), rate.wait_s("a")] == [0, 0.5]
    clock.now_s = 100.0
    assert [rate.wait_s("a") for _ in range(4)] == [0, 0, 0, 0.5]
    monkeypatch.setattr("scheduler.web.access.SUBJECTS_MAX", 10)
    for number in range(50):
        rate.wait_s(f"one-{number}")
    assert len(rate._left) == 10


def test_a_call_that_takes_long_counts_as_several_and_a_debt_has_an_end() -> None:
    clock = Slow()
    rate = Rate(clock, per_second=10.0, burst=20.0)  # type: ignore[arg-type]
    assert rate.wait_s("a") == 0
    rate.charge("a", CALL_S / 2)
    assert rate._left["a"][0] == 19
    rate.charge("a", CALL_S * 11)
    assert rate._left["a"][0] == 9
    rate.charge("a", 3600)
    assert rate.wait_s("a") == pytest.approx(2.1)
    assert rate.wait_s("b") == 0
    clock.now_s = 2.2
    assert rate.wait_s("a") == 0


async def test_who_has_much_explained_is_put_off_but_for_administrators(monkeypatch: pytest.MonkeyPatch) -> None:
    door, clock = Door(), Slow()
    app = api_app(door.faces.views, Access((door.known,), Rate(clock, 50.0, 100.0)))  # type: ignore[arg-type]

    def long(*_: object) -> dict[str, object]:
        clock.now_s += 0.5
        return {}

    door.app()
    monkeypatch.setattr("scheduler.web.views.explanation", long)
    async with serving(app) as client:
        for role, put_off in ((Role.USER, True), (Role.ADMIN, False)):
            found = [(await told(client, "/api/v1/requests/uid-a/explanation", role.value))[0] for _ in range(3)]
            assert found == ([200, 429, 429] if put_off else [200, 200, 200])


def test_a_route_without_a_row_does_not_start() -> None:
    app = web.Application()
    app.router.add_get("/api/v1/nodes", _nothing)
    seal(app)
    app.router.add_post("/api/v1/nodes", _nothing)
    with pytest.raises(ConfigError, match="POST /api/v1/nodes"):
        seal(app)


async def _nothing(_: web.Request) -> web.Response:
    return web.Response()


def test_every_row_names_every_role_and_a_route_that_there_is() -> None:
    app = api_app(Faces().views, Access((), Rate(RealClock())))
    there = {route.resource.canonical for route in app.router.routes() if route.resource}
    assert {path for _, path in RULES} == there
    assert all(row is ANYBODY or set(row) == set(Role) for row in RULES.values())


def test_reach_is_the_sum_of_the_grants() -> None:
    names, queues, scopes = ("", "a", "b"), ("", "q", "r"), list(Scope)
    grants = [Grant(Role.USER, _set(one), _set(two)) for one, two in itertools.product(names, queues)]
    for first, second in itertools.product(grants, grants):
        for scope in scopes:
            reach = reach_of((first, second), {Role.USER: scope})
            for namespace, queue in itertools.product("ab", "qr"):
                own = namespace in first.namespaces | second.namespaces
                its = queue in first.queues | second.queues
                wanted = {Scope.NONE: False, Scope.OWN: own, Scope.QUEUE: own or its, Scope.ALL: True}[scope]
                assert reach.covers(namespace, queue) is wanted
    assert not reach_of((Grant(Role.USER),), {})
    assert not Reach()
    assert not Reach(namespaces=frozenset({"a"})).covers("", "")


def _set(name: str) -> frozenset[str]:
    return frozenset({name} if name else ())


@pytest.mark.parametrize(
    ("user", "groups", "roles"),
    [
        ("alice", (), {Role.ADMIN}),
        ("bob", ("team",), {Role.USER}),
        ("alice", ("team",), {Role.ADMIN, Role.USER}),
        ("team", ("alice",), set()),
        ("oidc:alice", (), set()),
    ],
)
def test_bindings_tell_people_from_groups_and_one_source_from_another(
    user: str, groups: Iterable[str], roles: set[Role]
) -> None:
    bindings = (
        Binding(Grant(Role.ADMIN), users=frozenset({"oidc:alice"})),
        Binding(Grant(Role.USER, VISION), groups=frozenset({"oidc:team"})),
    )
    assert {grant.role for grant in bound("oidc", user, groups, bindings).grants} == roles
    assert not bound("kubernetes", user, groups, bindings).grants


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]", 200),
        ("[::1]:8080", 200),
        ("evil.example", 401),
        ("evil.example:8080", 401),
        ("127.0.0.1.evil.example", 401),
        ("10.0.0.1", 401),
        ("localhost.", 401),
    ],
)
async def test_without_access_only_this_machines_names_are_answered(host: str, status: int) -> None:
    app = api_app(Faces().views, Access((), Rate(RealClock())))
    async with serving(app) as client, client.get("/api/v1/nodes", headers={"Host": host}) as answer:
        assert answer.status == status
    async with serving(Door().app()) as client:
        headers = {"Host": host, "Authorization": "Bearer admin"}
        async with client.get("/api/v1/nodes", headers=headers) as answer:
            assert answer.status == 200
