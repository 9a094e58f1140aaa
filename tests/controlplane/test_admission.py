"""Admission on a real API server: the shipped webhook and policies, Tessera's own certificate, and break-glass."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.admission import HOLD, MANAGED, PLAIN, acts, called_at, prepare, until
from bench.apiclient import JSON_PATCH, STRATEGIC, ApiClient, Json
from bench.kube_objects import create_pods, pod_object, pod_path
from bench.manifests import apply, pick, read_base
from bench.product import Product
from bench.realcluster import DEVELOPER, KUBELET, TESSERA, RealCluster
from scheduler.cli import release as releasing
from scheduler.cli.release import Released

CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
BINDINGS = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
WITHOUT_HOLD = {"spec": {"schedulingGates": [{"$patch": "delete", "name": HOLD}]}}
GPU = {"nvidia.com/gpu": "1"}


@pytest.fixture(scope="module")
def product(real_cluster: RealCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """Tessera with a webhook and a certificate of its own, called by the API server."""
    kubeconfig = real_cluster.kubeconfig(TESSERA)
    made = Product(tmp_path_factory.mktemp("webhook"), kubeconfig, flags=["--webhook=127.0.0.1:0"])

    async def begin() -> None:
        async with real_cluster.client() as api:
            await prepare(api)
            await made.start()
            await acts(api, made.webhook)

    async def end() -> None:
        assert await made.stop() == 0
        async with real_cluster.client() as api:
            await apply(api, [pick(read_base(), "MutatingWebhookConfiguration", "tessera")])

    asyncio.run(begin())
    yield made
    asyncio.run(end())


@pytest.fixture
async def developer(real_cluster: RealCluster, product: Product) -> AsyncIterator[ApiClient]:
    async with real_cluster.client(DEVELOPER) as api:
        yield api


async def make(api: ApiClient, name: str = "p", **kind: Any) -> Json:
    pod = pod_object(name, scheduler="default-scheduler", **{"namespace": MANAGED, "requests": GPU, **kind})
    (made,) = await create_pods(api, [pod])
    return made


def gates(pod: Json) -> list[str]:
    return [gate["name"] for gate in pod["spec"].get("schedulingGates", ())]


@asynccontextmanager
async def called(admin: ApiClient, product: Product, url: str) -> AsyncIterator[None]:
    """The API server calls this URL for a while."""
    await apply(admin, [called_at(url)])
    try:
        yield
    finally:
        await acts(admin, product.webhook)


@asynccontextmanager
async def bound(admin: ApiClient, api: ApiClient, role: str) -> AsyncIterator[None]:
    """The developer has a cluster role for a while."""
    group = "rbac.authorization.k8s.io"
    body = {
        "metadata": {"name": "break-glass"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": "User", "name": DEVELOPER}],
    }
    path = f"/apis/{group}/v1/clusterrolebindings"
    await admin.post(path, body)

    async def may() -> bool:
        review = {"spec": {"resourceAttributes": {"group": "tessera.dev", "resource": "holds", "verb": "release"}}}
        asked = await api.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return bool(asked["status"]["allowed"])

    try:
        await until(may, "the role is not seen")
        yield
    finally:
        await admin.delete(f"{path}/break-glass")


async def command(*arguments: str) -> tuple[int, Json, str]:
    """Run `tessera release ... --json`."""
    argv = [sys.executable, "-m", "scheduler", "release", *arguments, "--json"]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe)
    out, said = await child.communicate()
    assert child.returncode is not None
    return child.returncode, json.loads(out.splitlines()[-1]), said.decode()


async def test_tessera_makes_its_certificate_and_says_whom_to_trust(admin: ApiClient, product: Product) -> None:
    secret = (await admin.get("/api/v1/namespaces/tessera-system/secrets/tessera-webhook"))["data"]
    assert set(secret) == {"ca.crt", "ca.key", "tls.crt", "tls.key"}
    (hook,) = (await admin.get(f"{CONFIGURATIONS}/tessera"))["webhooks"]
    assert hook["clientConfig"] == {"url": product.webhook, "caBundle": secret["ca.crt"]}
    assert base64.b64decode(secret["ca.crt"]).startswith(b"-----BEGIN CERTIFICATE")


async def test_applying_the_base_again_takes_nothing_away(admin: ApiClient, product: Product) -> None:
    before = await admin.get("/api/v1/namespaces/tessera-system/secrets/tessera-webhook")
    await apply(admin, [pick(read_base(), "Secret", "tessera-webhook")])
    after = await admin.get("/api/v1/namespaces/tessera-system/secrets/tessera-webhook")
    assert after["data"] == before["data"]
    await apply(admin, [called_at(product.webhook)])
    (hook,) = (await admin.get(f"{CONFIGURATIONS}/tessera"))["webhooks"]
    assert hook["clientConfig"]["caBundle"] == before["data"]["ca.crt"]


async def test_a_gpu_pod_is_held_and_warned_about_what_was_read_differently(developer: ApiClient) -> None:
    pod = await make(developer, requests={"cpu": "1", "nvidia.com/gpu": "1", "nvidia.com/gpumem": "3000"})
    assert gates(pod) == [HOLD]
    assert pod["spec"]["schedulerName"] == "tessera"
    assert pod["metadata"]["labels"] == {"tessera.dev/queue": "default"}
    assert pod["metadata"]["annotations"] == {"tessera.dev/gpu-memory": "3000Mi"}
    amounts = {"cpu": "1", "tessera.dev/share": "1"}
    assert pod["spec"]["containers"][0]["resources"] == {"limits": amounts, "requests": amounts}
    assert pod["status"]["conditions"][0]["reason"] == "SchedulingGated"


WAYS = {
    "strategic": ("PATCH", STRATEGIC, WITHOUT_HOLD),
    "merge": ("PATCH", "", {"spec": {"schedulingGates": None}}),
    "json": ("PATCH", JSON_PATCH, [{"op": "remove", "path": "/spec/schedulingGates"}]),
}


@pytest.mark.parametrize("way", [*WAYS, "put"])
async def test_a_developer_cannot_take_the_gate_off(developer: ApiClient, way: str) -> None:
    pod = await make(developer)
    if way == "put":
        method, content, body = "PUT", "", {**pod, "spec": {**pod["spec"], "schedulingGates": []}}
    else:
        method, content, body = WAYS[way]  # type: ignore[assignment]
    reply = await developer.ask(method, pod_path(pod), body, content_type=content)
    assert reply.status == 422
    assert "only Tessera removes the gate tessera.dev/hold" in reply.message
    assert gates(await developer.get(pod_path(pod))) == [HOLD]


@pytest.mark.parametrize("subresource", ["status", "resize", "ephemeralcontainers"])
async def test_no_subresource_takes_it_off(developer: ApiClient, subresource: str) -> None:
    pod = await make(developer)
    await developer.ask("PATCH", pod_path(pod, subresource), WITHOUT_HOLD, content_type=STRATEGIC)
    assert gates(await developer.get(pod_path(pod))) == [HOLD]


async def test_other_gates_and_everything_else_are_the_developers(developer: ApiClient) -> None:
    pod = await make(developer, gates=["example.com/wait"])
    assert gates(pod) == ["example.com/wait", HOLD]
    other = {"spec": {"schedulingGates": [{"$patch": "delete", "name": "example.com/wait"}]}}
    pod = await developer.patch(pod_path(pod), other, content_type=STRATEGIC)
    assert gates(pod) == [HOLD]
    await developer.patch(pod_path(pod), {"metadata": {"labels": {"colour": "blue"}}})
    assert (await developer.ask("DELETE", pod_path(pod))).status == 200


async def test_tessera_takes_it_off(developer: ApiClient, tessera: ApiClient) -> None:
    pod = await make(developer)
    body = {"metadata": {"uid": pod["metadata"]["uid"]}, **WITHOUT_HOLD}
    assert gates(await tessera.patch(pod_path(pod), body, content_type=STRATEGIC)) == []


async def test_elsewhere_the_gate_is_anybodys(developer: ApiClient) -> None:
    pod = await make(developer, namespace=PLAIN, gates=[HOLD])
    assert gates(await developer.patch(pod_path(pod), WITHOUT_HOLD, content_type=STRATEGIC)) == []


async def test_a_kubelets_mirror_pod_passes(real_cluster: RealCluster, product: Product) -> None:
    static = pod_object("static", namespace=MANAGED, requests=GPU, annotations={"kubernetes.io/config.mirror": "a"})
    static["spec"] |= {"nodeName": "gpu-00001", "schedulerName": "default-scheduler"}
    async with real_cluster.client(KUBELET) as kubelet:
        (pod,) = await create_pods(kubelet, [static])
    assert gates(pod) == []


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def test_while_it_is_away_jobs_wait_and_go_on_by_themselves(
    real_cluster: RealCluster, admin: ApiClient, developer: ApiClient, product: Product
) -> None:
    template = pod_object("", namespace=MANAGED, requests=GPU, scheduler="default-scheduler")
    spec = {"template": {"spec": {**template["spec"], "restartPolicy": "Never"}}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": spec}
    listed = f"/api/v1/namespaces/{MANAGED}/pods?labelSelector=batch.kubernetes.io/job-name%3Dtrain"
    async with called(admin, product, f"https://127.0.0.1:{closed_port()}/mutate"):

        async def refused() -> bool:
            reply = await developer.ask(
                "POST", f"/api/v1/namespaces/{MANAGED}/pods", pod_object("p", namespace=MANAGED, requests=GPU)
            )
            return reply.status == 422 and "create the pod again in a moment" in reply.message

        await until(refused, "V3 does not refuse")
        await real_cluster.start_controller_manager()
        await admin.post(f"/apis/batch/v1/namespaces/{MANAGED}/jobs", job)

        async def told() -> bool:
            events = (await admin.get(f"/api/v1/namespaces/{MANAGED}/events"))["items"]
            return any("create the pod again" in event.get("message", "") for event in events)

        await until(told, "no Event says why the Job has no pod")
        assert (await admin.get(listed))["items"] == []

    async def there() -> bool:
        return bool((await admin.get(listed))["items"])

    await until(there, "the Job's pod did not come")
    (pod,) = (await admin.get(listed))["items"]
    assert gates(pod) == [HOLD]
    await admin.delete(f"/apis/batch/v1/namespaces/{MANAGED}/jobs/train", {"propagationPolicy": "Background"})

    async def gone() -> bool:
        return not await there()

    await until(gone, "the Job's pod did not go")


async def test_one_that_hangs_delays_nobody_but_gpu_pods(
    admin: ApiClient, developer: ApiClient, product: Product
) -> None:
    calls: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: calls.append(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with called(admin, product, f"https://127.0.0.1:{port}/mutate"):

        async def reached() -> bool:
            pod = pod_object("gpu", namespace=MANAGED, requests=GPU)
            reply = await developer.ask("POST", f"/api/v1/namespaces/{MANAGED}/pods?dryRun=All", pod)
            return bool(calls) and reply.status == 422

        await until(reached, "it is not called")
        before, began = len(calls), time.monotonic()
        for number in range(5):
            await make(developer, f"cpu-{number}", requests={"cpu": "1"})
        assert time.monotonic() - began < 1.5  # less than one time-out
        assert len(calls) == before
    for writer in calls:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    server.close()


async def test_release_needs_the_right_and_then_works(
    real_cluster: RealCluster, admin: ApiClient, developer: ApiClient
) -> None:
    await make(developer, "one")
    mine = f"--kubeconfig={real_cluster.kubeconfig(DEVELOPER)}"
    code, body, said = await command("one", "-n", MANAGED, mine)
    assert (code, body["ok"], body["released"]) == (1, False, [])
    assert "only Tessera removes the gate" in body["refused"][0]["text"]
    assert body["refused"][0]["pod"] == f"{MANAGED}/one"
    async with bound(admin, developer, "tessera-release"):
        code, body, said = await command("one", "-n", MANAGED, mine)
    assert (code, body) == (0, {"released": [f"{MANAGED}/one"], "refused": [], "seed": None, "ok": True})
    assert f"released {MANAGED}/one" in said
    assert gates(await developer.get(f"/api/v1/namespaces/{MANAGED}/pods/one")) == []
    code, body, said = await command("one", "-n", MANAGED, mine)
    assert (code, body["code"]) == (1, "release.not_held")
    code, body, said = await command("nobody", "-n", MANAGED, mine)
    assert (code, body["code"]) == (1, "kube.refused")


async def test_release_all_walks_every_page_and_leaves_other_gates(
    real_cluster: RealCluster, developer: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releasing, "PAGE", 2)
    names = [f"p-{number}" for number in range(7)]
    for name in names:
        await make(developer, name, gates=["example.com/wait"])
    await make(developer, "elsewhere", namespace=PLAIN, gates=[HOLD])
    await make(developer, "cpu", requests={"cpu": "1"})
    done = Released()
    await releasing._release(done, None, MANAGED, real_cluster.kubeconfig())
    assert sorted(done.released) == [f"{MANAGED}/{name}" for name in names]
    await releasing._release(done, None, None, real_cluster.kubeconfig())
    assert done.released[7:] == [f"{PLAIN}/elsewhere"]
    assert done.refused == {}
    for name in names:
        assert gates(await developer.get(f"/api/v1/namespaces/{MANAGED}/pods/{name}")) == ["example.com/wait"]


async def test_a_pod_that_was_replaced_keeps_its_gate(real_cluster: RealCluster, developer: ApiClient) -> None:
    pod = await make(developer)
    pod["metadata"]["uid"] = "0" * 8
    done = Released()
    server = await releasing.connect(kubeconfig=str(real_cluster.kubeconfig()), in_cluster=False)
    await releasing._let_go(server, pod, done)
    await server.close()
    assert done.released == []
    assert "uid" in done.refused[f"{MANAGED}/p"]
    assert gates(await developer.get(pod_path(pod))) == [HOLD]


async def test_the_whole_table(real_cluster: RealCluster) -> None:
    """On a control plane of its own: accepted and denied exactly as the table says, webhook up and down."""
    argv = [sys.executable, "-m", "bench", "admission", "--json"]
    child = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _ = await child.communicate()
    report = json.loads(out.splitlines()[-1])
    assert report["ok"], report
    assert {key: report[key] for key in ("mismatches", "non_gpu_blocked", "unmanaged_admitted")} == {
        "mismatches": 0,
        "non_gpu_blocked": 0,
        "unmanaged_admitted": 0,
    }
    assert min(report["accepted"], report["denied"]) >= 60


async def test_the_documented_way_out(
    real_cluster: RealCluster, admin: ApiClient, developer: ApiClient, product: Product
) -> None:
    """The commands of docs/operations.md, in their order: nothing is held any more and nothing is refused."""
    section = OPERATIONS.read_text().split("## Remove it")[1]
    deleted = re.findall(r"kubectl delete (\w+) (\S+)$", section, re.MULTILINE)
    kinds = {"validatingadmissionpolicybinding": BINDINGS, "mutatingwebhookconfiguration": CONFIGURATIONS}
    assert [kind for kind, _ in deleted] == list(kinds)
    assert "tessera release --all" in section
    await make(developer, "held")
    try:
        for kind, name in deleted:
            await admin.delete(f"{kinds[kind]}/{name}")

        async def free() -> bool:
            reply = await developer.ask(
                "POST",
                f"/api/v1/namespaces/{MANAGED}/pods?dryRun=All",
                pod_object("p", namespace=MANAGED, requests=GPU, scheduler="default-scheduler"),
            )
            return reply.status == 201 and gates(reply.body) == []

        await until(free, "new pods are still held or refused")
        code, body, _ = await command("--all", f"--kubeconfig={real_cluster.kubeconfig()}")
        assert (code, body["released"]) == (0, [f"{MANAGED}/held"])
        assert gates(await developer.get(f"/api/v1/namespaces/{MANAGED}/pods/held")) == []
    finally:
        await apply(admin, read_base())
        await apply(admin, [called_at(product.webhook)])
