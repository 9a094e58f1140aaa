"""Node agents with real projected tokens: whose pod runs on which node is the API server's word alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench.apiclient import ApiClient
from bench.product import Product
from bench.realcluster import TESSERA, RealCluster
from nodeagent.messages import ACK, FULL, PATH, WELCOME
from nodeagent.report import encode
from tests.web.agent_parts import hello, well


async def pod_on(admin: ApiClient, namespace: str, account: str, node: str) -> dict[str, Any]:
    """Make a pod of this account that is bound to this node."""
    container = {"name": "main", "image": "pause:3.10"}
    spec = {"serviceAccountName": account, "nodeName": node, "containers": [container]}
    spec |= {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0}
    return await admin.post(f"/api/v1/namespaces/{namespace}/pods", {"metadata": {"generateName": "a-"}, "spec": spec})


async def token_of(admin: ApiClient, namespace: str, account: str, **spec: object) -> str:
    """Make a token as kubelets project it."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    made = await admin.post(path, {"spec": {"audiences": ["tessera-agent"], "expirationSeconds": 3600, **spec}})
    return str(made["status"]["token"])


def bound(pod: dict[str, Any]) -> dict[str, Any]:
    meta = pod["metadata"]
    return {"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}}


async def said(url: str, token: str, *frames: bytes) -> list[bytes]:
    """Return the first bytes of the answers, until the connection is closed."""
    headers, found = {"Authorization": f"Bearer {token}"}, []
    async with aiohttp.ClientSession() as client, client.ws_connect(url + PATH, headers=headers) as socket:
        for frame in frames:
            await socket.send_bytes(frame)
            message = await socket.receive(30)
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            found.append(message.data[:1])
    return found


async def refused(url: str, token: str, frame: bytes) -> bool:
    """Say whether a frame was not taken: kube-apiserver itself knows a token for some seconds longer."""
    try:
        return await said(url, token, frame) == []
    except aiohttp.WSServerHandshakeError:
        return True


async def test_only_the_agents_pod_speaks_for_its_node(
    real_cluster: RealCluster, admin: ApiClient, namespace: str, node: str, tmp_path: Path
) -> None:
    for account in ("tessera-agent", "other"):
        await admin.post(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": account}})
    agent = await pod_on(admin, namespace, "tessera-agent", node)
    other = await pod_on(admin, namespace, "other", node)
    config = tmp_path / "config.yaml"
    config.write_text(f"agentNamespace: {namespace}\n")
    flags = [f"--config={config}", "--agents=127.0.0.1:0"]
    product = Product(tmp_path, real_cluster.kubeconfig(TESSERA), flags=flags)
    await product.start()
    try:
        url = product.agents.replace("ws", "http", 1)
        good = await token_of(admin, namespace, "tessera-agent", **bound(agent))
        assert await said(url, good, hello(node), FULL + encode(well(1, node=node))) == [WELCOME, ACK]
        assert await said(url, good, hello("another")) == []
        for stranger in (
            await token_of(admin, namespace, "tessera-agent"),
            await token_of(admin, namespace, "other", **bound(other)),
            await token_of(admin, namespace, "tessera-agent", **bound(agent), audiences=["tessera"]),
            await token_of(admin, namespace, "tessera-agent", **bound(agent), expirationSeconds=7200),
            good[:-4] + "AAAA",
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                await said(url, stranger, hello(node))
        meta = agent["metadata"]
        await admin.delete(f"/api/v1/namespaces/{namespace}/pods/{meta['name']}", {"gracePeriodSeconds": 0})
        async with asyncio.timeout(30):
            while not await refused(url, good, hello(node)):  # until the watch has told of it
                pass
    finally:
        await product.stop()
