"""The webhook as kube-apiserver meets it: answers, limits, and what each kind of junk gets, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import gzip
import ssl
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import trustme
from aiohttp import web
from prometheus_client import CollectorRegistry

from scheduler.embedded.patching import patched
from scheduler.intake.admission import BadReview
from scheduler.web import webhook as subject
from scheduler.web.patience import GuardedRunner
from scheduler.web.tls import Files, RotatingContext, TlsSite
from scheduler.web.webhook import BODY_MAX, Webhook, webhook_app
from tests.objects import raw_pod

Json = dict[str, Any]


def review(pod: Json, **request: object) -> bytes:
    asked = {"uid": "u-1", "operation": "CREATE", "resource": {"group": "", "version": "v1", "resource": "pods"}}
    return orjson.dumps(
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {**asked, "object": pod, **request}}
    )


@asynccontextmanager
async def serving(webhook: Webhook) -> AsyncGenerator[tuple[aiohttp.ClientSession, int], None]:
    runner = GuardedRunner(webhook_app(webhook), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession(f"http://{host}:{port}") as client:
        yield client, port
    await runner.cleanup()


def counts(registry: CollectorRegistry) -> dict[str, float]:
    every = ((one, registry.get_sample_value("tessera_admission_reviews_total", {"outcome": one})) for one in OUTCOMES)
    return {outcome: value for outcome, value in every if value}


OUTCOMES = ("held", "untouched", "refused", "malformed")


def test_bytes_in_bytes_out_and_each_outcome_is_counted() -> None:
    registry = CollectorRegistry()
    webhook = Webhook(registry)
    pod = raw_pod("p", 2, scheduler="default-scheduler")
    response = orjson.loads(webhook.mutate(review(pod)))["response"]
    after = patched(pod, orjson.loads(base64.b64decode(response["patch"])), "json")
    assert after["spec"]["schedulingGates"] == [{"name": "tessera.dev/hold"}]
    assert after["spec"]["schedulerName"] == "tessera"
    assert orjson.loads(webhook.mutate(review(raw_pod("p", 0, scheduler="x"))))["response"] == {
        "uid": "u-1",
        "allowed": True,
    }
    assert orjson.loads(webhook.mutate(review(pod, operation="UPDATE")))["response"]["allowed"]
    bad = raw_pod("p", annotations={"tessera.dev/gpu-milli": "1"})
    assert not orjson.loads(webhook.mutate(review(bad)))["response"]["allowed"]
    with pytest.raises(BadReview):
        webhook.mutate(b"{")
    assert counts(registry) == {"held": 1, "untouched": 2, "refused": 1, "malformed": 1}


def test_the_same_body_gets_the_same_bytes() -> None:
    webhook = Webhook(CollectorRegistry())
    body = review(raw_pod("p", 2))
    assert webhook.mutate(body) == webhook.mutate(body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(review(raw_pod("p", annotations={"x": "y" * (BODY_MAX - 2000)})), id="one long annotation"),
        pytest.param(review({**raw_pod("p"), "x": [[0] * 8] * 28_000}), id="many small things"),
        pytest.param(b"[" * BODY_MAX, id="deep"),
        pytest.param(
            review(raw_pod("p", annotations={f"tessera.dev/gpu-mode{number:05}": "" for number in range(16_000)})),
            id="many misspelt wishes",
        ),
        pytest.param(
            review(
                {**raw_pod("p"), "spec": {"containers": [{"name": "c", "resources": {"limits": {"a/b": "1"}}}] * 9000}}
            ),
            id="many containers",
        ),
    ],
)
def test_the_largest_bodies_take_a_small_part_of_the_budget(body: bytes) -> None:
    assert BODY_MAX * 0.8 < len(body) <= BODY_MAX
    webhook = Webhook(CollectorRegistry())
    began = time.process_time()
    try:
        webhook.mutate(body)
    except BadReview:
        assert body.startswith(b"[")
    assert time.process_time() - began < subject.BUDGET_S / 2


async def test_over_http() -> None:
    async with serving(Webhook(CollectorRegistry())) as (client, _):
        answer = await client.post("/mutate?timeout=2s", data=review(raw_pod("p", 1)))
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert (await answer.json())["response"]["uid"] == "u-1"
        assert "Content-Length" in answer.headers
        assert (await client.get("/healthz")).status == 200


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code"),
    [
        ("/mutate", b"", {}, 400, "review.malformed"),
        ("/mutate", b"\xff", {}, 400, "review.malformed"),
        ("/mutate", b"[" * 100_000, {}, 400, "review.malformed"),
        ("/mutate", b"x" * (BODY_MAX + 1), {}, 413, "body.too_large"),
        ("/mutate", gzip.compress(b"{}"), {"Content-Encoding": "gzip"}, 415, "body.encoded"),
        ("/other", b"{}", {}, 404, "http.404"),
        ("/scheduler/bind", b"{}", {}, 404, "http.404"),
    ],
)
async def test_junk_gets_a_problem(path: str, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    async with serving(Webhook(CollectorRegistry())) as (client, _):
        answer = await client.post(path, data=body, headers=headers)
        assert (answer.status, answer.content_type) == (status, "application/problem+json")
        said = await answer.json(content_type=None)
        assert said["code"] == code
        assert said["detail"]


def write(folder: Path, authority: trustme.CA) -> None:
    """Write a certificate for this machine and its key."""
    leaf = authority.issue_cert("127.0.0.1")
    (folder / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(folder / "tls.key"))


async def test_files_that_are_replaced_count_from_the_next_connection_on(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    write(tmp_path, first)
    runner = GuardedRunner(webhook_app(Webhook(CollectorRegistry())), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    context = RotatingContext.of(Files(tmp_path / "tls.crt", tmp_path / "tls.key"))
    await TlsSite(runner, "127.0.0.1", 0, context=context).start()
    url = f"https://127.0.0.1:{runner.addresses[0][1]}/mutate"

    async def answered(authority: trustme.CA) -> bool:
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        async with aiohttp.ClientSession() as client:
            try:
                async with client.post(url, data=review(raw_pod("p", 1)), ssl=trust) as answer:
                    return answer.status == 200
            except aiohttp.ClientConnectorCertificateError:
                return False

    assert (await answered(first), await answered(second)) == (True, False)
    write(tmp_path, second)
    assert (await answered(first), await answered(second)) == (False, True)
    (tmp_path / "tls.key").write_text("junk")
    assert await answered(second)
    await runner.cleanup()


async def test_a_fault_of_ours_is_a_500_with_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "admit", lambda _: 1 / 0)
    async with serving(Webhook(CollectorRegistry())) as (client, _):
        answer = await client.post("/mutate", data=review(raw_pod("p", 1)))
        assert answer.status == 500
        assert (await answer.json(content_type=None))["code"] == "internal"
        assert (await client.get("/healthz")).status == 200


async def test_a_body_that_does_not_come_in_the_budget_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BUDGET_S", 0.05)
    async with serving(Webhook(CollectorRegistry())) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
