"""The three listeners over real sockets: wire format, limits, problems, health."""

from __future__ import annotations

import gzip
import io
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from scheduler.clock import RealClock
from scheduler.decision.pipeline import Policies
from scheduler.dependencies import Dependency
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.intake.extender import BindArgs
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.ledger.ledger import advance
from scheduler.ledger.taking import newborn
from scheduler.metrics import Metrics
from scheduler.model.reservation import Event
from scheduler.web.access import Access, Rate
from scheduler.web.extender import BODY_MAX, NAMES_MAX, Extender
from scheduler.web.http1 import ListenerRunner
from scheduler.web.routes import api_app, extender_routes, metrics_app
from scheduler.web.views import Views
from tests.objects import raw_node, raw_pod

OPEN = Access((), Rate(RealClock()))
ROWS = (("d", "vision", 5), ("b", "default", 9), ("a", "vision", 0), ("c", "default", 0))


class Faces:
    """A desk behind the real applications; binds are recorded and answered with `problem`."""

    def __init__(self) -> None:
        self.clock = RealClock()
        self.desk = Desk(self.clock, Policies())
        for name, mode in (("a", "exact"), ("b", "observed")):
            node = read_node(raw_node(name, mode=mode), {})
            assert node is not None
            self.desk.registry.put_node(node)
        self.unready = ""
        self.problem = ""
        self.bound: list[BindArgs] = []
        metrics = Metrics(self.clock, "test")
        metrics.watch(self.desk, lambda: 1.5, list)
        self.extender = Extender(self.desk, self.clock, metrics, lambda: self.unready, self.bind)
        self.views = Views(self.desk, metrics, lambda: self.unready)

    async def bind(self, args: BindArgs) -> str:
        self.bound.append(args)
        return self.problem

    def runner(self) -> ListenerRunner:
        return ListenerRunner(extender_routes(self.extender, self.views), BODY_MAX, shutdown_timeout=0.1)


@asynccontextmanager
async def serving(served: web.Application | web.BaseRunner) -> AsyncGenerator[aiohttp.ClientSession, None]:
    runner = web.AppRunner(served, access_log=None) if isinstance(served, web.Application) else served
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession(f"http://{host}:{port}") as client:
        yield client
    await runner.cleanup()


async def status(call: AbstractAsyncContextManager[aiohttp.ClientResponse]) -> int:
    async with call as answer:
        await answer.read()
        return answer.status


def body(gpus: int = 1, names: list[str] | None = None) -> bytes:
    return orjson.dumps({"Pod": raw_pod("p", gpus), "Nodes": None, "NodeNames": ["a", "b"] if names is None else names})


async def test_filter_names_one_node_with_a_content_length() -> None:
    async with serving(Faces().runner()) as client:
        answer = await client.post("/scheduler/filter", data=body())
        assert answer.status == 200
        assert "Content-Length" in answer.headers
        reply = orjson.loads(await answer.read())
    assert len(reply["NodeNames"]) == 1
    assert reply["FailedAndUnresolvableNodes"] == {}
    assert reply["Error"] == ""


async def test_a_refusal_is_one_constant_for_every_node_offered() -> None:
    async with serving(Faces().runner()) as client:
        first = await (await client.post("/scheduler/filter", data=body(gpus=99))).read()
        again = await (await client.post("/scheduler/filter", data=body(gpus=99))).read()
    assert first == again
    reply = orjson.loads(first)
    assert reply["NodeNames"] == []
    assert reply["FailedNodes"] == {}
    assert set(reply["FailedAndUnresolvableNodes"]) == {"a", "b"}
    assert len(set(reply["FailedAndUnresolvableNodes"].values())) == 1


async def test_prioritize_is_a_bare_list() -> None:
    async with serving(Faces().runner()) as client:
        reply = orjson.loads(await (await client.post("/scheduler/prioritize", data=body())).read())
    assert {entry["Host"] for entry in reply} == {"a", "b"}
    assert max(entry["Score"] for entry in reply) == 10


