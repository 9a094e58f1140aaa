"""What `deploy/` ships, checked without a cluster; `tests/controlplane` applies the same files to a real one."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from bench.kube_binaries import kube_version
from bench.manifests import BASE, pick, read_base
from scheduler.certificates import CONFIGURATION, SECRET, service_names

DOCUMENTS = read_base()
ACCOUNT = "system:serviceaccount:tessera-system:tessera"
MANAGED = {"matchLabels": {"tessera.dev/managed": "true"}}
WEBHOOK = pick(DOCUMENTS, "MutatingWebhookConfiguration", "tessera")
GUARDED = {"tessera.dev/allocation", "tessera.dev/touch", "tessera.dev/request"}


def title(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def pod_spec() -> dict[str, Any]:
    spec: dict[str, Any] = pick(DOCUMENTS, "Deployment", "tessera")["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (found,) = [one for one in pod_spec()["containers"] if one["name"] == name]
    return found


def shipped_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(pick(DOCUMENTS, "ConfigMap", "kube-scheduler")["data"]["config.yaml"])
    return config


@pytest.mark.parametrize("version", ["1.32", "1.36"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=title)
def test_manifests_are_valid(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_kustomization_lists_every_file_and_changes_none() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert sorted(kustomization["resources"]) == sorted(files)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_applies_what_the_tests_apply() -> None:
    built = subprocess.run(["kubectl", "kustomize", BASE], capture_output=True, check=True, text=True).stdout
    rendered = {title(one): one for one in yaml.safe_load_all(built)}
    assert rendered == {title(one): one for one in DOCUMENTS}


def test_the_only_profile_is_tessera_without_preemption_or_sampling() -> None:
    (profile,) = shipped_config()["profiles"]
    assert profile["schedulerName"] == "tessera"
    assert profile["percentageOfNodesToScore"] == 100
    assert profile["plugins"]["postFilter"]["disabled"] == [{"name": "DefaultPreemption"}]


def test_the_one_extender_cannot_be_bypassed() -> None:
    assert shipped_config()["extenders"] == [
        {
            "urlPrefix": "http://127.0.0.1:8888/scheduler",
            "filterVerb": "filter",
            "prioritizeVerb": "prioritize",
            "bindVerb": "bind",
            "weight": 10,
            "httpTimeout": "2s",
            "nodeCacheCapable": True,
            "ignorable": False,
        }
    ]


def test_kube_schedulers_lease_is_the_one_its_role_names() -> None:
    election = shipped_config()["leaderElection"]
    assert (election["leaderElect"], election["resourceNamespace"]) == (True, "tessera-system")
    named = [
        rule["resourceNames"] for rule in pick(DOCUMENTS, "Role", "kube-scheduler")["rules"] if "resourceNames" in rule
    ]
    assert named == [[election["resourceName"]]]


def test_kube_scheduler_is_the_version_the_tests_run() -> None:
    assert container("kube-scheduler")["image"] == f"registry.k8s.io/kube-scheduler:{kube_version()}"


def test_the_extender_and_the_api_listen_on_loopback_in_the_same_pod() -> None:
    assert [one["name"] for one in pod_spec()["containers"]] == ["tessera", "kube-scheduler"]
    arguments = container("tessera")["args"]
    assert "--extender=127.0.0.1:8888" in arguments
    assert "--api=127.0.0.1:8080" in arguments
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod_spec())
    (rule,) = pick(DOCUMENTS, "NetworkPolicy", "tessera")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 9090}, {"protocol": "TCP", "port": 8443}]


def test_the_only_service_leads_kube_apiserver_to_the_webhook() -> None:
    (service,) = [one for one in DOCUMENTS if one["kind"] == "Service"]
    assert (
        service["spec"]["selector"].items()
        <= pick(DOCUMENTS, "Deployment", "tessera")["spec"]["template"]["metadata"]["labels"].items()
    )
    (port,) = service["spec"]["ports"]
    named = {one["name"]: one["containerPort"] for one in container("tessera")["ports"]}
    assert f"--webhook=0.0.0.0:{named[port['targetPort']]}" in container("tessera")["args"]
    (hook,) = WEBHOOK["webhooks"]
    called = hook["clientConfig"]["service"]
    assert (called["namespace"], called["name"]) == (service["metadata"]["namespace"], service["metadata"]["name"])
    assert (called["port"], called["path"]) == (port["port"], "/mutate")
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert host in service_names(service["metadata"]["namespace"])
    assert "caBundle" not in hook["clientConfig"]  # applying the base again must not take away what Tessera wrote


def test_the_webhook_blocks_nobody_and_acts_in_managed_namespaces_alone() -> None:
    (hook,) = WEBHOOK["webhooks"]
    assert (hook["failurePolicy"], hook["timeoutSeconds"], hook["sideEffects"]) == ("Ignore", 2, "None")
    assert hook["reinvocationPolicy"] == "IfNeeded"
    assert hook["namespaceSelector"] == MANAGED
    (rule,) = hook["rules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE"], ["pods"])
    assert WEBHOOK["metadata"]["name"] == CONFIGURATION
    exempt = {"not-placed", "not-mirror", "not-a-kubelet"}
    conditions = {one["name"]: one["expression"] for one in hook["matchConditions"]}
    line = pick(DOCUMENTS, "ValidatingAdmissionPolicy", "tessera-v3-line")["spec"]["matchConditions"]
    assert {name: conditions[name] for name in exempt} == {
        one["name"]: one["expression"] for one in line if one["name"] in exempt
    }


@pytest.mark.parametrize(
    ("name", "verb"), [("tessera-v2-gate", "UPDATE"), ("tessera-v3-line", "CREATE")], ids=["V2", "V3"]
)
def test_policies_v2_and_v3_act_in_managed_namespaces_alone(name: str, verb: str) -> None:
    spec = pick(DOCUMENTS, "ValidatingAdmissionPolicy", name)["spec"]
    assert spec["failurePolicy"] == "Fail"
    assert spec["matchConstraints"]["namespaceSelector"] == MANAGED
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert (rule["operations"], rule["resources"]) == ([verb], ["pods"])
    binding = pick(DOCUMENTS, "ValidatingAdmissionPolicyBinding", name)["spec"]
    assert binding == {"policyName": name, "validationActions": ["Deny"]}


def test_the_certificate_is_kept_where_tessera_looks_for_it() -> None:
    secret = pick(DOCUMENTS, "Secret", SECRET)
    assert not {"data", "stringData"} & set(secret)
    (rule,) = pick(DOCUMENTS, "Role", "tessera-webhook")["rules"]
    assert (rule["resources"], rule["resourceNames"], rule["verbs"]) == (["secrets"], [SECRET], ["get", "update"])


def test_nobody_is_bound_to_break_glass() -> None:
    bound = {one["roleRef"]["name"] for one in DOCUMENTS if one["kind"].endswith("RoleBinding")}
    assert "tessera-release" not in bound
    holders = [
        one["metadata"]["name"]
        for one in DOCUMENTS
        if one["kind"] in {"Role", "ClusterRole"} and any("holds" in rule["resources"] for rule in one["rules"])
    ]
    assert holders == ["tessera-release"]


def test_one_writer_on_a_volume_that_outlives_the_pod() -> None:
    deployment = pick(DOCUMENTS, "Deployment", "tessera")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    (state,) = [one["value"] for one in container("tessera")["env"] if one["name"] == "TESSERA_STATE"]
    mounts = {one["mountPath"]: one["name"] for one in container("tessera")["volumeMounts"]}
    claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in pod_spec()["volumes"]}
    assert claims[mounts[state]] == pick(DOCUMENTS, "PersistentVolumeClaim", "tessera-state")["metadata"]["name"]


def test_tessera_does_not_schedule_itself() -> None:
    assert pod_spec()["schedulerName"] == "default-scheduler"
    assert pod_spec()["priorityClassName"] == "system-cluster-critical"


def test_containers_are_restricted() -> None:
    assert pod_spec()["securityContext"]["runAsNonRoot"] is True
    assert pod_spec()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in pod_spec()["containers"]:
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(one["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in one["resources"]["limits"]
    namespace = pick(DOCUMENTS, "Namespace", "tessera-system")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", ["tessera", "kube-scheduler"])
def test_probes_ask_a_port_the_container_has(name: str) -> None:
    ports = {one["name"] for one in container(name)["ports"]}
    probes = {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    for probe, path in probes.items():
        http = container(name)[probe]["httpGet"]
        assert http["path"] == path
        assert http["port"] in ports


def test_each_container_has_its_own_account() -> None:
    assert pod_spec()["serviceAccountName"] == "tessera"
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    assert place not in [one["mountPath"] for one in container("tessera")["volumeMounts"]]
    (mount,) = [one for one in container("kube-scheduler")["volumeMounts"] if one["mountPath"] == place]
    (volume,) = [one for one in pod_spec()["volumes"] if one["name"] == mount["name"]]
    secret = pick(DOCUMENTS, "Secret", volume["secret"]["secretName"])
    assert secret["metadata"]["annotations"] == {"kubernetes.io/service-account.name": "kube-scheduler"}


def test_roles_grant_nothing_wholesale() -> None:
    rules = [rule for one in DOCUMENTS if one["kind"] in {"Role", "ClusterRole"} for rule in one["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        if {"secrets", "mutatingwebhookconfigurations"} & set(rule["resources"]):
            assert rule["resourceNames"]
            assert set(rule["verbs"]) <= {"get", "update", "patch"}
        assert not {"pods/exec", "serviceaccounts/token"} & set(rule["resources"])


def test_policy_v1_covers_every_path_by_which_an_annotation_reaches_a_pod() -> None:
    spec = pick(DOCUMENTS, "ValidatingAdmissionPolicy", "tessera-v1-annotations")["spec"]
    covered = {
        (verb, resource)
        for rule in spec["matchConstraints"]["resourceRules"]
        for verb in rule["operations"]
        for resource in rule["resources"]
    }
    updated = ("pods", "pods/status", "pods/resize", "pods/ephemeralcontainers")
    created = ("pods", "pods/binding", "bindings")
    assert covered == {*(("UPDATE", one) for one in updated), *(("CREATE", one) for one in created)}
    assert spec["failurePolicy"] == "Fail"
    assert not {"namespaceSelector", "objectSelector"} & set(spec["matchConstraints"])
    (exempt,) = spec["matchConditions"]
    assert exempt["expression"] == f"request.userInfo.username != '{ACCOUNT}'"
    (guarded,) = [one["expression"] for one in spec["variables"] if one["name"] == "guarded"]
    assert set(yaml.safe_load(guarded)) == GUARDED
    binding = pick(DOCUMENTS, "ValidatingAdmissionPolicyBinding", "tessera-v1-annotations")["spec"]
    assert binding == {"policyName": "tessera-v1-annotations", "validationActions": ["Deny"]}


@pytest.mark.parametrize("page", ["README.md", "deploy/README.md", "docs/operations.md"])
def test_the_documented_overlay_names_the_image_that_was_pushed(page: str, tmp_path: Path) -> None:
    root = Path(BASE).parents[2]
    found = re.search(
        r"podman push (?P<pushed>\S+)\n(?P<write>mkdir .*?)kubectl apply -k (?P<folder>\S+)\n",
        re.sub(r"^ {4}", "", (root / page).read_text(), flags=re.MULTILINE),
        re.DOTALL,
    )
    assert found is not None
    shutil.copytree(BASE, tmp_path / "deploy" / "kustomize" / "base")
    subprocess.run(["bash", "-ec", found["write"]], check=True, cwd=tmp_path)
    overlay = tmp_path / found["folder"]
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    assert set(kustomization) == {"resources", "images"}
    (resource,), (image,) = kustomization["resources"], kustomization["images"]
    assert (overlay / resource / "kustomization.yaml").is_file()
    name, _, tag = container("tessera")["image"].partition(":")
    assert (image["name"], f"{image['newName']}:{tag}") == (name, found["pushed"])
    if shutil.which("kubectl"):
        built = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, check=True, text=True).stdout
        deployment = pick(list(yaml.safe_load_all(built)), "Deployment", "tessera")
        assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == found["pushed"]


def test_the_image_runs_the_shipped_command_as_nobody() -> None:
    lines = (Path(BASE).parents[1] / "Containerfile").read_text().splitlines()
    user = [shlex.split(line)[1] for line in lines if line.startswith("USER")]
    assert user == ["65532:65532"]
    assert pod_spec()["securityContext"]["runAsUser"] == 65532
    (command,) = [yaml.safe_load(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    assert command == container("tessera")["args"]
    assert any(".[agent,fast,postgres]" in line for line in lines)
