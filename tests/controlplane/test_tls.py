"""The extender over TLS with the real kube-scheduler as its client: a good certificate binds, others bind nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from bench.apiclient import ApiClient
from bench.kube_objects import create_pods, pod_object
from bench.product import Product
from bench.realcluster import TESSERA, RealCluster

Json = dict[str, Any]
NEVER = threading.Event()  # the processes outside have no fake clock
NAME = "kube-scheduler.tessera"
YESTERDAY = datetime.now(UTC) - timedelta(days=1)


class Keys:
    """Files of the listener, of its clients' CA, and of kube-scheduler."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server, self.clients = folder, trustme.CA(), trustme.CA()
        self.server.cert_pem.write_to_path(str(folder / "server-ca.crt"))
        self.clients.cert_pem.write_to_path(str(folder / "client-ca.crt"))
        self.write("tls", self.server.issue_cert("127.0.0.1"))

    def write(self, name: str, certificate: trustme.LeafCert) -> None:
        certificate.private_key_pem.write_to_path(str(self.folder / f"{name}.key"))
        (self.folder / f"{name}.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))

    def extenders(self, url: str, certificate: trustme.LeafCert | None) -> Json:
        """Return kube-scheduler's `extenders` with TLS as documented in docs/operations.md."""
        tls: Json = {"caFile": str(self.folder / "server-ca.crt")}
        if certificate:
            self.write("client", certificate)
            tls |= {"certFile": str(self.folder / "client.crt"), "keyFile": str(self.folder / "client.key")}
        verbs = {"filterVerb": "filter", "prioritizeVerb": "prioritize", "bindVerb": "bind"}
        rest = {"weight": 10, "httpTimeout": "2s", "nodeCacheCapable": True, "ignorable": False}
        return {"extenders": [{"urlPrefix": url, "enableHTTPS": True, "tlsConfig": tls, **verbs, **rest}]}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
async def product(real_cluster: RealCluster, keys: Keys, tmp_path: Path, node: str) -> AsyncIterator[Product]:
    files = {"tls-cert": "tls.crt", "tls-key": "tls.key", "client-ca": "client-ca.crt"}
    flags = [f"--extender-{flag}={tmp_path / name}" for flag, name in files.items()]
    made = Product(tmp_path, real_cluster.kubeconfig(TESSERA), flags=flags)
    await made.start()
    yield made
    await real_cluster.stop_kube_scheduler(kill=True)
    await made.stop()


async def until(done: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Wait for a real process; the API server is asked again after each of its answers."""
    try:
        async with asyncio.timeout(seconds):
            while not await done():
                await asyncio.to_thread(NEVER.wait, 0.05)
    except TimeoutError:
        pytest.fail(f"not within {seconds} s: {what}")


async def pod_of(admin: ApiClient, namespace: str) -> Json:
    return await admin.get(f"/api/v1/namespaces/{namespace}/pods/p")


async def refused(admin: ApiClient, namespace: str) -> bool:
    """Say whether kube-scheduler tried the pod and could not get an answer."""
    listed = (await pod_of(admin, namespace))["status"].get("conditions", [])
    return any(one["reason"] == "SchedulerError" for one in listed if one["type"] == "PodScheduled")


async def bound(admin: ApiClient, namespace: str) -> bool:
    return bool((await pod_of(admin, namespace))["spec"].get("nodeName"))


async def test_kube_scheduler_with_the_right_certificate_binds(
    admin: ApiClient, namespace: str, product: Product, real_cluster: RealCluster, keys: Keys
) -> None:
    assert product.extender.startswith("https://127.0.0.1:")
    extra = keys.extenders(product.extender, keys.clients.issue_cert(NAME))
    await real_cluster.start_kube_scheduler(product.extender, extra_config=extra)
    await create_pods(admin, [pod_object("p", namespace=namespace, requests={"nvidia.com/gpu": "2"})])
    await until(lambda: bound(admin, namespace), 15, "the pod is bound over TLS")
    assert "tessera.dev/allocation" in (await pod_of(admin, namespace))["metadata"]["annotations"]


@pytest.mark.parametrize("who", ["no certificate", "another CA", "another name", "expired"])
async def test_a_kube_scheduler_that_is_not_ours_binds_nothing(  # noqa: PLR0917 - fixtures
    admin: ApiClient, namespace: str, product: Product, real_cluster: RealCluster, keys: Keys, who: str
) -> None:
    certificates = {
        "no certificate": lambda: None,
        "another CA": lambda: trustme.CA().issue_cert(NAME),
        "another name": lambda: keys.clients.issue_cert("somebody.else"),
        "expired": lambda: keys.clients.issue_cert(NAME, not_after=YESTERDAY),
    }
    extra = keys.extenders(product.extender, certificates[who]())
    await real_cluster.start_kube_scheduler(product.extender, extra_config=extra)
    await create_pods(admin, [pod_object("p", namespace=namespace, requests={"nvidia.com/gpu": "2"})])
    await until(lambda: refused(admin, namespace), 15, "kube-scheduler was turned away")
    assert not await bound(admin, namespace)