async def test_bind_passes_the_identity_on_and_tells_what_went_wrong() -> None:
    args = {"PodName": "p", "PodNamespace": "default", "PodUID": "u", "Node": "a"}
    async with serving((faces := Faces()).runner()) as client:
        assert orjson.loads(await (await client.post("/scheduler/bind", json=args)).read()) == {"Error": ""}
        faces.problem = "no"
        assert orjson.loads(await (await client.post("/scheduler/bind", json=args)).read()) == {"Error": "no"}
    assert faces.bound[0] == BindArgs(name="p", namespace="default", uid="u", node="a")


@pytest.mark.parametrize("verb", ["filter", "prioritize", "bind"])
@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"null", b'{"Pod":1}', b"\xff\xfe", b'{"NodeNames":[1]}'])
async def test_junk_is_a_400_with_a_sentence(verb: str, junk: bytes) -> None:
    async with serving(Faces().runner()) as client:
        answer = await client.post(f"/scheduler/{verb}", data=junk)
        assert answer.status == 400
        assert orjson.loads(await answer.read())["Error"].startswith("extender.malformed: ")


async def test_compressed_bodies_are_refused_unread() -> None:
    async with serving(Faces().runner()) as client:
        answer = await client.post(
            "/scheduler/filter", data=gzip.compress(body()), headers={"Content-Encoding": "gzip"}
        )
        assert answer.status == 415
        assert (await answer.json(content_type=None))["code"] == "body.encoded"


async def test_fifty_thousand_names_pass_and_one_more_does_not() -> None:
    names = [f"node-{number:06}.{'x' * 200}" for number in range(NAMES_MAX)]
    async with serving(Faces().runner()) as client:
        assert await status(client.post("/scheduler/filter", data=io.BytesIO(body(names=names)))) == 200
        assert await status(client.post("/scheduler/filter", data=io.BytesIO(body(names=[*names, "one"])))) == 400
        assert await status(client.post("/scheduler/filter", data=io.BytesIO(b" " * (17 << 20)))) == 413


