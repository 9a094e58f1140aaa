"""What `tessera doctor` judges, from what it was able to read: one finding per question, each with what to do.

Everything here is a plain function of Kubernetes objects; asking for them is `doctor`'s part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from policies.columns import Mode
from scheduler import GPU, MIG_PREFIX, PREFIX, SHARE, geometry
from scheduler.intake.node import MIG_DEVICES, read_node
from scheduler.kube.lease import TERM_S
from scheduler.model.node import Node

from .rights import Right

Status = Literal["ok", "warn", "fail"]
Object = Mapping[str, Any]

OLDEST_MINOR = 30
"""Kubernetes 1.30: the first with ValidatingAdmissionPolicy v1, which guards the allocations."""

SKEW_WARN_S, SKEW_FAIL_S = 5.0, 30.0
SHOWN = 5
SHARES = 64
"""Of `tessera.dev/share` for each GPU without MIG mode: more than ever lie on one, so that Tessera alone decides."""

POLICY = "tessera-v1-annotations"
LINE_POLICIES = (
    ("tessera-v2-gate", "whoever may patch a pod may take its gate off", "admission-v2.yaml"),
    ("tessera-v3-line", "while the webhook is away GPU pods slip past the line", "admission-v3.yaml"),
)
MANAGED = PREFIX + "managed"
_PLUGIN = re.compile(r"(k8s-device-plugin|nvidia-device-plugin|gpu-device-plugin)(?=[:@/]|$)")
_VERSION = re.compile(r"v?1\.([0-9]+)")


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer; `do` says what to do and is empty when all is well."""

    check: str
    status: Status
    text: str
    do: str = ""


def some(names: Sequence[str]) -> str:
    """Return a few names and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def unread(check: str, text: str) -> Check:
    """Say that a question stays open because the answer may not be read."""
    return Check(check, "warn", text, "run doctor with an administrator's kubeconfig to check it")


def rights(check: str, who: str, answers: Iterable[tuple[Right, bool]]) -> Check:
    """Judge whether somebody has all the rights that Tessera needs."""
    missing = [str(right) for right, allowed in answers if not allowed]
    if missing:
        return Check(
            check, "fail", f"{who} may not: {'; '.join(missing)}", "apply deploy/kustomize/base/rbac-tessera.yaml"
        )
    return Check(check, "ok", f"{who} has every right that Tessera needs")


def minor(version: str) -> int:
    """Return 36 of `v1.36.2`; -1 where it is no Kubernetes version."""
    found = _VERSION.match(version)
    return int(found.group(1)) if found else -1


def api_version(version: Object) -> Check:
    """Judge the API server's version."""
    text = str(version.get("gitVersion", ""))
    if minor(text) < OLDEST_MINOR:
        return Check("API server", "fail", f"version {text or 'unknown'}", f"use Kubernetes 1.{OLDEST_MINOR} or newer")
    return Check("API server", "ok", f"version {text}")


def kube_scheduler_version(version: Object, pods: Iterable[Object], namespace: str) -> Check:
    """Judge the version of the kube-scheduler that runs in Tessera's namespace, by its image."""
    name = "kube-scheduler version"
    images = [
        container.get("image", "")
        for pod in pods
        if pod["metadata"].get("namespace") == namespace
        for container in pod["spec"].get("containers", [])
    ]
    found = [image for image in images if re.search(r"(^|/)kube-scheduler[:@]", image)]
    if not found:
        text = f"no kube-scheduler runs in namespace {namespace}"
        return Check(name, "warn", text, "check that the one for schedulerName tessera runs, wherever it is")
    tag = found[0].partition("@")[0].rpartition(":")[2]
    ours, server = minor(tag), minor(str(version.get("gitVersion", "")))
    if ours < 0:
        return Check(name, "warn", f"image {found[0]} tells no version", "use an image with a version tag")
    if not server - 1 <= ours <= server:
        text = f"kube-scheduler {tag} beside API server 1.{server}"
        return Check(name, "fail", text, "run the API server's minor version, or the one before")
    return Check(name, "ok", tag)


def clock(date: str, before_s: float, after_s: float) -> Check:
    """Judge this machine's clock against the API server's Date header; times are seconds since 1970."""
    try:
        server_s = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return Check("clock", "warn", "the API server does not tell the time", "compare the machines' clocks by hand")
    skew_s = max(before_s - (server_s + 1), server_s - after_s, 0.0)  # the header has whole seconds
    if skew_s <= SKEW_WARN_S:
        return Check("clock", "ok", "agrees with the API server's")
    status: Status = "warn" if skew_s <= SKEW_FAIL_S else "fail"
    return Check("clock", status, f"differs from the API server's by {skew_s:.0f} s", "set both by NTP")


