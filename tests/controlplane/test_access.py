"""Who may use the API, by tokens of the real API server, and the developer's token of an embedded Tessera."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp

from bench.apiclient import ApiClient
from bench.product import Product
from bench.realcluster import TESSERA, RealCluster

CONFIG = """
access:
  kubernetes: {audiences: [tessera]}
  bindings:
  - {role: user, users: ["kubernetes:system:serviceaccount:NS:ci"], namespaces: [NS]}
  - {role: viewer, groups: ["kubernetes:system:serviceaccounts:NS"], namespaces: [NS]}
"""


async def token_of(admin: ApiClient, namespace: str, account: str, audience: str) -> str:
    """Make a service account, and a token for it as kubelets project them into pods."""
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    await admin.post(accounts, {"metadata": {"name": account}})
    spec = {"audiences": [audience], "expirationSeconds": 3600}
    made = await admin.post(f"{accounts}/{account}/token", {"spec": spec})
    return str(made["status"]["token"])


async def asked(client: aiohttp.ClientSession, url: str, token: str | None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with client.get(f"{url}/api/v1/me", headers=headers) as answer:
        return answer.status, await answer.text()


async def test_service_accounts_are_known_by_their_tokens(
    real_cluster: RealCluster, admin: ApiClient, namespace: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("NS", namespace))
    ci = await token_of(admin, namespace, "ci", "tessera")
    other = await token_of(admin, namespace, "other", "tessera")
    elsewhere = await token_of(admin, namespace, "elsewhere", "another-audience")
    stranger = await token_of(admin, "default", "stranger", "tessera")
    product = Product(tmp_path, real_cluster.kubeconfig(TESSERA), flags=[f"--config={config}"])
    await product.start()
    try:
        async with aiohttp.ClientSession() as client:
            status, text = await asked(client, product.api, ci)
            told = json.loads(text)
            assert (status, told["name"]) == (200, f"kubernetes:system:serviceaccount:{namespace}:ci")
            assert [grant["role"] for grant in told["grants"]] == ["user", "viewer"]
            status, text = await asked(client, product.api, other)
            assert [grant["role"] for grant in json.loads(text)["grants"]] == ["viewer"]
            assert (await asked(client, product.api, stranger))[0] == 403
            for nobody in (None, elsewhere, ci[:-4] + "AAAA", "abc"):
                assert (await asked(client, product.api, nobody))[0] == 401
    finally:
        await product.stop()


async def test_the_developers_token_opens_an_embedded_tessera(tmp_path: Path) -> None:
    for name in ("nodes", "pods"):
        (tmp_path / f"{name}.json").write_text('{"items": []}')
    secret = tmp_path / "dev-token"
    product = Product(tmp_path, None, flags=[f"--embedded={tmp_path}", f"--dev-token={secret}"])
    await product.start()
    try:
        assert secret.stat().st_mode & 0o777 == 0o600
        async with aiohttp.ClientSession() as client:
            assert (await asked(client, product.api, None))[0] == 401
            status, text = await asked(client, product.api, secret.read_text().strip())
            assert (status, json.loads(text)["name"]) == (200, "token:dev")
    finally:
        await product.stop()