@pytest.mark.parametrize("verb", ["filter", "prioritize"])
async def test_a_million_names_are_refused_unread(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faces, crowd = Faces(), body(names=["n"] * 1_000_000)
    monkeypatch.setattr("scheduler.web.extender.read_filter", None)
    answered, said = await getattr(faces.extender, verb)(crowd)
    assert (answered, b"more than 50000 node names" in said) == (400, True)


async def fail(dependency: Dependency) -> None:
    """Open a breaker."""
    for _ in range(5):
        with suppress(StoreError), dependency.asked(StoreError, lambda _: (True, 0.0)):
            raise StoreError("failed")


async def test_while_a_breaker_is_open_the_answer_is_one_constant_and_nothing_is_read() -> None:
    faces = Faces()
    faces.extender.unready = faces.desk.dependencies.trouble
    await fail(faces.desk.dependencies.store)
    crowd = body(names=[f"node-{number}" for number in range(50_000)])
    said, took_s = set(), []
    for verb, sent in (("filter", crowd), ("filter", b"{"), ("bind", b"{"), ("filter", body())) * 5:
        began_s = time.perf_counter()
        said.add(await getattr(faces.extender, verb)(sent))
        took_s.append(time.perf_counter() - began_s)
    ((answered, text),) = said
    assert (answered, set(orjson.loads(text))) == (200, {"Error"})
    assert sorted(took_s)[10] < 0.005
    assert not faces.bound
    assert not faces.desk.intents
    assert faces.desk.called_s is not None  # kube-scheduler is there


async def test_a_pod_that_the_ledger_does_not_know_yet_is_shown_as_held_or_as_about_to_be_judged() -> None:
    faces = Faces()
    pod = read_pod(raw_pod("new", 1))
    faces.desk.registry.put_pod(pod)
    faces.desk.registry.put_pod(replace(read_pod(raw_pod("over", 1)), terminal=True))
    async with serving(api_app(faces.views, OPEN)) as client:

        async def shown() -> tuple[str, str, str]:
            (item,) = (await (await client.get("/api/v1/requests", params={"name": "new"})).json())["items"]
            one = await (await client.get(item["links"]["self"])).json()
            why = await (await client.get(item["links"]["explanation"])).json()
            assert (item["state"], item["position"]) == (one["state"], one["position"]) == (why["state"], None)
            return item["state"], item["reason"], why["reasons"][0]["code"]

        assert await shown() == ("QUEUED", "PendingEvaluation", "PendingEvaluation")
        await fail(faces.desk.dependencies.store)
        assert await shown() == ("HELD", "AllocatorUnavailable", "AllocatorUnavailable")
        faces.desk.book.apply(
            (advance(None, Event.SUBMIT, now_us=1, fence=0, born=newborn(pod.request, fence=0, now_us=1)),)
        )
        why = await (await client.get(f"/api/v1/requests/{pod.uid}/explanation")).json()
        assert (why["state"], why["reasons"][0]["code"]) == ("QUEUED", "AllocatorUnavailable")
        assert await status(client.get("/api/v1/requests/uid-over")) == 404


async def test_nothing_is_decided_before_the_inventory_is_ready() -> None:
    async with serving((faces := Faces()).runner()) as client:
        faces.unready = "starting"
        assert orjson.loads(await (await client.post("/scheduler/filter", data=body())).read())["Error"]
        assert await status(client.get("/readyz")) == 503
        assert await status(client.get("/healthz")) == 200
        faces.unready = ""
        assert await status(client.get("/readyz")) == 200
    assert not faces.desk.intents


async def test_views_page_through_everything_once() -> None:
    faces = Faces()
    for number in range(7):
        faces.desk.claim(read_pod(raw_pod(f"p{number}", 1)), "a")
    async with serving(api_app(faces.views, OPEN)) as client:
        seen, cursor = [], ""
        while cursor is not None:
            page = await (await client.get("/api/v1/requests", params={"limit": "3", "cursor": cursor})).json()
            seen += [item["name"] for item in page["items"]]
            cursor = page["next"]
        assert sorted(seen) == [f"p{number}" for number in range(7)]
        one = await (await client.get("/api/v1/requests/uid-p3")).json()
        assert one["state"] == "RESERVED"
        assert one["allocation"]["node"] == "a"
        assert (await (await client.get("/api/v1/requests?state=RUNNING")).json())["items"] == []
        assert (await (await client.get("/api/v1/requests?state=RESERVED,RUNNING")).json())["items"]
        unknown = await client.get("/api/v1/requests?state=QUEUED,LOST")
        assert unknown.status == 400
        assert "'LOST'" in (await unknown.json())["detail"]
        gpus = (await (await client.get("/api/v1/gpus?limit=500")).json())["items"]
        assert sum(gpu["use"] == "whole" for gpu in gpus) == 7
        nodes = (await (await client.get("/api/v1/nodes")).json())["items"]
        assert {node["name"]: node["gpus"]["free"] for node in nodes} == {"a": 1, "b": 8}


async def test_waiting_requests_say_why_and_where_in_line_in_every_order() -> None:
    faces = Faces()
    for number, (name, queue, priority) in enumerate(ROWS):
        pod = read_pod(raw_pod(name, 9, created=f"2026-01-01T00:00:{9 - number:02}Z"))
        pod = replace(pod, request=replace(pod.request, queue=queue, priority=priority))
        faces.desk.registry.put_pod(pod)
        born = newborn(pod.request, fence=0, now_us=faces.clock.wall_us())
        faces.desk.book.apply((advance(None, Event.SUBMIT, now_us=1, fence=0, born=born),))
    faces.desk.claim(read_pod(raw_pod("bound", 1, created="2026-01-01T00:00:30Z")), "a")
    faces.desk.order.words["uid-d"] = "WaitingForQuota"
    async with serving(api_app(faces.views, OPEN)) as client:

        async def listed(**query: str) -> list[dict[str, Any]]:
            seen, cursor = [], ""
            while cursor is not None:
                answer = await client.get("/api/v1/requests", params={"limit": "2", "cursor": cursor, **query})
                page = await answer.json()
                seen += page["items"]
                cursor = page["next"]
            return seen

        def names(found: list[dict[str, Any]]) -> str:
            return " ".join(one["name"] for one in found)

        assert names(await listed()) == names(await listed(sort="arrival")) == "c a b d bound"
        assert names(await listed(sort="-arrival")) == "bound d b a c"
        assert names(await listed(sort="name")) == "a b bound c d"
        assert names(await listed(sort="state")) == "c a b d bound"
        assert names(await listed(queue="vision", state="QUEUED")) == "a d"
        assert names(await listed(namespace="elsewhere")) == ""
        found = {one["name"]: (one["position"], one["reason"]) for one in await listed()}
        one = await (await client.get("/api/v1/requests/uid-b")).json()
    assert found == {
        "a": (2, "PendingEvaluation"),
        "b": (1, "PendingEvaluation"),
        "c": (2, "PendingEvaluation"),
        "d": (1, "WaitingForQuota"),
        "bound": (None, ""),
    }
    assert one["position"] == 1


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/v1/requests/none", 404, "request.not_found"),
        ("/api/v1/requests/none/explanation", 404, "request.not_found"),
        ("/api/v1/requests?limit=0", 400, "request.malformed"),
        ("/api/v1/requests?cursor=%25", 400, "request.malformed"),
        ("/api/v1/requests?limit=many", 400, "request.malformed"),
        ("/api/v1/requests?state=queued", 400, "request.malformed"),
        ("/api/v1/requests?sort=size", 400, "request.malformed"),
        ("/api/v1/requests?sort=name&cursor=YXJyaXZhbCAwMA==", 400, "request.malformed"),
        ("/api/v1/nowhere", 404, "http.404"),
    ],
)
async def test_problems_have_a_code_and_a_sentence(path: str, status: int, code: str) -> None:
    async with serving(api_app(Faces().views, OPEN)) as client:
        answer = await client.get(path)
        assert answer.status == status
        assert answer.content_type == "application/problem+json"
        reply = await answer.json(content_type=None)
        assert reply["code"] == code
        assert reply["detail"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/v1/requests?stat=QUEUED", ["'stat'", "state, queue, namespace, name, sort, limit, cursor"]),
        ("/api/v1/nodes?state=ok", ["'state'", "known are limit, cursor"]),
        ("/api/v1/gpus?limit=5&node=a", ["'node'", "known are limit, cursor"]),
        ("/api/v1/queues?name=default", ["'name'", "known are limit, cursor"]),
        ("/api/v1/queues/default?limit=5", ["'limit'", "there are none here"]),
        ("/api/v1/requests/x?full", ["'full'", "there are none here"]),
        ("/api/v1/requests/x/explanation?lang=ko", ["'lang'", "there are none here"]),
        ("/api/v1/me?" + "x" * 4000, ["xxx'...", "there are none here"]),
    ],
)
async def test_a_parameter_that_nobody_knows_is_refused_by_name(path: str, words: list[str]) -> None:
    async with serving(api_app(Faces().views, OPEN)) as client:
        answer = await client.get(path)
        reply = await answer.json(content_type=None)
    assert (answer.status, reply["code"]) == (400, "request.malformed")
    assert all(word in reply["detail"] for word in words)
    assert len(reply["detail"]) < 400


async def test_metrics_are_few_and_named_by_the_rules() -> None:
    faces = Faces()
    await faces.extender.filter(body(gpus=99))
    async with serving(metrics_app(faces.views)) as client:
        text = await (await client.get("/metrics")).text()
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(samples) < 2000
    assert all(line.startswith("tessera_") for line in samples)
    assert 'tessera_gpus{model="NVIDIA-H100-80GB-HBM3",state="free"} 16.0' in samples
    assert "tessera_filter_rejections_total" in text
    assert "uid-" not in text