def policy(policies: Sequence[Object], bindings: Sequence[Object]) -> Check:
    """Judge whether admission policy V1 guards Tessera's annotations."""
    name, do = "admission policy V1", "apply deploy/kustomize/base/admission-v1.yaml"
    found = next((one for one in policies if one["metadata"]["name"] == POLICY), None)
    if found is None:
        return Check(name, "fail", "not there: anybody who may patch a pod may claim devices", do)
    bound = [one["spec"] for one in bindings if one["spec"].get("policyName") == POLICY]
    if not any("Deny" in one.get("validationActions", []) and "matchResources" not in one for one in bound):
        return Check(name, "fail", "not bound to every namespace with Deny, so it guards too little", do)
    if found["spec"].get("failurePolicy", "Fail") != "Fail":
        return Check(name, "warn", "its failurePolicy lets requests pass that it could not judge", do)
    return Check(name, "ok", "guards Tessera's annotations")


def managed(namespace: Object) -> bool:
    """Say whether new GPU pods of a namespace are to be held."""
    return (namespace["metadata"].get("labels") or {}).get(MANAGED) == "true"


def line(
    policies: Sequence[Object], bindings: Sequence[Object], webhook: Object | None, managed: Sequence[str]
) -> list[Check]:
    """Judge whether pods of managed namespaces are held until their turn: by the webhook, guarded by V2 and V3.

    Args:
        policies: all ValidatingAdmissionPolicies.
        bindings: what they are bound to.
        webhook: Tessera's MutatingWebhookConfiguration; None = it is not there.
        managed: names of the namespaces that are labelled.
    """
    if not managed and webhook is None:
        do = f"apply the admission-*.yaml of deploy/kustomize/base; label {MANAGED}=true where pods shall wait in order"
        return [Check("webhook", "warn", "not there: all pods go the direct way", do)]
    found = [_webhook(webhook, managed)]
    for name, what, file in LINE_POLICIES:
        check, do = f"admission policy {name[8:10].upper()}", f"apply deploy/kustomize/base/{file}"
        there = any(one["metadata"]["name"] == name for one in policies)
        bound = any(
            one["spec"].get("policyName") == name and "Deny" in one["spec"].get("validationActions", [])
            for one in bindings
        )
        if not (there and bound):
            text = f"{'not bound with Deny' if there else 'not there'}: {what}"
            found.append(Check(check, "fail" if managed else "warn", text, do))
        else:
            found.append(Check(check, "ok", "guards the line of managed namespaces"))
    return found


def _webhook(webhook: Object | None, managed: Sequence[str]) -> Check:
    count = f"{len(managed)} managed namespace{'' if len(managed) == 1 else 's'}"
    if webhook is None:
        text = f"not there, and V3 refuses GPU pods of {count}: {some(managed)}"
        return Check("webhook", "fail", text, "apply deploy/kustomize/base/admission-webhook.yaml")
    hooks = webhook.get("webhooks") or [{}]
    if any(not (one.get("clientConfig") or {}).get("caBundle") for one in hooks):
        do = "start Tessera, which writes it, or write the CA of your own certificate there"
        return Check("webhook", "fail" if managed else "warn", "has no caBundle: the API server does not trust it", do)
    if any(one.get("failurePolicy") != "Ignore" for one in hooks):
        text = "its failurePolicy is not Ignore: while Tessera is away no pod of a managed namespace is created"
        return Check("webhook", "warn", text, "set failurePolicy: Ignore; V3 guards the line")
    if not managed:
        do = f"label a namespace {MANAGED}=true"
        return Check("webhook", "warn", "there, but no namespace is managed: all pods go the direct way", do)
    return Check("webhook", "ok", f"holds GPU pods of {count}")


def lease(found: Object | None, now: datetime) -> Check:
    """Judge whether a Tessera holds this cluster; None = there is no Lease."""
    do = "start Tessera, and read its log when it does not stay"
    if found is None:
        return Check("lease", "fail", "no Tessera has run on this cluster yet", do)
    holder, renewed = found["spec"].get("holderIdentity") or "", found["spec"].get("renewTime") or ""
    if not holder:
        return Check("lease", "fail", "given back: no Tessera runs on this cluster", do)
    try:
        age_s = (now - datetime.fromisoformat(renewed)).total_seconds()
    except ValueError:
        age_s = float("inf")
    if age_s > TERM_S + SKEW_WARN_S:
        return Check("lease", "fail", f"held by {holder}, which no longer renews it", do)
    return Check("lease", "ok", f"held by {holder}")


