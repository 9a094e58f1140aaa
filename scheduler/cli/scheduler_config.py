"""Whether a KubeSchedulerConfiguration leaves every decision about GPUs to Tessera: one finding per setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import yaml

from scheduler import SCHEDULER_NAME
from scheduler.config import seconds

from .checks import Check

SHORTEST_S, LONGEST_S = 1.6, 5.0
"""httpTimeout: above Tessera's own bindDeadline of 1.5 s, and short, for kube-scheduler waits for /filter."""

DEFAULT_S = 5.0
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_VERBS = {"filterVerb": "filter", "prioritizeVerb": "prioritize", "bindVerb": "bind"}


def check_configuration(text: str, where: str) -> list[Check]:
    """Judge a KubeSchedulerConfiguration; `where` names it in the findings."""
    title = "kube-scheduler configuration"
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [Check(title, "fail", f"{where} is not YAML: {error}", "mend the file")]
    if not isinstance(config, dict) or config.get("kind") != "KubeSchedulerConfiguration":
        return [Check(title, "fail", f"{where} is no KubeSchedulerConfiguration", "name the right file")]
    listed = config.get("extenders")
    extenders = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if len(extenders) != 1:
        do = "configure exactly one: Tessera, as deploy/kustomize/base/kube-scheduler-config.yaml does"
        return [Check(title, "fail", f"{where} has {len(extenders)} extenders", do), *_profiles(config)]
    return [Check(title, "ok", f"{where} has one extender"), *_extender(extenders[0]), *_profiles(config)]


def _extender(extender: Mapping[str, Any]) -> list[Check]:
    wrong = [f"{key}: {word}" for key, word in _VERBS.items() if extender.get(key) != word]
    managed = extender.get("managedResources")
    return [
        _either("extender verbs", not wrong, "filter, prioritize and bind", f"set {', '.join(wrong)}"),
        _either("nodeCacheCapable", extender.get("nodeCacheCapable") is True, "names alone are sent", "set it to true"),
        _either(
            "ignorable",
            not extender.get("ignorable"),
            "nothing is bound past Tessera",
            "set it to false: else pods are bound past the ledger while Tessera is away",
        ),
        _either(
            "managedResources",
            not managed,
            "every pod of the profile comes to Tessera",
            "take it away: else CPU-only pods are placed without Tessera",
        ),
        _timeout(extender.get("httpTimeout")),
        _transport(extender),
    ]


def _either(check: str, good: bool, text: str, do: str) -> Check:  # noqa: FBT001 - the question itself
    return Check(check, "ok", text) if good else Check(check, "fail", "not as Tessera needs it", do)


def _timeout(written: object) -> Check:
    do = "set httpTimeout: 2s"
    try:
        limit_s = DEFAULT_S if written is None else seconds(written)
    except ValueError:
        limit_s = None
    if not isinstance(limit_s, int | float):
        return Check("httpTimeout", "fail", f"{written!r} is no duration", do)
    if limit_s < SHORTEST_S:
        return Check("httpTimeout", "fail", f"{limit_s:g} s ends before Tessera has answered", do)
    if limit_s > LONGEST_S or written is None:
        return Check("httpTimeout", "warn", f"{limit_s:g} s: kube-scheduler waits so long for everything else", do)
    return Check("httpTimeout", "ok", f"{limit_s:g} s")


def _transport(extender: Mapping[str, Any]) -> Check:
    parts = urlsplit(str(extender.get("urlPrefix", "")))
    tls = extender.get("tlsConfig") or {}
    secure = extender.get("enableHTTPS") is True or parts.scheme == "https"
    if not secure:
        if parts.hostname in LOOPBACK:
            return Check("extender transport", "ok", "loopback")
        do = "use mutual TLS (docs/operations.md), or the loopback of one pod"
        return Check("extender transport", "fail", f"plain HTTP to {parts.hostname or 'nowhere'}", do)
    lacking = [
        name
        for name, there in (
            ("caFile", tls.get("caFile") or tls.get("caData")),
            ("certFile", tls.get("certFile") or tls.get("certData")),
            ("keyFile", tls.get("keyFile") or tls.get("keyData")),
        )
        if not there
    ]
    if lacking or tls.get("insecure"):
        text = "it does not verify Tessera" if tls.get("insecure") or "caFile" in lacking else "it shows no certificate"
        return Check("extender transport", "fail", text, f"set tlsConfig.{', '.join(lacking) or 'insecure: false'}")
    return Check("extender transport", "ok", "mutual TLS")


def _profiles(config: Mapping[str, Any]) -> list[Check]:
    listed = config.get("profiles")
    profiles = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    ours = next((one for one in profiles if one.get("schedulerName") == SCHEDULER_NAME), None)
    if ours is None:
        do = f"add a profile with schedulerName: {SCHEDULER_NAME}"
        return [Check("profile", "fail", f"no profile is called {SCHEDULER_NAME}", do)]
    found = [Check("profile", "ok", f"{SCHEDULER_NAME} is the only one")]
    if len(profiles) > 1:
        do = "give Tessera a kube-scheduler of its own: an extender is asked for every profile"
        found = [Check("profile", "warn", f"{len(profiles)} profiles share this kube-scheduler", do)]
    plugins = ours.get("plugins") or {}
    disabled = {
        one.get("name")
        for point in ("postFilter", "multiPoint")
        for one in ((plugins.get(point) or {}).get("disabled") or [])
    }
    off = bool(disabled & {"DefaultPreemption", "*"})
    found.append(_either("DefaultPreemption", off, "off", "disable it at postFilter: it evicts without asking Tessera"))
    share = ours.get("percentageOfNodesToScore", config.get("percentageOfNodesToScore"))
    if share == 100:  # noqa: PLR2004 - per cent
        found.append(Check("percentageOfNodesToScore", "ok", "100"))
    else:
        do = "set 100: a sample that misses the nodes with free GPUs refuses pods that fit"
        found.append(Check("percentageOfNodesToScore", "warn", f"{share or 'default sampling'}", do))
    return found
