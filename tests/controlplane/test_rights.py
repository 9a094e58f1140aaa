"""What the shipped roles allow, asked of the real authorizer; that the restricted namespace admits the shipped pod."""

from __future__ import annotations

import pytest

from bench.apiclient import ApiClient
from bench.manifests import pick, read_base

ACCOUNT = "system:serviceaccount:tessera-system:tessera"
REGISTRATION = "admissionregistration.k8s.io"
ALLOWED = [
    *(("", verb, "nodes", "", "", "") for verb in ("get", "list", "watch")),
    *(("", verb, "pods", "", "any", "") for verb in ("get", "list", "watch", "patch")),
    *(("", verb, "namespaces", "", "", "") for verb in ("get", "list", "watch")),
    *(("tessera.dev", verb, "queues", "", "", "") for verb in ("get", "list", "watch")),
    ("tessera.dev", "patch", "queues", "status", "", ""),
    ("", "patch", "pods", "status", "any", ""),
    ("", "create", "pods", "binding", "any", ""),
    ("", "create", "events", "", "any", ""),
    ("events.k8s.io", "patch", "events", "", "any", ""),
    ("coordination.k8s.io", "create", "leases", "", "tessera-system", ""),
    ("coordination.k8s.io", "update", "leases", "", "tessera-system", "tessera"),
    *(("", verb, "secrets", "", "tessera-system", "tessera-webhook") for verb in ("get", "update")),
    *((REGISTRATION, verb, "mutatingwebhookconfigurations", "", "", "tessera") for verb in ("get", "patch")),
]
DENIED = [
    *(("", verb, "pods", "", "any", "") for verb in ("create", "update", "delete", "deletecollection")),
    ("", "update", "pods", "status", "any", ""),
    ("", "create", "pods", "exec", "any", ""),
    ("", "create", "pods", "eviction", "any", ""),
    ("", "create", "bindings", "", "any", ""),
    *(("", verb, "nodes", "", "", "") for verb in ("patch", "update", "delete")),
    *(("tessera.dev", verb, "queues", "", "", "") for verb in ("create", "update", "patch", "delete")),
    *(("", verb, "namespaces", "", "", "") for verb in ("create", "update", "patch", "delete")),
    *(("", verb, "secrets", "", "tessera-system", "") for verb in ("get", "list", "create")),
    ("", "get", "secrets", "", "tessera-system", "kube-scheduler-token"),
    ("", "delete", "secrets", "", "tessera-system", "tessera-webhook"),
    ("", "get", "secrets", "", "kube-system", "tessera-webhook"),
    *((REGISTRATION, verb, "mutatingwebhookconfigurations", "", "", "tessera") for verb in ("update", "delete")),
    *((REGISTRATION, verb, "mutatingwebhookconfigurations", "", "", "other") for verb in ("get", "patch", "create")),
    ("tessera.dev", "release", "holds", "", "any", ""),
    ("", "create", "serviceaccounts", "token", "tessera-system", "kube-scheduler"),
    ("coordination.k8s.io", "create", "leases", "", "kube-system", ""),
    ("coordination.k8s.io", "update", "leases", "", "tessera-system", "tessera-kube-scheduler"),
    ("rbac.authorization.k8s.io", "create", "clusterrolebindings", "", "", ""),
    ("admissionregistration.k8s.io", "delete", "validatingadmissionpolicies", "", "", ""),
]


@pytest.mark.parametrize(("right", "allowed"), [*((r, True) for r in ALLOWED), *((r, False) for r in DENIED)])
async def test_tessera_has_these_rights_and_no_more(
    admin: ApiClient, right: tuple[str, str, str, str, str, str], allowed: bool
) -> None:
    names = ("group", "verb", "resource", "subresource", "namespace", "name")
    spec = {"user": ACCOUNT, "resourceAttributes": dict(zip(names, right, strict=True))}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = await admin.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    assert answer["status"]["allowed"] is allowed


async def test_the_namespace_admits_the_shipped_pod_and_refuses_a_looser_one(admin: ApiClient) -> None:
    template = pick(read_base(), "Deployment", "tessera")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] = {**template["metadata"], "name": "tessera"}
    path = "/api/v1/namespaces/tessera-system/pods?dryRun=All&fieldValidation=Strict"
    assert (await admin.ask("POST", path, pod)).status == 201
    pod["spec"]["containers"][1]["securityContext"]["allowPrivilegeEscalation"] = True
    refused = await admin.ask("POST", path, pod)
    assert refused.status == 403
    assert "violates PodSecurity" in refused.message
