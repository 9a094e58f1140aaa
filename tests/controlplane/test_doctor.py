"""The doctor beside a real control plane: well when all is as shipped, and exact about what is not."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench.apiclient import ApiClient
from bench.kube_objects import create_nodes, node_object
from bench.product import Product
from bench.realcluster import ADMIN, TESSERA, RealCluster

Json = dict[str, Any]
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.count": "8"}


async def doctor(kubeconfig: Path, *more: str) -> tuple[int, dict[str, Json]]:
    """Run it as an operator does; return the exit status and the checks by name."""
    command = [sys.executable, "-m", "scheduler", "doctor", "--kubeconfig", str(kubeconfig), "--json", *more]
    run = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, _ = await run.communicate()
    found = json.loads(out.splitlines()[-1])
    assert run.returncode == (0 if found["ok"] else 1)
    return run.returncode or 0, {one["check"]: one for one in found.get("checks", [])}


@pytest.fixture
async def product(real_cluster: RealCluster, tmp_path: Path) -> AsyncIterator[Product]:
    made = Product(tmp_path, real_cluster.kubeconfig(TESSERA))
    await made.start()
    yield made
    await made.stop()


async def test_as_an_administrator_beside_a_running_tessera(
    admin: ApiClient, real_cluster: RealCluster, product: Product
) -> None:
    made = node_object("doctor-1", extended={"nvidia.com/gpu": "8"}, labels=H100 | {"tessera.dev/mode": "exact"})
    await create_nodes(admin, [made])
    for one in (await admin.get("/api/v1/namespaces"))["items"]:  # other tests leave theirs behind
        path = f"/api/v1/namespaces/{one['metadata']['name']}"
        await admin.patch(path, {"metadata": {"labels": {"tessera.dev/managed": None}}})
    code, found = await doctor(real_cluster.kubeconfig(ADMIN))
    odd = {name: one["status"] for name, one in found.items() if one["status"] != "ok"}
    assert odd == dict.fromkeys(("kube-scheduler version", "node resources", "webhook", "Tessera's API"), "warn")
    assert "caBundle" in found["webhook"]["text"]  # this Tessera has no webhook port
    assert code == 0
    assert found["rights of Tessera"]["text"].startswith("system:serviceaccount:tessera-system:tessera has every right")
    assert found["API server"]["text"].startswith("version v1.")
    assert found["GPU nodes"]["text"] == "1 with GPUs: 0 observed, 1 exact"
    await admin.delete("/api/v1/nodes/doctor-1")


async def test_as_tessera_itself_it_says_what_it_may_not_read(real_cluster: RealCluster, product: Product) -> None:
    code, found = await doctor(real_cluster.kubeconfig(TESSERA))
    assert code == 0
    assert found["rights"]["status"] == "ok"
    assert "rights of Tessera" not in found
    for name in ("kube-scheduler configuration", "admission policy V1"):
        assert (found[name]["status"], "administrator" in found[name]["do"]) == ("warn", True)


async def test_missing_rights_policy_and_settings_are_named(
    admin: ApiClient, real_cluster: RealCluster, tmp_path: Path
) -> None:
    roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles/tessera"
    bindings = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
    role, binding = await admin.get(roles), await admin.get(f"{bindings}/tessera-v1-annotations")
    await admin.patch(roles, {"rules": [rule for rule in role["rules"] if rule["resources"] != ["pods/binding"]]})
    await admin.delete(f"{bindings}/tessera-v1-annotations")
    config = tmp_path / "config.yaml"
    config.write_text("kind: KubeSchedulerConfiguration\nprofiles: [{schedulerName: tessera}]\n")
    try:
        code, found = await doctor(real_cluster.kubeconfig(ADMIN), "--kube-scheduler-config", str(config))
    finally:
        await admin.patch(roles, {"rules": role["rules"]})
        meta = {"name": "tessera-v1-annotations", "labels": binding["metadata"]["labels"]}
        await admin.post(bindings, {**binding, "metadata": meta})
    assert code == 1
    assert found["rights"]["status"] == "ok"  # an administrator may do anything
    assert "create pods/binding" in found["rights of Tessera"]["text"]
    assert found["admission policy V1"]["status"] == "fail"
    assert found["kube-scheduler configuration"]["status"] == "fail"
    assert found["DefaultPreemption"]["status"] == "fail"


async def test_a_cluster_that_does_not_answer_is_one_finding(real_cluster: RealCluster, tmp_path: Path) -> None:
    dead = json.loads(real_cluster.kubeconfig(ADMIN).read_text())
    dead["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    path = tmp_path / "dead.kubeconfig"
    path.write_text(json.dumps(dead))
    code, found = await doctor(path)
    assert (code, found["API server"]["status"], set(found)) == (1, "fail", {"API server", "Tessera's API"})
    code, found = await doctor(tmp_path / "absent")
    assert (code, found) == (1, {})
