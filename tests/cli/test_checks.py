"""The doctor's judgements, one fault at a time, against what `deploy/` ships."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.manifests import pick, read_base
from scheduler import geometry
from scheduler.cli import checks
from scheduler.cli.checks import Check
from scheduler.cli.rights import RIGHTS, Right
from scheduler.cli.scheduler_config import check_configuration
from tests.objects import raw_node, raw_pod

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, 0, 0, 500_000, UTC)
SHIPPED: Json = yaml.safe_load(pick(read_base(), "ConfigMap", "kube-scheduler")["data"]["config.yaml"])
POLICIES = [one for one in read_base() if one["kind"] == "ValidatingAdmissionPolicy"]
BINDINGS = [one for one in read_base() if one["kind"] == "ValidatingAdmissionPolicyBinding"]


def granted() -> set[Right]:
    """Every right that the manifests grant Tessera's account."""
    found = set()
    for document in read_base():
        if document["kind"] in {"ClusterRole", "Role"} and document["metadata"]["name"] == "tessera":
            here = document["kind"] == "Role"
            for rule in document["rules"]:
                every = itertools.product(
                    rule["verbs"], rule["resources"], rule["apiGroups"], rule.get("resourceNames", [""])
                )
                for verb, resource, group, name in every:
                    kind, _, sub = resource.partition("/")
                    found.add(Right(verb, kind, group, sub, here=here, name=name))
    return found


def test_the_doctor_asks_for_exactly_what_deploy_grants() -> None:
    assert set(RIGHTS) == granted()
    assert len(RIGHTS) == len(set(RIGHTS))


def test_rights_that_lack_are_named() -> None:
    every = [(right, True) for right in RIGHTS]
    assert checks.rights("rights", "me", every).status == "ok"
    lacking = [(right, str(right) != "patch pods/status") for right in RIGHTS]
    found = checks.rights("rights", "me", lacking)
    assert (found.status, found.text) == ("fail", "me may not: patch pods/status")


def failing(found: list[Check]) -> dict[str, str]:
    assert all(one.do for one in found if one.status != "ok")
    assert not any(one.do for one in found if one.status == "ok")
    return {one.check: one.status for one in found if one.status != "ok"}


def config(change: Callable[[Json], object]) -> list[Check]:
    changed = copy.deepcopy(SHIPPED)
    change(changed)
    return check_configuration(yaml.safe_dump(changed), "here")


def test_the_shipped_configuration_is_well() -> None:
    assert failing(config(lambda _: None)) == {}


def extender(**keys: object) -> Callable[[Json], object]:
    return lambda shipped: shipped["extenders"][0].update(keys)


def profile(**keys: object) -> Callable[[Json], object]:
    return lambda shipped: shipped["profiles"][0].update(keys)


TLS = {"caFile": "ca", "certFile": "cert", "keyFile": "key"}
AWAY = {"urlPrefix": "https://tessera:8888/scheduler", "enableHTTPS": True}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param(lambda c: c.pop("extenders"), {"kube-scheduler configuration": "fail"}, id="no extender"),
        pytest.param(
            lambda c: c["extenders"].append({}), {"kube-scheduler configuration": "fail"}, id="another extender"
        ),
        pytest.param(lambda c: c.update(kind="Pod"), {"kube-scheduler configuration": "fail"}, id="another kind"),
        pytest.param(extender(bindVerb="", filterVerb="x"), {"extender verbs": "fail"}, id="verbs"),
        pytest.param(extender(nodeCacheCapable=False), {"nodeCacheCapable": "fail"}, id="whole nodes"),
        pytest.param(extender(ignorable=True), {"ignorable": "fail"}, id="ignorable"),
        pytest.param(
            extender(managedResources=[{"name": "nvidia.com/gpu"}]), {"managedResources": "fail"}, id="some pods only"
        ),
        pytest.param(extender(httpTimeout="1s"), {"httpTimeout": "fail"}, id="too short"),
        pytest.param(extender(httpTimeout="30s"), {"httpTimeout": "warn"}, id="too long"),
        pytest.param(extender(httpTimeout=None), {"httpTimeout": "warn"}, id="default time-out"),
        pytest.param(extender(httpTimeout="soon"), {"httpTimeout": "fail"}, id="no time-out"),
        pytest.param(extender(httpTimeout="2500ms"), {}, id="in thousandths"),
        pytest.param(extender(urlPrefix="http://tessera:8888/x"), {"extender transport": "fail"}, id="plain away"),
        pytest.param(extender(**AWAY), {"extender transport": "fail"}, id="TLS without files"),
        pytest.param(extender(**AWAY, tlsConfig={"caFile": "ca"}), {"extender transport": "fail"}, id="no client"),
        pytest.param(
            extender(**AWAY, tlsConfig=TLS | {"insecure": True}), {"extender transport": "fail"}, id="insecure"
        ),
        pytest.param(extender(**AWAY, tlsConfig=TLS), {}, id="mutual TLS"),
        pytest.param(profile(schedulerName="gpu"), {"profile": "fail"}, id="no such profile"),
        pytest.param(
            lambda c: c["profiles"].append({"schedulerName": "default-scheduler"}), {"profile": "warn"}, id="shared"
        ),
        pytest.param(profile(plugins={}), {"DefaultPreemption": "fail"}, id="preemption"),
        pytest.param(
            profile(plugins={"multiPoint": {"disabled": [{"name": "DefaultPreemption"}]}}), {}, id="off at multiPoint"
        ),
        pytest.param(profile(percentageOfNodesToScore=None), {"percentageOfNodesToScore": "warn"}, id="sampling"),
        pytest.param(lambda c: c.pop("profiles"), {"profile": "fail"}, id="no profiles"),
    ],
)
def test_each_wrong_setting_is_found(change: Callable[[Json], object], wrong: dict[str, str]) -> None:
    assert failing(config(change)) == wrong