def nodes(raw: Sequence[Object], pods: Sequence[Object]) -> list[Check]:
    """Judge GPU nodes: not ready, odd labels, a second device plugin, MIG resources unknown, resources missing."""
    known = [(one, node) for one in raw if (node := read_node(one, geometry.products())) is not None]
    gpu = [(one, node) for one, node in known if node.gpus or node.slices or node.devices or node.shares]
    if not gpu:
        do = "install NVIDIA's device plugin and GPU Feature Discovery"
        return [Check("GPU nodes", "warn", "no node offers GPUs", do)]
    exact = {node.name: node for _, node in gpu if node.mode is Mode.EXACT}
    counted = f"{len(gpu)} with GPUs: {len(gpu) - len(exact)} observed, {len(exact)} exact"
    return [
        Check("GPU nodes", "ok", counted),
        _ready(gpu),
        _labels([node for _, node in gpu]),
        _second_plugin(exact, pods),
        _profiles([node for _, node in gpu]),
        _tokens(exact.values()),
    ]


def _ready(gpu: Sequence[tuple[Object, Node]]) -> Check:
    def ready(one: Object) -> bool:
        listed = (one.get("status") or {}).get("conditions") or []
        return any(each.get("type") == "Ready" and each.get("status") == "True" for each in listed)

    down = sorted(node.name for one, node in gpu if not ready(one))
    if down:
        return Check("nodes ready", "warn", f"not ready or not heard from: {some(down)}", "look at their kubelets")
    return Check("nodes ready", "ok", "every GPU node is ready")


def _labels(gpu: Sequence[Node]) -> Check:
    odd = sorted(f"{node.name}: {node.warnings[0]}" for node in gpu if node.warnings)
    if odd:
        return Check("node labels", "warn", some(odd), "mend the label, or restart GPU Feature Discovery")
    unnamed = sorted(node.name for node in gpu if not node.product)
    if unnamed:
        do = "install GPU Feature Discovery: without the label gpu.product no gpu-model matches"
        return Check("node labels", "warn", f"of unknown GPU model: {some(unnamed)}", do)
    return Check("node labels", "ok", "every GPU node tells its model")


def _second_plugin(exact: Mapping[str, Node], pods: Sequence[Object]) -> Check:
    name = "device plugins"
    others = {
        pod["spec"]["nodeName"]
        for pod in pods
        if pod["spec"].get("nodeName") in exact
        and any(_PLUGIN.search(each.get("image", "")) for each in pod["spec"].get("containers", []))
    }
    others |= {
        node.name
        for node in exact.values()
        if node.gpus > len(node.devices) or (node.slices and not any(device.mig_mode for device in node.devices))
    }
    if others:
        text = f"exact nodes served by another device plugin: {some(sorted(others))}"
        return Check(name, "fail", text, f"keep that plugin off nodes labelled {PREFIX}mode=exact")
    return Check(name, "ok", "no second device plugin on exact nodes")


def _profiles(gpu: Sequence[Node]) -> Check:
    table = geometry.placements()
    odd = sorted(
        f"{node.name}: {profile} on {node.devices[0].model if node.devices else node.product or 'unknown'}"
        for node in gpu
        for profile, count in node.slices
        if count and not any(table.shape(device.model, profile) for device in node.devices[:1])
    )
    if odd:
        do = f"check the product label and {MIG_DEVICES}; such slices are given where the plugin offers them"
        return Check("MIG profiles", "warn", f"not listed for the model: {some(odd)}", do)
    return Check("MIG profiles", "ok", "every nvidia.com/mig-* is one of its model")


def _tokens(exact: Iterable[Node]) -> Check:
    """Judge whether exact nodes advertise what kube-scheduler's own filter looks for, before it asks Tessera."""
    table, name = geometry.placements(), "node resources"
    lacking: list[str] = []
    for node in sorted(exact, key=lambda one: one.name):
        mig = sum(device.mig_mode for device in node.devices)
        missing = {GPU: len(node.devices)} if node.devices and not node.gpus else {}
        if len(node.devices) > mig and not node.shares:
            missing[SHARE] = SHARES * (len(node.devices) - mig)
        if mig and not any(count for _, count in node.slices):
            model = node.devices[0].model
            known = table.models.get(model)
            most = {one: int(table.offer(one, (model,)).slots[0]) * mig for one in (known.profiles if known else ())}
            if most:
                first = max(most, key=most.__getitem__)
                missing[MIG_PREFIX + first.replace("+", ".")] = most[first]
        if missing:
            lacking.append(f"{node.name} lacks " + " and ".join(f"{key} {count}" for key, count in missing.items()))
    if lacking:
        do = "patch them into the node's status until Tessera's device plugin is there: docs/asks/share.md"
        return Check(name, "warn", some(lacking) + ": pods that ask for those stay Unschedulable there", do)
    return Check(name, "ok", "exact nodes advertise GPUs, shares and MIG slices")


def now_utc(wall_us: int) -> datetime:
    """Return microseconds since 1970 as a date."""
    return datetime.fromtimestamp(wall_us / 1_000_000, UTC)
