"""The agent as `deploy/` ships it: valid, bound to nothing, not privileged, and whom Tessera expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from bench.manifests import BASE, pick, read_base
from nodeagent.__main__ import _TOKEN, _parser
from nodeagent.messages import AUDIENCE
from scheduler.config import Settings
from scheduler.web.vouching import ACCOUNT, LIFE_MAX_S

DEPLOY = BASE.parent.parent
FOLDER = BASE.parent / "agent"
DOCUMENTS = read_base(FOLDER)


def title(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = pick(DOCUMENTS, "DaemonSet", "tessera-agent")["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", ["1.32", "1.36"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=title)
def test_manifests_are_valid(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_kustomization_lists_every_file() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted({path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"})


def test_the_agent_may_do_nothing_in_the_cluster() -> None:
    account = pick(DOCUMENTS, "ServiceAccount", ACCOUNT)
    assert account["metadata"]["namespace"] == Settings().agentNamespace
    assert account["automountServiceAccountToken"] is pod()["automountServiceAccountToken"] is False
    assert pod()["serviceAccountName"] == ACCOUNT
    granted = []
    for path in sorted(Path(DEPLOY).rglob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            subjects = (one or {}).get("subjects") or [] if isinstance(one, dict) else []
            names = {subject.get("name") for subject in subjects}
            if names & {ACCOUNT, "system:serviceaccounts", f"system:serviceaccounts:{Settings().agentNamespace}"}:
                granted.append(title(one))
    assert granted == []


def test_it_is_not_privileged_and_changes_nothing_of_the_machine() -> None:
    (container,) = pod()["containers"]
    rights = container["securityContext"]
    assert "privileged" not in rights
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostPID", "hostNetwork", "hostIPC"} & set(pod())
    host = {volume["name"] for volume in pod()["volumes"] if "hostPath" in volume}
    assert {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"spool"}
    assert host == {"pod-resources", "proc", "sys", "logs"}


def test_its_token_is_the_one_that_tessera_takes() -> None:
    (source,) = next(volume for volume in pod()["volumes"] if volume["name"] == "token")["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert token["audience"] == AUDIENCE
    assert token["expirationSeconds"] <= LIFE_MAX_S
    (container,) = pod()["containers"]
    mounted = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "token")
    assert Path(mounted) / token["path"] == _TOKEN


def test_its_arguments_are_options_and_its_folders_are_mounted() -> None:
    (container,) = pod()["containers"]
    options = _parser().parse_args([argument.replace("$(NODE_NAME)", "a") for argument in container["args"]])
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    for folder in (options.spool, options.kubelet / "pod-resources", options.proc, options.sys, options.logs):
        assert folder in mounts, folder
    assert options.ca.parent in mounts
    service = pick(DOCUMENTS, "Service", "tessera-agents")
    assert f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc" in options.tessera