@pytest.mark.parametrize("text", ["", "[]", "kind: [", "a: b", "extenders: 3"])
def test_what_is_no_configuration_is_said_so(text: str) -> None:
    (found,) = check_configuration(text, "here")
    assert found.status == "fail"
    assert "here" in found.text


def version(number: str) -> Json:
    return {"gitVersion": number}


@pytest.mark.parametrize(
    ("number", "status"), [("v1.36.2", "ok"), ("v1.30.0-eks-1", "ok"), ("v1.29.9", "fail"), ("", "fail")]
)
def test_api_server_versions(number: str, status: str) -> None:
    assert checks.api_version(version(number)).status == status


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("registry.k8s.io/kube-scheduler:v1.36.2", "ok"),
        ("mirror:5000/kube-scheduler:v1.35.0", "ok"),
        ("kube-scheduler:v1.36.2@sha256:abc", "ok"),
        ("kube-scheduler:v1.37.0", "fail"),
        ("kube-scheduler:v1.34.0", "fail"),
        ("kube-scheduler@sha256:abc", "warn"),
        ("my-kube-scheduler-proxy:v1.36.0", "warn"),
    ],
)
def test_kube_scheduler_versions(image: str, status: str) -> None:
    pod = raw_pod("p")
    pod["metadata"]["namespace"] = "tessera-system"
    pod["spec"]["containers"][0]["image"] = image
    found = checks.kube_scheduler_version(version("v1.36.2"), [pod], "tessera-system")
    assert found.status == status
    assert checks.kube_scheduler_version(version("v1.36.2"), [pod], "elsewhere").status == "warn"


@pytest.mark.parametrize(("skew_s", "status"), [(0, "ok"), (-4, "ok"), (9, "warn"), (-9, "warn"), (40, "fail")])
def test_the_clock(skew_s: float, status: str) -> None:
    date = format_datetime(NOW, usegmt=True)
    here_s = NOW.timestamp() + skew_s
    assert checks.clock(date, here_s, here_s + 0.1).status == status
    assert checks.clock("", here_s, here_s).status == "warn"


def test_the_shipped_policy_is_well_and_each_lack_is_found() -> None:
    assert checks.policy(POLICIES, BINDINGS).status == "ok"
    assert checks.policy([], BINDINGS).status == "fail"
    assert checks.policy(POLICIES, []).status == "fail"
    audit = copy.deepcopy(BINDINGS)
    audit[0]["spec"]["validationActions"] = ["Audit"]
    assert checks.policy(POLICIES, audit).status == "fail"
    some = copy.deepcopy(BINDINGS)
    some[0]["spec"]["matchResources"] = {"namespaceSelector": {}}
    assert checks.policy(POLICIES, some).status == "fail"
    lax = copy.deepcopy(POLICIES)
    lax[0]["spec"]["failurePolicy"] = "Ignore"
    assert checks.policy(lax, BINDINGS).status == "warn"


def hook(**changes: Any) -> Json:
    made = copy.deepcopy(pick(read_base(), "MutatingWebhookConfiguration", "tessera"))
    made["webhooks"][0]["clientConfig"]["caBundle"] = "eA=="
    made["webhooks"][0] |= changes
    return made


def statuses(found: list[Check]) -> list[str]:
    return [one.status for one in found]


def test_the_line_of_managed_namespaces_is_well_as_shipped_and_each_lack_is_found() -> None:
    assert statuses(checks.line(POLICIES, BINDINGS, hook(), ["vision"])) == ["ok", "ok", "ok"]
    assert statuses(checks.line([], [], None, [])) == ["warn"]
    assert statuses(checks.line(POLICIES, BINDINGS, None, ["vision"])) == ["fail", "ok", "ok"]
    assert statuses(checks.line(POLICIES, BINDINGS, hook(), [])) == ["warn", "ok", "ok"]
    assert statuses(checks.line(POLICIES, BINDINGS, hook(clientConfig={}), ["vision"])) == ["fail", "ok", "ok"]
    assert statuses(checks.line(POLICIES, BINDINGS, hook(clientConfig={}), [])) == ["warn", "ok", "ok"]
    assert statuses(checks.line(POLICIES, BINDINGS, hook(failurePolicy="Fail"), ["vision"])) == ["warn", "ok", "ok"]
    for number, name in enumerate(("tessera-v2-gate", "tessera-v3-line"), start=1):
        fewer = [one for one in POLICIES if one["metadata"]["name"] != name]
        loose = copy.deepcopy(BINDINGS)
        next(one for one in loose if one["metadata"]["name"] == name)["spec"]["validationActions"] = ["Audit"]
        for one in (checks.line(fewer, BINDINGS, hook(), ["vision"]), checks.line(POLICIES, loose, hook(), ["vision"])):
            assert [place for place, status in enumerate(statuses(one)) if status == "fail"] == [number]
        assert statuses(checks.line(fewer, BINDINGS, hook(), []))[number] == "warn"


def test_a_namespace_is_managed_by_its_label_alone() -> None:
    assert checks.managed({"metadata": {"labels": {"tessera.dev/managed": "true"}}})
    assert not checks.managed({"metadata": {"labels": {"tessera.dev/managed": "yes"}}})
    assert not checks.managed({"metadata": {}})


@pytest.mark.parametrize(
    ("spec", "status"),
    [
        (None, "fail"),
        ({"holderIdentity": "db_1", "renewTime": "2026-01-01T11:59:58.000000Z"}, "ok"),
        ({"holderIdentity": "db_1", "renewTime": "2026-01-01T11:59:00.000000Z"}, "fail"),
        ({"holderIdentity": "", "renewTime": "2026-01-01T11:59:58.000000Z"}, "fail"),
        ({"holderIdentity": "db_1", "renewTime": None}, "fail"),
        ({}, "fail"),
    ],
)
def test_the_lease(spec: Json | None, status: str) -> None:
    assert checks.lease(None if spec is None else {"spec": spec}, NOW).status == status
    assert checks.now_utc(round(NOW.timestamp() * 1_000_000)) - NOW < timedelta(milliseconds=1)


def node(name: str, slices: dict[str, str] | None = None, **how: Any) -> Json:
    made = raw_node(name, **how)
    shares = {"tessera.dev/share": "512"} if how.get("mode", "exact") == "exact" and how.get("gpus", 8) else {}
    made["status"]["allocatable"] = {**made["status"]["allocatable"], **shares, **(slices or {})}
    return made


def plugin_pod(image: str, on: str) -> Json:
    made = raw_pod("plugin", 0, node=on, scheduler="default-scheduler")
    made["spec"]["containers"][0]["image"] = image
    return made


def test_a_healthy_fleet_is_well() -> None:
    fleet = [
        node("exact"),
        node("mig", {"nvidia.com/mig-1g.10gb": "7"}, **{"tessera.dev/mig-devices": "0"}),
        node("seen", {"nvidia.com/mig-1g.10gb": "7"}, mode="observed"),
        node("plain", gpus=0),
    ]
    served = plugin_pod("nvcr.io/nvidia/k8s-device-plugin:v0.17", "seen")
    found = checks.nodes(fleet, [served])
    assert failing(found) == {}
    assert found[0].text == "3 with GPUs: 1 observed, 2 exact"


@pytest.mark.parametrize(
    ("fleet", "pods", "wrong"),
    [
        pytest.param([node("plain", gpus=0)], [], {"GPU nodes": "warn"}, id="no GPUs"),
        pytest.param(
            [node("odd-1") | {"status": {"allocatable": {"nvidia.com/gpu": "8", "tessera.dev/share": "512"}}}],
            [],
            {"nodes ready": "warn"},
            id="not ready",
        ),
        pytest.param([node("odd-1", mode="exactly")], [], {"node labels": "warn"}, id="odd label"),
        pytest.param([node("odd-1", product="")], [], {"node labels": "warn"}, id="no product"),
        pytest.param(
            [node("odd-1")],
            [plugin_pod("nvcr.io/nvidia/k8s-device-plugin:v0.17", "odd-1")],
            {"device plugins": "fail"},
            id="its plugin runs there",
        ),
        pytest.param([node("odd-1", {"nvidia.com/gpu": "16"})], [], {"device plugins": "fail"}, id="too many tokens"),
        pytest.param(
            [node("odd-1", {"nvidia.com/mig-1g.10gb": "7"})], [], {"device plugins": "fail"}, id="slices without MIG"
        ),
        pytest.param(
            [node("odd-1", {"nvidia.com/mig-1g.99gb": "7"}, mode="observed")],
            [],
            {"MIG profiles": "warn"},
            id="foreign",
        ),
        pytest.param([node("odd-1", {"tessera.dev/share": "0"})], [], {"node resources": "warn"}, id="no shares"),
        pytest.param(
            [node("odd-1", **{"tessera.dev/mig-devices": "6-7"})], [], {"node resources": "warn"}, id="no slices"
        ),
    ],
)
def test_each_odd_node_is_found(fleet: list[Json], pods: list[Json], wrong: dict[str, str]) -> None:
    found = checks.nodes(fleet, pods)
    assert failing(found) == wrong
    text = next(one.text for one in found if one.status != "ok")
    assert text == "no node offers GPUs" or "odd-1" in text


def test_the_resources_that_an_exact_node_lacks_are_named_with_their_numbers() -> None:
    fleet = [raw_node("a", **{"tessera.dev/mig-devices": "6-7"}), raw_node("b", **{"tessera.dev/mig-devices": "all"})]
    (found,) = [one for one in checks.nodes(fleet, []) if one.check == "node resources"]
    assert found.text == (
        "a lacks tessera.dev/share 384 and nvidia.com/mig-1g.10gb 14, b lacks nvidia.com/mig-1g.10gb 56:"
        " pods that ask for those stay Unschedulable there"
    )
    assert "docs/asks/share.md" in found.do
    every = raw_node("c", **{"tessera.dev/mig-devices": "all"})
    every["status"]["allocatable"] = {"nvidia.com/mig-1g.10gb": "56"}
    (found,) = [one for one in checks.nodes([every], []) if one.check == "node resources"]
    assert found.text.startswith("c lacks nvidia.com/gpu 8: ")


def test_the_documented_patch_has_the_numbers_of_an_h100() -> None:
    page = (Path(__file__).parents[2] / "docs/asks/share.md").read_text(encoding="utf-8")
    (patch,) = re.findall(r"--type=merge -p '(.*?)'", page, re.DOTALL)
    amounts = json.loads(patch)["status"]["capacity"]
    assert (amounts.pop("nvidia.com/gpu"), amounts.pop("tessera.dev/share")) == ("8", str(64 * 6))
    profiles = {resource.removeprefix("nvidia.com/mig-"): count for resource, count in amounts.items()}
    table = dict(re.findall(r"`([1-7]g[a-z0-9.]+)` ([0-9]+)", page))
    most = {
        profile.replace("+", "."): str(2 * int(geometry.placements().offer(profile, ("H100-80",)).slots[0]))
        for profile in geometry.models()["H100-80"].profiles
    }
    assert table == most
    assert profiles.items() <= most.items()


def test_long_lists_are_cut() -> None:
    assert checks.some([str(number) for number in range(8)]) == "0, 1, 2, 3, 4 and 3 more"
